"""The Hopper kernels compile with the Triton that is installed, on a machine without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

# What two programs to a multiprocessor leave to each, and the bytes of spilled registers that are bearable.
SHARED_MEMORY_BYTES = 113 * 2**10
STACK_BYTES = 128


def test_the_hopper_kernels_compile_and_fit_twice_into_a_multiprocessor():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("compile_for_hopper.py")
    run = subprocess.run([sys.executable, os.fspath(script)], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    kernels = [line.split() for line in run.stdout.splitlines()]
    assert len(kernels) == 18
    assert {kernel for kernel, *_ in kernels} == {"_attention", "_attention_backward_rows", "_attention_backward_keys"}
    for kernel, case, registers, stack, shared in kernels:
        assert int(registers) <= 255, (kernel, case)
        assert int(stack) <= STACK_BYTES, (kernel, case)
        assert int(shared) <= SHARED_MEMORY_BYTES, (kernel, case)
