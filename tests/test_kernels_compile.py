"""The kernels compile with the Triton that is installed, on a machine without a GPU, and fit the memory that is meant for them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

from triton.experimental import gluon

# What every GPU since Ampere has for a program.
LEAST_SHARED_MEMORY_BYTES = 99 * 2**10
# What two programs to a multiprocessor leave to each, and the bytes of spilled registers that are bearable: measured, the
# worst of them (fp32, head dim 128, windows of odd size) is still 1.4 times as fast as the kernel for every GPU.
SHARED_MEMORY_BYTES = 113 * 2**10
STACK_BYTES = 384

ATTENTION = ("_attention", "_attention_backward_rows", "_attention_backward_keys")


def compiled(which):
    """Name, case, registers, bytes of stack and of shared memory of every kernel."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("compile_kernels.py")
    run = subprocess.run([sys.executable, os.fspath(script), which], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    lines = [line.split() for line in run.stdout.splitlines()]
    return [(kernel, case, *map(int, used)) for kernel, case, *used in lines]


def test_the_hopper_kernels_compile_and_fit_twice_into_a_multiprocessor():
    kernels = compiled("hopper")
    expected = dict.fromkeys(ATTENTION, 8) | {"_tables": 2}
    if hasattr(gluon.language.shared_memory_descriptor, "_reinterpret"):
        expected |= {"_band_dot": 12, "_band_average": 7, "_tables": 6}
    assert Counter(kernel for kernel, *_ in kernels) == expected
    for kernel, case, registers, stack, shared in kernels:
        assert registers <= 255, (kernel, case)
        assert stack <= STACK_BYTES, (kernel, case)
        assert shared <= SHARED_MEMORY_BYTES, (kernel, case)


def test_the_other_kernels_compile_and_fit_every_gpu():
    kernels = compiled("every-gpu")
    products = ("_band_dot", "_band_average", "_band_average_transposed")
    expected = dict.fromkeys(products, 24) | {"_tables": 24}
    # With a bias each is launched a second time; in fp32 and with dropout the one of the rows, but where a step holds all keys.
    expected |= {"_attention": 32, "_attention_backward_rows": 40, "_attention_backward_keys": 32}
    assert Counter(kernel for kernel, *_ in kernels) == expected
    for kernel, case, _, _, shared in kernels:
        assert shared <= LEAST_SHARED_MEMORY_BYTES, (kernel, case)
