"""A script: compile the Hopper kernels for compute capability 9.0, which needs no GPU, and print what each uses.

One line a kernel: its name and case, registers, bytes of stack, bytes of shared memory. Run without TRITON_INTERPRET.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from pathlib import Path

import torch
import triton
from attnreg_triton.hopper import attention, attention_backward, band_average, band_dot, skew
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from attnreg import Window

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


class Hopper:
    """As much of a driver as compilation asks for."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0


def compile_instead(kernel, programs, tiles, *args, device, **constants):
    """In the place of ``launch``."""
    compiled = kernel.warmup(
        *args,
        **constants,
        BLOCK_M=tiles.rows,
        BLOCK_N=tiles.keys,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        grid=(programs,),
    )
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        dump = [os.fspath(CUOBJDUMP), "--dump-resource-usage", os.fspath(cubin)]
        usage = subprocess.run(dump, capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    print(kernel.__name__, case, registers, stack, compiled.metadata.shared, flush=True)


driver.set_active(Hopper())
for module in (attention, attention_backward, band_average, band_dot):
    module.launch = compile_instead
for head_dim, value_dim, size, lengths in (
    (64, 64, 16, None),
    (64, 64, 128, None),
    (64, 64, 512, torch.tensor([200])),
    (128, 128, 64, None),
    (128, 128, 512, None),
    (80, 40, 100, torch.tensor([200])),
):
    case = f"E={head_dim},D={value_dim},W={size},{'lengths' if lengths is not None else 'no-lengths'}"
    query = torch.empty(1, 4, 256, head_dim, dtype=torch.bfloat16)
    key = torch.empty(1, 2, 256, head_dim, dtype=torch.bfloat16)
    value = torch.empty(1, 2, 256, value_dim, dtype=torch.bfloat16)
    options = {"key_lengths": lengths, "scale": 0.125}
    output, log_sum_exp = attention.local_attention(query, key, value, Window.causal(size), **options)
    attention_backward.local_attention_backward(
        output, query, key, value, output, log_sum_exp, Window.causal(size), needs_grad=(True, True, True), **options
    )
BAND_CASES = (
    (torch.bfloat16, 64, 512, None),
    (torch.bfloat16, 128, 104, torch.tensor([200])),
    (torch.bfloat16, 64, 130, None),
    (torch.float16, 40, 129, torch.tensor([200])),
    (torch.float32, 64, 512, None),
    (torch.float32, 36, 136, torch.tensor([200])),
    (torch.float32, 36, 131, torch.tensor([200])),
    (torch.float32, 128, 128, None),
    (torch.float32, 72, 129, torch.tensor([200])),
)
for dtype, dim, size, lengths in BAND_CASES if skew.AVAILABLE else ():
    case = f"{dtype},E={dim},W={size},{'lengths' if lengths is not None else 'no-lengths'}"
    rows = torch.empty(1, 4, 256, dim, dtype=dtype)
    keys = torch.empty(1, 2, 256, dim, dtype=dtype)
    window = Window.centered(size)
    band = band_dot.band_dot(rows, keys, window, key_lengths=lengths, scale=0.125, fill=0.0)
    if size % 8 == 0 and (dtype != torch.float32 or dim <= 64):
        band_average.band_average(band, keys, window, key_lengths=lengths, scale=0.125)
