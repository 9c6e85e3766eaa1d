"""Programs with open sizes: what is exported, or compiled for all lengths, serves every length and every order in memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from running import runs
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim, export
from torch.fx.experimental.proxy_tensor import make_fx

import attnreg
from attnreg import Window, band_from_dense

WINDOW = Window(5, 2)
TRACED = (2, 9)
# Batch sizes and lengths: longer than the window, as long, shorter, and one.
SIZES = ((3, 20), (2, 8), (2, 4), (1, 2), (1, 1))

# The op's tensors as models keep them, by the module below: (N, L, heads, sizes).
TENSORS = {
    "local_attention_with_lse": ("query", "key", "value"),
    "LocalAttention": ("query", "key", "value"),
    "local_dot_product": ("query", "key"),
    "local_weighted_average": ("weights", "value"),
}
HEADS = {"query": (4, 8), "key": (2, 8), "value": (2, 8), "weights": (4, WINDOW.size)}


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def everything(batch: int, length: int) -> dict[str, Any]:
    return {
        "bias": random(batch, 1, length, WINDOW.size),
        "key_lengths": torch.arange(batch) % (length + 1),
        "softcap": 1.5,
        "sinks": random(4),
        "scale": 0.3,
        "dropout_p": 0.4,
        "seed": torch.tensor([7]),
    }


# Of a batch size and a length.
EXAMPLES: Mapping[str, Any] = {
    "nothing": lambda batch, length: {},
    "everything": everything,
    "starts": lambda batch, length: {
        "key_starts": torch.arange(batch).int() % length,
        "query_starts": torch.arange(batch) - 1,
    },
    "packed": lambda batch, length: {"cu_seqlens_q": torch.tensor([0, length // 2, length // 2, length])},
    "bias of rows": lambda batch, length: {"bias": random(length, WINDOW.size)},
}
TAKEN = {
    "local_attention_with_lse": EXAMPLES,
    "LocalAttention": ("nothing", "starts", "packed"),
    "local_dot_product": ("nothing", "starts", "packed", "bias of rows"),
    "local_weighted_average": ("nothing", "starts", "packed"),
}


def heads_first(tensor: Tensor) -> Tensor:
    return tensor.transpose(1, 2).contiguous()


def lengths_first(tensor: Tensor) -> Tensor:
    return tensor.transpose(1, 2)


def packed_projections(tensor: Tensor) -> Tensor:
    return torch.cat([tensor] * 3, dim=-1)[..., tensor.shape[-1] : 2 * tensor.shape[-1]].transpose(1, 2)


def folded(tensor: Tensor) -> Tensor:
    """One sequence of all tokens."""
    return tensor.flatten(0, 1).transpose(0, 1)[None]


def expanded(tensor: Tensor) -> Tensor:
    return tensor.transpose(1, 2)[:, :1].expand(-1, tensor.shape[2], -1, -1)


ORDERS = [heads_first, lengths_first, packed_projections, folded, expanded]


class Model(nn.Module):
    """Attention of tensors (N, L, heads, sizes), joined to (N, L, all heads), as layers of models have it."""

    def __init__(self, op: str, order: Any = lengths_first, backend: str | None = None) -> None:
        super().__init__()
        self.order, self.backend = order, backend
        self.op = getattr(attnreg, op) if op != "LocalAttention" else attnreg.LocalAttention(WINDOW, backend=backend)

    def forward(self, tensors, given):
        batch, length = tensors[0].shape[:2]
        tensors = [self.order(tensor) for tensor in tensors]
        if isinstance(self.op, nn.Module):
            found = self.op(*tensors, **given)
        else:
            found = self.op(*tensors, WINDOW, **given, backend=self.backend)
        first, *others = found if isinstance(found, tuple) else (found,)
        joined = first.transpose(1, 2).reshape(batch, length, -1)
        return [joined.contiguous(), first.flatten(), *others]


def inputs_of(op: str, example: str, batch: int, length: int) -> tuple[list[Tensor], dict[str, Any]]:
    if example == "packed":
        batch = 1
    return [random(batch, length, *HEADS[name]) for name in TENSORS[op]], EXAMPLES[example](batch, length)


def open_sizes(op: str, example: str) -> tuple[Any, Any]:
    """Which sizes of ``inputs_of`` are open."""
    length, batch = Dim("length", min=1, max=4096), Dim("batch", min=1, max=64)
    first = {} if example == "packed" else {0: batch}
    tensors, given = inputs_of(op, example, *TRACED)
    of_given: dict[str, Any] = {name: {} if isinstance(each, Tensor) else None for name, each in given.items()}
    for name in of_given:
        if name in ("key_lengths", "key_starts", "query_starts"):
            of_given[name] = first
        if name == "bias":
            of_given[name] = {**(first if given[name].dim() == 4 else {}), given[name].dim() - 2: length}
    return [{**first, 1: length} for _ in tensors], of_given


def assert_serves(program: Any, model: nn.Module, op: str, example: str) -> None:
    for sizes in SIZES:
        found, expected = (each(*inputs_of(op, example, *sizes)) for each in (program, model))
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, msg=lambda text, sizes=sizes: f"{sizes}: {text}")


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(("op", "example"), [(op, example) for op in TENSORS for example in TAKEN[op]])
def test_an_export_serves_every_length_whatever_a_call_gives(op, example, strict):
    model = Model(op)
    program = export(model, inputs_of(op, example, *TRACED), dynamic_shapes=open_sizes(op, example), strict=strict)
    assert_serves(program.module(), model, op, example)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("order", ORDERS, ids=lambda order: order.__name__)
@pytest.mark.parametrize("op", ["local_attention", "local_dot_product", "local_weighted_average"])
def test_an_export_serves_every_order_in_memory(op, order, strict):
    model, name = Model(op, order), "local_attention_with_lse" if op == "local_attention" else op
    dims, inputs = open_sizes(name, "nothing"), inputs_of(name, "nothing", *TRACED)
    program = export(model, inputs, dynamic_shapes=dims, strict=strict)
    assert_serves(program.module(), model, name, "nothing")


@pytest.mark.parametrize(("backend", "device", "dtype"), runs(torch.float32))
def test_an_export_serves_every_length_on_each_backend(backend, device, dtype):
    op = "local_attention_with_lse"
    model = Model("local_attention", folded, backend)

    def on_device(*sizes):
        tensors, _ = inputs_of(op, "nothing", *sizes)
        return [tensor.to(device, dtype) for tensor in tensors], {}

    dims = open_sizes(op, "nothing")
    program = export(model, on_device(*TRACED), dynamic_shapes=dims, strict=False).module()
    for sizes in SIZES:
        torch.testing.assert_close(program(*on_device(*sizes)), model(*on_device(*sizes)))


@pytest.mark.parametrize("order", [lengths_first, folded], ids=lambda order: order.__name__)
@pytest.mark.parametrize(
    ("op", "example"),
    [
        ("local_attention_with_lse", "nothing"),
        ("local_dot_product", "nothing"),
        ("local_weighted_average", "nothing"),
        ("LocalAttention", "packed"),
    ],
)
def test_one_compiled_graph_serves_every_length_and_its_gradients(op, example, order):
    model = Model(op, order)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, dynamic=True, fullgraph=True, backend=counter)
    graphs = []
    # Sizes that are equal by chance in the first call would be taken for one.
    for sizes in ((3, 9), (5, 20), (3, 8), (3, 5), (5, 2)):
        results = []
        for run in (compiled, model):
            tensors, given = inputs_of(op, example, *sizes)
            leaves = [tensor.requires_grad_() for tensor in tensors]
            found = run(tensors, given)
            total = sum(each.masked_fill(each == -torch.inf, 0.0).sin().sum() for each in found)
            results.append([*(each.detach() for each in found), *torch.autograd.grad(total, leaves)])
        torch.testing.assert_close(*results)
        graphs.append(counter.frame_count)
    assert graphs[-1] == graphs[0]


@pytest.mark.parametrize("window", [WINDOW, Window(0, 9)])
@pytest.mark.parametrize("kind", ["boolean", "additive"])
def test_a_band_of_a_dense_mask_serves_every_length(kind, window):
    class Band(nn.Module):
        def forward(self, mask):
            return band_from_dense(mask, window)

    def mask_of(*sizes):
        return random(2, *sizes) > 0 if kind == "boolean" else random(2, *sizes)

    dims = ({1: Dim("queries", min=1, max=99), 2: Dim("keys", min=1, max=99)},)
    torch._dynamo.reset()
    programs = [
        *(export(Band(), (mask_of(6, 8),), dynamic_shapes=dims, strict=strict).module() for strict in (True, False)),
        make_fx(Band(), tracing_mode="symbolic")(mask_of(6, 8)),
        torch.compile(Band(), dynamic=True, fullgraph=True, backend="aot_eager"),
    ]
    for sizes in ((9, 9), (3, 20), (20, 3), (2, 2), (1, 1)):
        for program in programs:
            assert torch.equal(program(mask_of(*sizes)), band_from_dense(mask_of(*sizes), window))


def test_a_compiled_band_has_the_gradient_of_the_mask():
    mask, results = random(2, 5, 7).requires_grad_(), []
    torch._dynamo.reset()
    for run in (band_from_dense, torch.compile(band_from_dense, fullgraph=True, backend="aot_eager")):
        band = run(mask, WINDOW)
        upstream = random(*band.shape)
        results.append(torch.autograd.grad(band.masked_fill(band == -torch.inf, 0.0), mask, upstream)[0])
    assert torch.equal(*results)
