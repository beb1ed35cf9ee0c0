#!/bin/sh
# The Python of the arm64 root, in qemu: CPU=cortex-a57 ROOT=DIR SITE=DIR sh tests/arm/python.sh ARGUMENT...
# SITE comes first on its path, then the root's wheels; whatever is not in the root is found in this machine's files.
set -eu
exec qemu-aarch64 -cpu "$CPU" -L "$ROOT" -E PYTHONHOME="$ROOT/usr" -E PYTHONPATH="$SITE:$ROOT/opt/wheels" \
  -E OMP_NUM_THREADS=1 -E OPENBLAS_NUM_THREADS=1 "$ROOT/usr/bin/python3.11" "$@"
