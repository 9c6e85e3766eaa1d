"""The Hopper kernels compile with the Triton that is installed, on a machine without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

from triton.experimental import gluon

# What two programs to a multiprocessor leave to each, and the bytes of spilled registers that are bearable: measured, the
# worst of them (fp32, head dim 128, windows of odd size) is still 1.4 times as fast as the kernel for every GPU.
SHARED_MEMORY_BYTES = 113 * 2**10
STACK_BYTES = 384


def test_the_hopper_kernels_compile_and_fit_twice_into_a_multiprocessor():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("compile_for_hopper.py")
    run = subprocess.run([sys.executable, os.fspath(script)], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    kernels = [line.split() for line in run.stdout.splitlines()]
    compiled = Counter(kernel for kernel, *_ in kernels)
    attention = ("_attention", "_attention_backward_rows", "_attention_backward_keys")
    expected = dict.fromkeys(attention, 6)
    if hasattr(gluon.language.shared_memory_descriptor, "_reinterpret"):
        expected |= {"_band_dot": 9, "_band_average": 4}
    assert compiled == expected
    for kernel, case, registers, stack, shared in kernels:
        assert int(registers) <= 255, (kernel, case)
        assert int(stack) <= STACK_BYTES, (kernel, case)
        assert int(shared) <= SHARED_MEMORY_BYTES, (kernel, case)
