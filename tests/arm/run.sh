#!/bin/sh
# The kernels on AArch64, emulated: C++ tests built by clang and by gcc, and every Python kernel test on torch's own
# aarch64 build, for the oldest core a Jetson has (cortex-a57, ARMv8.0) and for all that the emulator knows (max).
#   sh tests/arm/run.sh    what it needs it installs (tools.sh) and keeps in the cache (root.sh)
set -eu
cd "$(dirname "$0")/../.."
sh tests/arm/tools.sh
ROOT=$(sh tests/arm/root.sh)
SITE=$PWD/build/arm/site
export ROOT SITE
PATH="$PWD/.venv/bin:$PATH"

# A kernel test forces instruction sets, so this finds those of kernels yet to come.
kernel_tests=$(grep -lE 'use_isa\(|each_backend' tests/edge/test_*.py)

for cpu in cortex-a57 max; do
  QEMU_CPU=$cpu sh tests/csrc/run.sh aarch64 aarch64-gcc
done

# The extension, as a device gets it: for ARMv8.0, against the headers of the root's Python.
cmake -S . -B build/arm/extension -G Ninja --toolchain cmake/toolchain-aarch64.cmake \
  -DCMAKE_BUILD_TYPE=Release -DFEDSPINE_WERROR=ON -DPYTHON_MODULE_EXTENSION=.cpython-311-aarch64-linux-gnu.so \
  -DPython_INCLUDE_DIR="$ROOT/opt/include/python3.11" -DCMAKE_CXX_FLAGS="-march=armv8-a -mtune=cortex-a57 -isystem $ROOT/opt/include" \
  -Dpybind11_DIR="$(python -m pybind11 --cmakedir)" >/dev/null
cmake --build build/arm/extension
rm -rf "$SITE"
mkdir -p "$SITE/fedspine_edge"
ln -s "$PWD"/python/fedspine_edge/* "$PWD"/build/arm/extension/_native.*.so "$SITE/fedspine_edge/"

# Without SVE: our kernels use none, torch's references would, and qemu takes four times as long over it.
for cpu in cortex-a57 max,sve=off; do
  CPU=$cpu sh tests/arm/python.sh -m pytest $kernel_tests
done

python benchmarks/arm_gates.py
python benchmarks/arm_schedule.py
