#!/bin/sh
# Builds and runs the C++ tests, plain and under the sanitizers; with --arm also cross compiled, in qemu.
set -eu
cd "$(dirname "$0")/../.."
PATH="$PWD/.venv/bin:$PATH"

presets="default asan"
[ "${1:-}" != "--arm" ] || presets="$presets aarch64"
for preset in $presets; do
  cmake --preset "$preset" >/dev/null
  cmake --build --preset "$preset"
  ctest --preset "$preset"
done
