"""What rows, sinks, a soft cap, dropout and the log-sum-exp cost over a plain call, and packed calls beside other libraries.

``python -m attnreg_benchmarks.features --json FILE`` needs a GPU. All that is compared is measured in turns, in one run:
replays of CUDA graphs, cold cache, forward and backward apart. The libraries get what they need beforehand: FlexAttention its
block mask, FlashAttention the longest length, neither of which is counted.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from attnreg import Window, local_attention, local_attention_with_lse
from attnreg.measuring.timing import measure, measuring_stream
from attnreg.printable import trouble
from attnreg_benchmarks.machine import environment
from attnreg_benchmarks.results import command_line, now, write

SECONDS = 0.03
TURNS = 3
SETS = 3
# N, H, Hkv, L, E
SIZES = ((4, 16, 16, 8192, 64), (4, 16, 16, 8192, 128))
WINDOWS = (64, 128, 1024)
DOCUMENTS, DOCUMENT_LENGTH = 16, 4096
MEAN_LENGTH = 512

Calls = dict[str, list[Callable[[], object]]]
# Of query, key and value, with which gradients are wanted.
Attend = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]]


def calls_of(attend: Attend, shapes: Mapping[str, tuple[int, ...]], more: Mapping[str, Tensor]) -> Calls:
    """The forward and the backward of independent sets of tensors; ``more`` are tensors with gradients beside the three."""
    found: Calls = {"forward": [], "backward": []}
    for _ in range(SETS):
        tensors = [torch.randn(shape, dtype=torch.bfloat16, device="cuda") for shape in shapes.values()]
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        results = attend(*leaves)
        upstream = [torch.randn_like(result) for result in results]

        def forward(tensors: list[Tensor] = tensors) -> object:
            with torch.no_grad():
                return attend(*tensors)

        def backward(
            results: tuple[Tensor, ...] = results, leaves: list[Tensor] = leaves, upstream: list[Tensor] = upstream
        ) -> object:
            return torch.autograd.grad(results, [*leaves, *more.values()], upstream, retain_graph=True)

        found["forward"].append(forward)
        found["backward"].append(backward)
    return found


def compare(contenders: Mapping[str, Callable[[], Calls]], first: str) -> dict[str, Any]:
    """Microseconds of each, and their ratio to the ``first``; or the reason why there are none."""
    device = torch.device("cuda", torch.cuda.current_device())
    found: dict[str, Any] = {}
    with measuring_stream(device):
        ready: dict[str, Calls] = {}
        for name, make in contenders.items():
            try:
                ready[name] = make()
                for each in ready[name].values():
                    each[0]()
                torch.cuda.synchronize()
            except Exception as error:
                ready.pop(name, None)
                found[name] = trouble(error)
        for direction in ("forward", "backward"):
            times: dict[str, list[float]] = {name: [] for name in ready}
            for _ in range(TURNS):
                for name, calls in ready.items():
                    times[name].append(measure(calls[direction], device, seconds=SECONDS).median * 1e6)
            medians = {name: statistics.median(samples) for name, samples in times.items()}
            for name, median in medians.items():
                found.setdefault(name, {})[direction] = {
                    "us": round(median, 1),
                    "ratio": round(median / medians[first], 3),
                }
    return found


def attention(window: Window, backend: str, **given: Any) -> Attend:
    """A call of attnreg with these arguments."""

    def attend(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        return (local_attention(query, key, value, window, backend=backend, **given),)

    return attend


def with_lse(window: Window, backend: str) -> Attend:
    """The same, and its log-sum-exp, of which there is an incoming gradient too."""

    def attend(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        return local_attention_with_lse(query, key, value, window, backend=backend)

    return attend


def one_by_one(sizes: tuple[int, int, int, int, int], size: int, backend: str) -> dict[str, Callable[[], Calls]]:
    """A plain call, and one with each of the arguments."""
    batch, heads, kv_heads, length, dim = sizes
    window = Window.causal(size)
    shapes = {name: (batch, count, length, dim) for name, count in (("q", heads), ("k", kv_heads), ("v", kv_heads))}
    whole = torch.full((batch,), length, device="cuda")
    sinks = torch.randn(heads, device="cuda", requires_grad=True)
    seed = torch.tensor([20], device="cuda")
    given: dict[str, dict[str, Any]] = {
        "plain": {},
        "key_lengths": {"key_lengths": whole},
        "key_starts": {"key_starts": torch.zeros_like(whole)},
        "query_starts": {"query_starts": torch.zeros_like(whole)},
        "sinks": {"sinks": sinks},
        "softcap": {"softcap": 50.0},
        "dropout": {"dropout_p": 0.1, "seed": seed},
    }

    def make(arguments: dict[str, Any]) -> Callable[[], Calls]:
        more = {"sinks": sinks} if "sinks" in arguments else {}
        return lambda: calls_of(attention(window, backend, **arguments), shapes, more)

    found = {name: make(arguments) for name, arguments in given.items()}
    found["log-sum-exp"] = lambda: calls_of(with_lse(window, backend), shapes, {})
    return found


def flex(window: Window, documents: Tensor | None, length: int) -> Attend:
    """FlexAttention, compiled, with a block mask of the window and of documents (T,)."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def visible(_: Tensor, __: Tensor, i: Tensor, j: Tensor) -> Tensor:
        inside = (j <= i + window.right) & (j >= i - window.left)
        return inside if documents is None else inside & (documents[i] == documents[j])

    mask = create_block_mask(visible, None, None, length, length, device="cuda")
    compiled: Any = torch.compile(flex_attention, dynamic=False)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        grouped = query.shape[1] != key.shape[1]
        return (compiled(query, key, value, block_mask=mask, enable_gqa=grouped),)

    return attend


def flex_with_sinks(window: Window, length: int, sinks: Tensor) -> Attend:
    """The same with sinks: the output times what they leave of the denominator."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def visible(_: Tensor, __: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j <= i + window.right) & (j >= i - window.left)

    mask = create_block_mask(visible, None, None, length, length, device="cuda")

    def attend_eagerly(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        grouped = query.shape[1] != key.shape[1]
        output, lse = flex_attention(query, key, value, block_mask=mask, enable_gqa=grouped, return_lse=True)
        return output * torch.sigmoid(lse - sinks[:, None]).unsqueeze(-1).to(output.dtype)

    compiled: Any = torch.compile(attend_eagerly, dynamic=False)
    return lambda query, key, value: (compiled(query, key, value),)


class _FlashOfTorch(torch.autograd.Function):
    """FlashAttention 2 as torch carries it, of (T, H, E)."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, packed: tuple[Any, ...], window: Window) -> Tensor:
        ctx.common, ctx.sides = (
            (*packed, 0.0, False),
            {"window_size_left": window.left, "window_size_right": window.right},
        )
        attend = torch.ops.aten._flash_attention_forward
        output, log_sum_exp, state, unused, _ = attend(query, key, value, *ctx.common, False, **ctx.sides)
        ctx.save_for_backward(query, key, value, output, log_sum_exp)
        ctx.random = (state, unused)
        return output  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        backward = torch.ops.aten._flash_attention_backward
        return (*backward(*grads, *ctx.saved_tensors, *ctx.common, *ctx.random, **ctx.sides), None, None)


def flash_of_torch(window: Window, offsets: Tensor, longest: int) -> Attend:
    """torch's FlashAttention 2 with packed sequences."""
    packed = (offsets, offsets, longest, longest)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        rows = [tensor[0].transpose(0, 1) for tensor in (query, key, value)]
        output: Tensor = _FlashOfTorch.apply(*rows, packed, window)  # type: ignore[no-untyped-call]
        return (output.transpose(0, 1)[None],)

    return attend


def flash4(window: Window, offsets: Tensor | None, longest: int, sinks: Tensor | None = None) -> Attend:
    """FlashAttention 4."""
    from flash_attn.cute import flash_attn_func, flash_attn_varlen_func

    sides = {"window_size": (window.left, window.right)}
    given = sides if sinks is None else {**sides, "learnable_sink": sinks}

    def attend(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        rows = [tensor.transpose(1, 2) for tensor in (query, key, value)]
        if offsets is None:
            output = flash_attn_func(*rows, **given)
            return ((output[0] if isinstance(output, tuple) else output).transpose(1, 2),)
        packed = {"cu_seqlens_q": offsets, "cu_seqlens_k": offsets, "max_seqlen_q": longest, "max_seqlen_k": longest}
        output = flash_attn_varlen_func(*[tensor[0] for tensor in rows], **packed, **given)
        return ((output[0] if isinstance(output, tuple) else output).transpose(0, 1)[None],)

    return attend


def packed(heads: int, dim: int, size: int, lengths: list[int], backend: str) -> dict[str, Callable[[], Calls]]:
    """Documents of these lengths packed into one, beside a dense call of as many tokens, and other libraries."""
    window = Window.causal(size)
    total, longest = sum(lengths), max(lengths)
    offsets = torch.tensor([0, *lengths], device="cuda").cumsum(0).int()
    documents = torch.repeat_interleave(torch.arange(len(lengths), device="cuda"), torch.tensor(lengths, device="cuda"))
    dense = dict.fromkeys("qkv", (DOCUMENTS, heads, total // DOCUMENTS, dim))
    one = dict.fromkeys("qkv", (1, heads, total, dim))
    return {
        "dense": lambda: calls_of(attention(window, backend), dense, {}),
        "packed": lambda: calls_of(attention(window, backend, cu_seqlens_q=offsets), one, {}),
        "flex": lambda: calls_of(flex(window, documents, total), one, {}),
        "flash (torch)": lambda: calls_of(flash_of_torch(window, offsets, longest), one, {}),
        "flash-attn-4": lambda: calls_of(flash4(window, offsets, longest), one, {}),
    }


def gpt_oss(backend: str) -> dict[str, Callable[[], Calls]]:
    """Sinks and grouped heads in the sizes of gpt-oss."""
    batch, heads, kv_heads, length, dim = 2, 64, 8, 8192, 64
    window = Window.causal(128)
    sinks = torch.randn(heads, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    shapes = {name: (batch, count, length, dim) for name, count in (("q", heads), ("k", kv_heads), ("v", kv_heads))}
    more = {"sinks": sinks}
    return {
        "attnreg": lambda: calls_of(attention(window, backend, sinks=sinks), shapes, more),
        "flex": lambda: calls_of(flex_with_sinks(window, length, sinks), shapes, more),
        "flash-attn-4": lambda: calls_of(flash4(window, None, length, sinks), shapes, more),
    }


def random_lengths(total: int) -> list[int]:
    """Lengths from 1 to twice the mean but one, that add up to ``total``."""
    source, found = random.Random(0), list[int]()
    while sum(found) < total:
        # The mean of the smaller of two is a third of the largest, that of one its half: this one's is a quarter.
        found.append(max(round(4 * MEAN_LENGTH * source.random() * source.random()), 1))
    found[-1] -= sum(found) - total
    return found


def lines(backend: str) -> Iterator[tuple[str, dict[str, Callable[[], Calls]], str]]:
    """What is compared: its name, the contenders, and which of them the others are compared with."""
    for sizes, size in product(SIZES, WINDOWS):
        yield f"{sizes}, W={size}", one_by_one(sizes, size, backend), "plain"
    alike = [DOCUMENT_LENGTH] * DOCUMENTS
    for (_, heads, _, _, dim), size in product(SIZES, WINDOWS):
        for what, lengths in (("alike", alike), ("random", random_lengths(sum(alike)))):
            name = f"packed, {len(lengths)} documents, {what}: H={heads} E={dim}, W={size}"
            yield name, packed(heads, dim, size, lengths, backend), "dense"
    yield "gpt-oss (2, 64, 8, 8192, 64), W=128, sinks", gpt_oss(backend), "attnreg"


def main(
    json_file: Annotated[Path, typer.Option("--json", metavar="FILE", help="Where the results go.")],
    backend: Annotated[str, typer.Option(help="Which backend.")] = "triton",
    only: Annotated[str, typer.Option(help="Lines whose names have this in them.")] = "",
) -> None:
    """Measure all, print the ratios and store everything."""
    if not torch.cuda.is_available():
        raise typer.BadParameter("this needs a GPU, and torch has no CUDA device")
    device = torch.device("cuda", torch.cuda.current_device())
    rows = []
    for name, contenders, first in lines(backend):
        if only not in name:
            continue
        # FlexAttention is compiled for each line, more often than torch lets one function be.
        torch._dynamo.reset()
        compared = compare(contenders, first)
        rows.append({"name": name, "times": compared})
        print(name, flush=True)
        for contender, times in compared.items():
            print(f"  {contender:16}", times, flush=True)
        stored = {"date": now(), "environment": asdict(environment(device)), "backend": backend, "rows": rows}
        write({**stored, "command": command_line("attnreg_benchmarks.features", json_file)}, json_file)


if __name__ == "__main__":
    typer.run(main)
