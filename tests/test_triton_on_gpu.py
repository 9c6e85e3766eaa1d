"""What the triton backend promises beside right values: no memory beyond its results, no compilation per window."""

from __future__ import annotations

import pytest
import torch

import attnreg
from attnreg import Window

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

# What the allocator rounds up, and descriptors and the like.
SLACK_BYTES = 2 * 2**20


def attention_inputs(length: int, head_dim: int = 64, heads: int = 8, dtype: torch.dtype = torch.bfloat16):
    return [torch.randn(1, heads, length, head_dim, device="cuda", dtype=dtype, requires_grad=True) for _ in range(3)]


@pytest.mark.parametrize("window", [Window.causal(16), Window.centered(129), Window.causal(1024)], ids=str)
@pytest.mark.parametrize(("dtype", "head_dim"), [(torch.bfloat16, 64), (torch.bfloat16, 192), (torch.float32, 64)])
def test_fused_attention_allocates_its_results_and_a_few_numbers_a_row(dtype, head_dim, window):
    """Forward: the output and the log-sum-exp. Backward: the gradients and O(N H L), however wide the window."""
    query, key, value = attention_inputs(16384, head_dim, dtype=dtype)
    rows_bytes = query.shape[1] * query.shape[2] * 4
    tensor_bytes = query.numel() * query.element_size()
    grad = torch.randn_like(query)

    def run():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        output = attnreg.local_attention(query, key, value, window, backend="triton")
        forward = torch.cuda.max_memory_allocated() - before
        torch.cuda.reset_peak_memory_stats()
        between = torch.cuda.memory_allocated()
        gradients = torch.autograd.grad(output, (query, key, value), grad)
        backward = torch.cuda.max_memory_allocated() - between
        del gradients
        return forward, backward

    run()
    forward, backward = run()
    assert forward <= tensor_bytes + rows_bytes + SLACK_BYTES
    assert backward <= 3 * tensor_bytes + 2 * rows_bytes + SLACK_BYTES


@pytest.mark.parametrize("op", ["local_dot_product", "local_weighted_average", "local_attention"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_another_window_of_the_same_class_compiles_nothing(op, dtype, monkeypatch):
    from triton import knobs

    compiled = []
    monkeypatch.setattr(knobs.runtime, "jit_post_compile_hook", lambda **made: compiled.append(made["repr"]))

    def run(length, window):
        query, key, value = attention_inputs(length, heads=2, dtype=dtype)
        if op == "local_dot_product":
            result = attnreg.local_dot_product(query, key, window, backend="triton")
        elif op == "local_weighted_average":
            weights = torch.randn(1, 2, length, window.size, device="cuda", dtype=dtype, requires_grad=True)
            result = attnreg.local_weighted_average(weights, value, window, backend="triton")
        else:
            result = attnreg.local_attention(query, key, value, window, backend="triton")
        result.backward(torch.randn_like(result))

    # A class also says how far the rows of a band are aligned: here to 16 bytes, below to nothing.
    for first, others in ((104, (112, 120, 128)), (101, (103, 105, 127))):
        run(512, Window.causal(first))
        compiled.clear()
        for length, size in zip((512, 1000, 777), others):
            run(length, Window(size - 50, 49))
        assert compiled == []
