# Sourced by the scripts beside it: `setup EXTRA...` makes .venv, builds the
# package into it (native part mandatory) with those extras, and defines $python.
# Quick when nothing it depends on has changed.

set -euo pipefail

root=$(cd -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/.." && pwd)
venv=$root/.venv
python=$venv/bin/python

fail() {
  printf 'error: %s\n' "$1" >&2
  exit 1
}

# What to install, on this system, for what is missing.
advice() {
  if [ "$(uname)" = Darwin ]; then
    printf 'run: xcode-select --install, and install Python from python.org'
  else
    printf 'on Debian: apt-get install %s' "$1"
  fi
}

find_python() {
  local candidate
  for candidate in ${PYTHON:+"$PYTHON"} python3 python3.13 python3.12 python3.11 python3.10; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
      command -v "$candidate"
      return
    fi
  done
  fail "no Python 3.10 or newer found ($(advice python3))"
}

check_tools() {
  local base=$1
  "$base" -c 'import ensurepip, venv' 2>/dev/null ||
    fail "Python's venv module is missing ($(advice python3-venv))"
  "$base" - <<'PY' || fail "Python's headers are missing ($(advice python3-dev))"
import os, sys, sysconfig
sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))
PY
  local compiler
  for compiler in ${CXX:+"$CXX"} c++ g++ clang++; do
    if "$compiler" --version >/dev/null 2>&1; then
      return
    fi
  done
  fail "no C++ compiler found ($(advice g++))"
}

# A checksum of everything the installed package is made from.
fingerprint() {
  (
    cd -- "$root"
    find pyproject.toml CMakeLists.txt csrc metal scripts/_setup.sh -type f |
      LC_ALL=C sort | while read -r file; do cksum "$file"; done
    printf '%s\n' "$venv"
  ) | cksum
}

setup() {
  local extras=$* base stamp
  if [ "$(uname)" = Linux ]; then
    extras="cpu $extras" # elsewhere mlx brings its library itself
  fi
  extras=${extras// /,}
  stamp=$venv/installed-$extras
  if [ -e "$stamp" ] && [ "$(fingerprint)" = "$(cat "$stamp")" ] &&
    "$python" -c '' 2>/dev/null; then
    return
  fi
  base=$(find_python)
  check_tools "$base"
  if ! "$python" -m pip --version >/dev/null 2>&1; then
    echo "==> creating $venv with $("$base" --version)"
    "$base" -m venv --clear "$venv"
  fi
  rm -f "$stamp"
  echo "==> building and installing mlx-adadelta with extras $extras"
  MLX_ADADELTA_REQUIRE_NATIVE=1 "$python" -m pip install --quiet \
    --disable-pip-version-check -e "$root[$extras]"
  fingerprint >"$stamp"
}
