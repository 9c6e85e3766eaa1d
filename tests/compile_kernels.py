"""A script: compile Triton's kernels, which needs no GPU, and print what each uses.

``python compile_kernels.py hopper`` compiles the kernels for Hopper, for compute capability 9.0; ``python compile_kernels.py
every-gpu`` all others, for 8.9. One line a kernel: its name and case, registers, bytes of stack, bytes of shared memory. Run
without TRITON_INTERPRET.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from attnreg_triton import attention, attention_backward, band_average, band_average_transposed, band_dot, dot_product
from attnreg_triton import rows as rows_of_kernels
from attnreg_triton.hopper import attention as hopper_attention
from attnreg_triton.hopper import attention_backward as hopper_attention_backward
from attnreg_triton.hopper import band_average as hopper_band_average
from attnreg_triton.hopper import band_dot as hopper_band_dot
from attnreg_triton.hopper import skew
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from attnreg import Window

OFFSETS = torch.tensor([0, 100, 256])

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


class Driver:
    """As much of a driver as compilation asks for."""

    def __init__(self, capability):
        self.capability = capability

    def get_current_target(self):
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0


def compile_instead(kernel, programs, tiles, *args, device, **constants):
    """In the place of ``launch``."""
    if tiles.max_registers is not None:
        constants["maxnreg"] = tiles.max_registers
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


def compile_for_hopper():
    global case
    lengths = {"key_lengths": torch.tensor([200])}
    packed = {"cu_seqlens_q": OFFSETS}
    more = {"softcap": 30.0, "sinks": torch.empty(4)}
    for head_dim, value_dim, size, given, capped in (
        (64, 64, 16, {}, {}),
        (64, 64, 128, {}, {}),
        (64, 64, 128, packed, more),
        (64, 64, 512, lengths, {}),
        (128, 128, 64, {}, {}),
        (128, 128, 512, {}, {}),
        (128, 128, 512, packed | {"cu_seqlens_k": OFFSETS.clone()}, more),
        (80, 40, 100, lengths, {}),
    ):
        case = f"E={head_dim},D={value_dim},W={size},{'+'.join(given | capped) or 'nothing'}"
        query = torch.empty(1, 4, 256, head_dim, dtype=torch.bfloat16)
        key = torch.empty(1, 2, 256, head_dim, dtype=torch.bfloat16)
        value = torch.empty(1, 2, 256, value_dim, dtype=torch.bfloat16)
        window = Window.causal(size)
        options = {"rows": rows_of_kernels.place(256, 256, window, by_key=True, **given), "scale": 0.125, **capped}
        output, log_sum_exp = hopper_attention.local_attention(query, key, value, window, **options)
        hopper_attention_backward.local_attention_backward(
            output,
            query,
            key,
            value,
            output,
            log_sum_exp,
            window,
            grad_log_sum_exp=log_sum_exp if capped else None,
            needs_grad=frozenset({"query", "key", "value"} | (capped.keys() & {"sinks"})),
            **options,
        )
    of_sequences = lengths | {"key_starts": torch.tensor([5]), "query_starts": torch.tensor([5])}
    band_cases = (
        (torch.bfloat16, 64, 512, {}),
        (torch.bfloat16, 64, 512, {"cu_seqlens_q": OFFSETS}),
        (torch.bfloat16, 128, 104, of_sequences),
        (torch.bfloat16, 128, 104, {"cu_seqlens_q": OFFSETS}),
        (torch.bfloat16, 64, 130, {}),
        (torch.float16, 40, 129, lengths),
        (torch.float32, 64, 512, {}),
        (torch.float32, 64, 512, {"cu_seqlens_q": OFFSETS}),
        (torch.float32, 36, 136, of_sequences),
        (torch.float32, 36, 131, lengths),
        (torch.float32, 128, 128, {}),
        (torch.float32, 72, 129, {"cu_seqlens_q": OFFSETS}),
    )
    for dtype, dim, size, given in band_cases if skew.AVAILABLE else ():
        case = f"{dtype},E={dim},W={size},{'+'.join(given) or 'no-rows'}"
        rows = torch.empty(1, 4, 256, dim, dtype=dtype)
        keys = torch.empty(1, 2, 256, dim, dtype=dtype)
        window = Window.centered(size)
        band = torch.empty(1, 4, 256, size, dtype=dtype)
        place = rows_of_kernels.place(256, 256, window, **given)
        hopper_band_dot.band_dot(rows, keys, band, place, scale=0.125, fill=0.0)
        if size % 8 == 0 and (dtype != torch.float32 or dim <= 64):
            hopper_band_average.band_average(band, keys, rows, place, scale=0.125)


def compile_for_every_gpu():
    """What is largest: head dims of 128 and 256, with and without a bias, windows of every choice of tiles."""
    global case
    for dtype, size in ((torch.bfloat16, 64), (torch.float32, 16), (torch.float32, 32), (torch.float32, 64)):
        window = Window.causal(size)
        for dim in (128, 256):
            query = torch.empty(1, 4, 256, dim, dtype=dtype)
            key = torch.empty(1, 2, 256, dim, dtype=dtype)
            for bias in (None, torch.empty(1, 4, 256, size, dtype=dtype)):
                case = f"{dtype},E={dim},W={size},{'bias' if bias is not None else 'no-bias'}"
                options = {"bias": bias, "key_lengths": None, "scale": 0.125}
                output, log_sum_exp = attention.local_attention(query, key, key, window, **options)
                attention_backward.local_attention_backward(
                    output,
                    query,
                    key,
                    key,
                    output,
                    log_sum_exp,
                    window,
                    needs_grad=frozenset({"query", "key", "value"} | ({"bias"} if bias is not None else set())),
                    **options,
                )
                # Offsets that differ are what takes most.
                for given in ({}, {"cu_seqlens_q": OFFSETS, "cu_seqlens_k": OFFSETS.clone()}) if size == 64 else ({},):
                    case = f"{dtype},E={dim},W={size},{'bias' if bias is not None else 'no-bias'},{'+'.join(given) or 'no-rows'}"
                    scores = dot_product.local_dot_product(query, key, window, **options, **given)
                    dot_product.local_dot_product_backward(
                        scores, query, key, window, needs_grad=frozenset({"query", "key"}), **options, **given
                    )
    for dtype in (torch.bfloat16, torch.float32):
        compile_what_else_attention_takes(dtype)


def compile_what_else_attention_takes(dtype):
    """A packed call with a softcap and sinks, one with dropout, and one with all that there is and offsets that differ."""
    global case
    heads, size = 4, 64
    capped = {"softcap": 30.0, "sinks": torch.empty(heads)}
    dropping = {"dropout_p": 0.1, "seed": torch.zeros(1, dtype=torch.int64)}
    packed = {"cu_seqlens_q": OFFSETS}
    bias = torch.empty(1, heads, 256, size, dtype=dtype)
    everything = capped | dropping | packed | {"cu_seqlens_k": OFFSETS.clone(), "bias": bias}
    for dim, given in ((128, capped | packed), (128, dropping), (256, everything)):
        case = f"{dtype},E={dim},W={size},{'+'.join(given)}"
        query = torch.empty(1, heads, 256, dim, dtype=dtype)
        key = torch.empty(1, heads // 2, 256, dim, dtype=dtype)
        options = {"bias": None, "scale": 0.125} | given
        output, log_sum_exp = attention.local_attention(query, key, key, Window.causal(size), **options)
        attention_backward.local_attention_backward(
            output,
            query,
            key,
            key,
            output,
            log_sum_exp,
            Window.causal(size),
            grad_log_sum_exp=None if given is dropping else torch.empty(1, heads, 256),
            needs_grad=frozenset({"query", "key", "value"} | (given.keys() & {"bias", "sinks"})),
            **options,
        )


KERNELS = {
    "hopper": (
        compile_for_hopper,
        90,
        (hopper_attention, hopper_attention_backward, hopper_band_average, hopper_band_dot, rows_of_kernels),
    ),
    "every-gpu": (
        compile_for_every_gpu,
        89,
        (attention, attention_backward, band_average, band_average_transposed, band_dot, rows_of_kernels),
    ),
}
compile_them, capability, modules = KERNELS[sys.argv[1]]
driver.set_active(Driver(capability))
for module in modules:
    module.launch = compile_instead
compile_them()
