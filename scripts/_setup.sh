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

# show_help ARGUMENT...: for -h or --help, prints the script's first comment and exits.
# It builds nothing.
show_help() {
  case " $* " in
    *" -h "* | *" --help "*)
      sed -n '1d; /^#/!q; s/^# \{0,1\}//p' "$0"
      exit
      ;;
  esac
}

# show_help_of MODULE ARGUMENT...: the same for the help of a module without packages.
show_help_of() {
  local python
  case " ${*:2} " in
    *" -h "* | *" --help "*)
      python=$(find_python)
      cd -- "$root"
      exec "$python" -m "$1" --help
      ;;
  esac
}

# The programs that scripts and tests need from the system, apart from those of every
# Debian and macOS: name, package on Debian, command that installs it on macOS.
# Every other program (cmake, ninja, clang, node ...) is a package in .venv.
system_needs='
python3  python3       brew install python
venv     python3-venv  brew install python
Python.h python3-dev   brew install python
g++      g++           xcode-select --install
git      git           xcode-select --install
setarch  util-linux    -
'

# fail_missing MESSAGE NAME: the error names NAME's package.
fail_missing() {
  local name package command
  while read -r name package command; do
    [ "$name" = "$2" ] || continue
    case $(uname) in
      Darwin) fail "$1 (run: $command)" ;;
      *) fail "$1 (on Debian: apt-get install $package)" ;;
    esac
  done <<<"$system_needs"
  fail "$1"
}

# need NAME...: fails unless these programs are in PATH.
need() {
  local name
  for name; do
    [ -n "$(type -P "$name")" ] || fail_missing "$name is missing" "$name"
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

# Prints nothing unless $1 is Python 3.10 or newer.
identify() {
  "$1" -c 'import sys
if sys.version_info >= (3, 10): print(sys.base_prefix, sys.version)' 2>/dev/null || true
}

find_python() {
  local name path
  if [ -n "${PYTHON:-}" ]; then
    [ -n "$(identify "$PYTHON")" ] || fail "PYTHON=$PYTHON is no Python 3.10 or newer"
    printf '%s\n' "$PYTHON"
    return
  fi
  for name in python3 python3.14 python3.13 python3.12 python3.11 python3.10; do
    while read -r path; do
      # An activated .venv is first in PATH, but cannot replace itself.
      if [[ $path != "$venv"/* && -n $(identify "$path") ]]; then
        printf '%s\n' "$path"
        return
      fi
    done < <(type -aP "$name")
  done
  fail_missing "no Python 3.10 or newer found" python3
}

compiles() {
  printf '#include <concepts>\nint main() {}\n' |
    "$@" -std=c++20 -x c++ -fsyntax-only - 2>/dev/null
}

check_compiler() {
  if [ -n "${CXX:-}" ]; then
    # shellcheck disable=SC2086 # CMake splits it, too: CXX="ccache g++"
    compiles $CXX || fail "CXX=$CXX does not compile C++20"
    return
  fi
  for CXX in c++ g++ clang++; do
    if compiles "$CXX"; then
      export CXX
      return
    fi
  done
  fail_missing "no C++20 compiler found" g++
}

check_headers() {
  "$1" - <<'PY' || fail_missing "Python's headers are missing" Python.h
import pathlib, sys, sysconfig
sys.exit(not pathlib.Path(sysconfig.get_path("include"), "Python.h").exists())
PY
}

# False for a .venv that was moved, that lost its Python or has another one than
# $PYTHON, or whose installation was interrupted.
venv_works() {
  local home
  [ -n "$(identify "$python")" ] && "$python" -c 'import pip' 2>/dev/null || return 1
  home=$(set +u && source "$venv/bin/activate" && printf '%s' "$VIRTUAL_ENV") || return 1
  [ "$home" -ef "$venv" ] && [ ! -e "$venv/installing" ] || return 1
  [ -z "${PYTHON:-}" ] || [ "$(identify "$PYTHON")" = "$(identify "$python")" ]
}

make_venv() {
  local base
  base=$(find_python)
  "$base" -c 'import ensurepip, venv' 2>/dev/null ||
    fail_missing "the venv module of $base is missing" venv
  check_headers "$base"
  check_compiler
  say "creating $venv with $("$base" --version)"
  rm -rf -- "$venv"
  "$base" -m venv "$venv"
}

# release_environment RELEASE PACKAGE...: makes $env, with that MLX, what builds beside
# it and the packages.
release_environment() {
  local mlx=mlx nanobind
  [ "$(uname)" = Darwin ] || mlx='mlx[cpu]'
  nanobind=$(nanobind_of "$1")
  say "mlx $1, nanobind $nanobind"
  env=$root/build/versions/$1
  check_compiler
  [ -x "$env/bin/python" ] || "$(find_python)" -m venv "$env"
  pip install "$mlx==$1" "nanobind==$nanobind" scikit-build-core cmake ninja "${@:2}"
  rm -rf -- "$env/build" # pip would reuse a build beside another MLX
}

# pip ARGUMENT...: that of $env.
pip() {
  "$env/bin/python" -m pip --disable-pip-version-check --quiet "$@"
}

# A checksum of the sources of the installed package.
fingerprint() {
  (
    cd -- "$root"
    find pyproject.toml CMakeLists.txt csrc metal scripts/_setup.sh -type f \
      -exec cksum {} + | LC_ALL=C sort | cksum
  )
}

setup() {
  local stamp=$venv/installed now before="" kept="" extras extra
  if [ "$(uname)" = Linux ]; then
    set -- cpu "$@" # elsewhere mlx brings its library itself
  fi
  now=$(fingerprint)
  if ! venv_works; then
    make_venv
  elif [ -e "$stamp" ]; then
    { read -r before && read -r kept; } <"$stamp" || true
  fi
  extras=$kept
  for extra; do
    case ",$extras," in
      *",$extra,"*) ;;
      *) extras=${extras:+$extras,}$extra before="" ;;
    esac
  done
  [ "$now" != "$before" ] || return 0

  check_headers "$python"
  check_compiler
  say "building and installing mlx-adadelta[$extras]"
  printf '%s\n' outdated "$kept" >"$stamp"
  touch -- "$venv/installing"
  if ! (cd -- "$root" && MLX_ADADELTA_REQUIRE_NATIVE=1 "$python" -m pip install \
    --quiet --disable-pip-version-check -e ".[$extras]"); then
    rm -f -- "$venv/installing" # pip has cleaned up
    fail "pip could not install mlx-adadelta[$extras]: see above"
  fi
  printf '%s\n' "$now" "$extras" >"$stamp"
  rm -f -- "$venv/installing"
}
