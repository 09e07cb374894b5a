#!/usr/bin/env bash
# scripts/build.sh PRESET: configures build/PRESET where that is needed, and builds it.
# TW_PYTHON: the interpreter to build for (default .venv). CI=1: warnings are errors.
set -euo pipefail
cd "$(dirname "$0")/.."

preset=$1
folder=build/$preset
wish=${TW_PYTHON:-.venv/bin/python}
python=$(command -v "$wish") || { echo "build: no such interpreter: $wish (make setup)" >&2; exit 1; }
[[ $python == /* ]] || python=$PWD/$python

mkdir -p "$folder"
if command -v flock >/dev/null; then  # one build of a tree at a time
  exec 9>"$folder/.lock"
  flock 9
fi

# Of an existing tree CMake knows itself what changed in its files; what changes outside them stands
# in this text: our arguments, the presets, the versions of the Python packages built against.
arguments=(--preset "$preset" "-DPython_EXECUTABLE=$python"
  "-DCMAKE_COMPILE_WARNING_AS_ERROR=${CI:+ON}")
versions=$("$python" - <<'PY'
from importlib.metadata import PackageNotFoundError, version
for name in ("torch", "nanobind"):
    try:
        print(name, version(name))
    except PackageNotFoundError:
        print(name, "-")
PY
)
wanted="${arguments[*]} $versions $(sha256sum <CMakePresets.json)"
if [[ ! -e $folder/build.ninja || $(cat "$folder/.configured" 2>/dev/null) != "$wanted" ]]; then
  rm -f "$folder/.configured"
  log=$folder/configure.log
  cmake "${arguments[@]}" >"$log" 2>&1 || { cat "$log" >&2; exit 1; }
  grep -E '^-- (thinwire|  TW_WITH_)' "$log" >&2
  echo "$wanted" >"$folder/.configured"
fi

# A file that includes torch takes about 2 GB to compile.
jobs=${JOBS:-$(nproc)}
by_memory=$(awk '/MemAvailable/ {print int($2 / 2000000)}' /proc/meminfo)
((jobs <= by_memory)) || jobs=$((by_memory > 1 ? by_memory : 1))

if ! NINJA_STATUS="[$preset %f/%t] " cmake --build "$folder" -j "$jobs" >"$folder/build.log" 2>&1; then
  grep -v '^\[.*\] ' "$folder/build.log" | tail -n 100 >&2
  echo "build: failed (whole log: $folder/build.log)" >&2
  exit 1
fi
grep -A 8 'warning:' "$folder/build.log" >&2 || true
