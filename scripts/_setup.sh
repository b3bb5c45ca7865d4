# Sourced by the scripts beside it: `setup EXTRA...` makes .venv, builds the
# package into it (native part mandatory) with those extras, and defines $python.
# It is quick where no source has changed, and repairs an interrupted run.

set -euo pipefail
unset CDPATH
trap 'exit 130' INT # otherwise it would look like an error of pip

root=$(cd -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/.." && pwd)
venv=$root/.venv
python=$venv/bin/python

say() {
  printf '==> %s\n' "$1" >&2
}

fail() {
  printf 'error: %s\n' "$1" >&2
  exit 1
}

wants_help() {
  [[ " $* " =~ \ (-h|--help)\  ]]
}

# show_help ARGUMENT...: for -h or --help, prints the script's first comment and exits.
# It builds nothing.
show_help() {
  wants_help "$@" || return 0
  sed -n '1d; /^#/!q; s/^# \{0,1\}//p' "$0"
  exit
}

# show_help_of MODULE ARGUMENT...: the same for the help of a module without packages.
show_help_of() {
  wants_help "${@:2}" || return 0
  cd -- "$root"
  exec "$(find_python)" -m "$1" --help
}

# What every Debian lacks. Other programs (cmake, ninja, clang, node ...) are packages
# in .venv.
debian_needs="git g++ python3-dev python3-venv"

# fail_missing MESSAGE: the error says how to install compilers and Python.
fail_missing() {
  case $(uname) in
    Darwin) fail "$1 (it may need xcode-select --install, brew install python)" ;;
    *) fail "$1 (it may need, on Debian, apt-get install $debian_needs)" ;;
  esac
}

# need NAME...: fails unless these programs are in PATH.
need() {
  local name
  for name; do
    [ -n "$(type -P "$name")" ] || fail_missing "$name is missing"
  done
}

# The releases of MLX that the source builds with, oldest first.
known_releases() {
  sed -n 's/^\([^# ]*\) .*/\1/p' "$root/csrc/mlx_releases.txt"
}

# nanobind_of RELEASE: what that release of MLX was built with.
nanobind_of() {
  grep "^$1 " "$root/csrc/mlx_releases.txt" | cut -d' ' -f2 ||
    fail "mlx $1 is not in csrc/mlx_releases.txt"
}

# base_of PYTHON: the interpreter below a virtual environment; fails before 3.10.
base_of() {
  "$1" -c 'import sys
if sys.version_info < (3, 10): sys.exit(1)
print(sys._base_executable)' 2>/dev/null
}

find_python() {
  local name
  if [ -n "${PYTHON:-}" ]; then
    base_of "$PYTHON" || fail "PYTHON=$PYTHON is no Python 3.10 or newer"
    return
  fi
  for name in python3 python3.14 python3.13 python3.12 python3.11 python3.10; do
    ! base_of "$name" || return 0
  done
  fail_missing "no Python 3.10 or newer found"
}

# release_environment RELEASE PACKAGE...: makes $env, with that MLX, what builds beside
# it and the packages.
release_environment() {
  local mlx=mlx nanobind
  [ "$(uname)" = Darwin ] || mlx='mlx[cpu]'
  nanobind=$(nanobind_of "$1")
  say "mlx $1, nanobind $nanobind"
  env=$root/build/versions/$1
  [ -x "$env/bin/python" ] || "$(find_python)" -m venv "$env"
  pip install "$mlx==$1" "nanobind==$nanobind" scikit-build-core cmake ninja "${@:2}"
  rm -rf -- "$env/build" # pip would reuse a build beside another MLX
}

# pip ARGUMENT...: that of $env.
pip() {
  "$env/bin/python" -m pip --disable-pip-version-check --quiet "$@"
}

# copy_tree FOLDER: the files that git knows, as they are now.
copy_tree() {
  need git
  rm -rf -- "$1"
  mkdir -p -- "$1"
  (cd -- "$root" && git ls-files -z | tar --null -T - -cf -) | tar -xf - -C "$1"
}

# build_extension FOLDER CMAKE_OPTION...: one apart from the installed package, of the
# tree in the current directory.
build_extension() {
  PATH=$venv/bin:$PATH "$python" -m cmake -G Ninja -S . -B "$1" \
    -DPython_EXECUTABLE="$python" "${@:2}" >/dev/null &&
    "$venv/bin/ninja" -C "$1" --quiet mlx_adadelta_module
}

# library_path: Python's own library and the packages in .venv, for a PYTHONPATH with
# -S, which leaves out the editable install.
library_path() {
  "$python" -c 'from sysconfig import get_path as p; print(p("stdlib"), p("purelib"), sep=":")'
}

# A checksum of the sources of the installed package.
fingerprint() {
  (cd -- "$root" && find pyproject.toml CMakeLists.txt csrc metal scripts/_setup.sh \
    -type f -exec cksum {} + | LC_ALL=C sort | cksum)
}

# False for a .venv that was moved, that lost its Python or has another one than
# $PYTHON, or whose installation was interrupted.
venv_works() {
  [ ! -e "$venv/installing" ] && "$python" -c 'import pip' 2>/dev/null &&
    grep -qF "$venv/" "$venv/bin/pip" || return 1
  [ -z "${PYTHON:-}" ] || [ "$(find_python)" -ef "$(base_of "$python")" ]
}

setup() {
  local stamp=$venv/installed base now extra extras="" missing=""
  if [ "$(uname)" = Linux ]; then
    set -- cpu "$@" # elsewhere mlx brings its library itself
  fi
  if ! venv_works; then
    base=$(find_python)
    say "creating $venv with $("$base" --version)"
    rm -rf -- "$venv"
    "$base" -m venv "$venv" || fail_missing "$base could not make $venv"
  fi
  now=$(fingerprint)
  # The stamp has a line for each extra that was installed with these sources.
  grep -qF "$now " "$stamp" 2>/dev/null || : >"$stamp"
  for extra; do
    grep -qxF "$now $extra" "$stamp" || missing=yes
    extras=${extras:+$extras,}$extra
  done
  [ -n "$missing" ] || return 0

  say "building and installing mlx-adadelta[$extras]"
  touch -- "$venv/installing"
  if ! (cd -- "$root" && MLX_ADADELTA_REQUIRE_NATIVE=1 "$python" -m pip install \
    --quiet --disable-pip-version-check -e ".[$extras]"); then
    rm -f -- "$venv/installing" # pip has cleaned up
    fail_missing "pip could not install mlx-adadelta[$extras]: see above"
  fi
  for extra; do
    printf '%s\n' "$now $extra" >>"$stamp"
  done
  rm -f -- "$venv/installing"
}
