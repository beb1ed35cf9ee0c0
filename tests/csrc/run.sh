#!/bin/sh
# Builds and runs the C++ tests of some CMake presets: by default plain and under the sanitizers, leaks included.
set -eu
cd "$(dirname "$0")/../.."
PATH="$PWD/.venv/bin:$PATH"
export ASAN_OPTIONS=detect_leaks=1

for preset in ${@:-default asan}; do
  cmake --preset "$preset" >/dev/null
  cmake --build --preset "$preset"
  ctest --preset "$preset"
done
