#!/bin/sh
# Builds the wheels of a release into dist/: for x86-64 and AArch64, of this Python's version, for any Linux with glibc
# 2.17 or newer (every L4T since r28). auditwheel names what a wheel needs and refuses one that needs more; then each is
# installed alone and computes a layer, AArch64's in qemu as a Cortex-A57.
#   sh cmake/wheels.sh     needs .venv and .venv-wheels (make wheels)
set -eu
cd "$(dirname "$0")/.."
top=$PWD
glibc=2.17
tools=$top/.venv-wheels/bin
work=$top/build/wheels
sh tests/arm/tools.sh
root=$(sh tests/arm/root.sh)
rm -rf "$work"
mkdir -p "$work" dist
rm -f dist/*.whl

version=$(.venv/bin/python -c 'import sys; print(f"{sys.version_info[0]}.{sys.version_info[1]}")')
[ "$version" = 3.11 ] || { echo "error: expected Python 3.11, which the emulated board has, found $version" >&2; exit 1; }

# Headers for a compiler with a C library of its own: Debian's pyconfig.h stands in a directory of the architecture's.
here=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("include"))')
mkdir -p "$work/include/x86_64-linux-gnu"
cp -r "$here" "$work/include/python$version"
[ ! -d "/usr/include/x86_64-linux-gnu/python$version" ] ||
  cp -r "/usr/include/x86_64-linux-gnu/python$version" "$work/include/x86_64-linux-gnu/"

wheel() { # ARCHITECTURE HEADERS FLAGS
  compiler=$work/c++-$1
  cat >"$compiler" <<COMPILER
#!/bin/sh
exec "$tools/python" -m ziglang c++ -target $1-linux-gnu.$glibc -fno-sanitize=undefined "\$@"
COMPILER
  chmod +x "$compiler"
  echo "wheel for $1" >&2
  CMAKE_ARGS="-DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=$1 -DCMAKE_CXX_COMPILER=$compiler \
    -DPYTHON_MODULE_EXTENSION=.cpython-311-$1-linux-gnu.so -DPython_INCLUDE_DIR=$2/python$version \
    -DCMAKE_INTERPROCEDURAL_OPTIMIZATION=OFF '-DCMAKE_CXX_FLAGS=$3 -isystem $2'" \
    _PYTHON_HOST_PLATFORM=linux-$1 PATH="$top/.venv/bin:$PATH" \
    .venv/bin/python -m pip --quiet --disable-pip-version-check wheel --no-cache-dir --no-deps --no-build-isolation \
    -Cbuild-dir="$work/build-$1" -w "$work/$1" .
  PATH="$tools:$PATH" "$tools/python" -m auditwheel repair --plat auto -w dist "$work/$1"/*.whl
}
wheel x86_64 "$work/include" "-mcpu=x86_64"
wheel aarch64 "$root/opt/include" "-mcpu=cortex_a57-aes-sha2"

# Each alone on its path, without the checkout's sources: it has to be the wheel that passes the kernel tests.
for architecture in x86_64 aarch64; do
  name=$(basename dist/*"$architecture".whl)
  case $name in *manylinux_2_17_"$architecture".whl) ;; *) echo "error: expected a wheel for glibc $glibc, found $name" >&2; exit 1 ;; esac
  site=$work/site-$architecture
  .venv/bin/python -m zipfile -e "dist/$name" "$site"
  try="import sys, pytest, fedspine_edge; assert fedspine_edge.__file__.startswith('$site'), fedspine_edge.__file__
sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', 'tests/edge/test_kernels.py']))"
  echo "trying $name" >&2
  if [ "$architecture" = x86_64 ]; then
    packages=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    PYTHONPATH="$site:$packages" .venv/bin/python -S -c "$try"
  else
    CPU=cortex-a57 ROOT=$root SITE=$site sh tests/arm/python.sh -c "$try"
  fi
done
ls -l dist
