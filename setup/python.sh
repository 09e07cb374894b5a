#!/usr/bin/env bash
# Makes .venv hold what requirements.txt, constraints.txt and no_deps.txt pin, and the package itself (editable).
# Says nothing when there is nothing to do.
#
#   setup/python.sh                 the project's own .venv
#   setup/python.sh --use PYTHON    an environment of the user's: checked, never changed
#   setup/python.sh --probe WHAT    true if the base Python has WHAT (ensurepip | headers)
set -euo pipefail
cd "$(dirname "$0")/.."

log=.cache/setup/pip.log
oldest='(3, 11)'

fail() {
  echo "setup: $1" >&2
  exit 1
}

# The interpreter .venv is made from: the first that is new enough.
base_python() {
  local candidate
  for candidate in python3 /usr/bin/python3 python3.13 python3.12 python3.11; do
    if "$candidate" -c "import sys; sys.exit(sys.version_info < $oldest)" 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  return 1
}

probe() {
  local python
  python=$(base_python) || return 1
  case $1 in
    ensurepip) "$python" -c 'import ensurepip, venv' 2>/dev/null ;;
    headers) "$python" - 2>/dev/null <<'PY' ;;
import pathlib, sys, sysconfig
sys.exit(not pathlib.Path(sysconfig.get_path("include"), "Python.h").exists())
PY
    *) return 2 ;;
  esac
}

case ${1:-} in
  --probe) probe "$2"; exit ;;
  --use) exec "$2" setup/check_python.py ;;
esac

mkdir -p .cache/setup
if command -v flock >/dev/null; then  # one set-up at a time
  exec 9>.cache/setup/python.lock
  flock 9
fi
python=.venv/bin/python
packages=$(cat setup/requirements.txt setup/constraints.txt setup/no_deps.txt | sha256sum | cut -c1-32)
package=$({ cat pyproject.toml; pwd; } | sha256sum | cut -c1-32)
packages_stamp=.venv/.packages-$packages
package_stamp=.venv/.editable-$package

if ! "$python" -c '' 2>/dev/null; then
  base=$(base_python) || fail "no Python $oldest or newer found; install one, or give yours: make PYTHON=/path/to/python"
  rm -rf .venv
  "$base" -m venv .venv >"$log" 2>&1 || { cat "$log" >&2; fail "'$base -m venv .venv' failed (Debian: apt-get install python3-venv)"; }
fi

pip_install() {
  "$python" -m pip --disable-pip-version-check --no-input install --no-compile "$@" >"$log" 2>&1 && return
  tail -n 15 "$log" >&2
  fail "pip failed (whole log: $log)"
}

if [[ ! -e $packages_stamp ]]; then
  if ! "$python" -c 'import torch' 2>/dev/null; then
    echo "setup: installing Python packages into .venv (log: $log)" >&2
    echo "setup: if your package index serves CUDA builds of torch (several GB), stop and set" >&2
    echo "       PIP_EXTRA_INDEX_URL to the index of CPU builds that PyTorch's install page names" >&2
  fi
  pip_install -r setup/requirements.txt -c setup/constraints.txt
  pip_install --no-deps -r setup/no_deps.txt
  rm -f .venv/.packages-*
  touch "$packages_stamp"
fi

if [[ ! -e $package_stamp ]]; then
  # The extension modules come from the one CMake build tree (make build), so none is built here.
  pip_install --no-deps --no-build-isolation --config-settings=wheel.cmake=false \
    --config-settings=editable.mode=inplace -e .
  rm -f .venv/.editable-*
  touch "$package_stamp"
fi
