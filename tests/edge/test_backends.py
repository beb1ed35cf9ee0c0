"""Which threads the native kernels run on."""

import re
import subprocess
import sys

import pytest

from fedspine_edge import backends

PROGRAM = """
import sys, torch
from pathlib import Path
from fedspine_edge import kernels
torch.set_num_threads(2)
x = torch.ones(512, 256)
kernels.lora_linear(x, kernels.pack(torch.ones(256, 256)), bias=None, lora_a=None, lora_b=None, scaling=1.0)
print(len(list(Path("/proc/self/task").iterdir())))
sys.stdout.write(Path("/proc/self/maps").read_text())
"""


@pytest.mark.slow
@pytest.mark.skipif("native" not in backends.BACKENDS, reason="threads are the native kernels'")
def test_the_kernels_run_on_torchs_own_pool():
    done = subprocess.run([sys.executable, "-c", PROGRAM], check=True, capture_output=True, text=True)
    threads, maps = done.stdout.split("\n", 1)
    assert int(threads) > 1
    pools = set(re.findall(r"/\S*/lib(?:gomp|omp|iomp5)[^/\s]*", maps))
    assert len(pools) == 1
    assert "/torch" in pools.pop()
