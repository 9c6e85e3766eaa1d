"""``attnreg_cpu`` needs little memory beside its tensors: attention nothing of the size of a band."""

from __future__ import annotations

import subprocess
import sys

import pytest

# Of a length L and a window W: what the peak of the process grows by, in MiB, when attention runs with gradients.
SCRIPT = """
import resource, sys, torch, attnreg
length, size = map(int, sys.argv[1:])
torch.set_num_threads(1)
def run(length, size):
    query, key, value = (torch.randn(1, 1, length, 16, requires_grad=True) for _ in range(3))
    out = attnreg.local_attention(query, key, value, attnreg.Window.causal(size), backend="attnreg_cpu")
    torch.autograd.grad(out, (query, key, value), torch.randn_like(out))
run(512, 32)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
run(length, size)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def growth(length, size):
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(length), str(size)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return float(done.stdout)


@pytest.mark.usefixtures("library_for_cpus")
def test_attention_holds_no_band_and_grows_with_the_length_alone():
    tensor, band = 32768 * 16 * 4 / 2**20, 32768 * 2048 * 4 / 2**20
    # Queries, keys, values, the output, its gradient and three more: 8 tensors of 2 MiB. The band would have 256.
    narrow, wide = growth(32768, 64), growth(32768, 2048)
    assert narrow < 20 * tensor < band / 4
    assert wide < narrow + 8 * tensor
