"""The one table of cases. It feeds the tests of every backend, and whoever adds a backend adds nothing here."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from attnreg import Window

OPS = ("local_dot_product", "local_weighted_average", "local_attention")


@dataclass(frozen=True)
class Case:
    """One call's shapes and options.

    ``bias`` gives the shape of a bias with letters for full dimensions, "NHLW", "H1W", "1" and so on; ``hidden`` the share of
    its slots that are -inf. ``layout`` is how the tensors lie in memory. ``key_lengths`` are cut to the batch.
    """

    name: str
    batch: int = 2
    heads: int = 2
    kv_heads: int = 2
    query_length: int = 37
    key_length: int = 37
    head_dim: int = 16
    value_dim: int = 16
    window: Window = field(default_factory=lambda: Window.causal(8))
    bias: str | None = None
    hidden: float = 0.0
    bias_dtype: torch.dtype | None = None
    key_lengths: tuple[int, ...] | None = None
    layout: str = "contiguous"
    scale: float | None = None

    def __str__(self) -> str:
        return self.name


def _lengths(name: str, query_length: int, key_length: int, window: Window, **options: object) -> Case:
    return Case(name, query_length=query_length, key_length=key_length, window=window, **options)  # type: ignore[arg-type]


CASES = [
    # windows
    Case("causal"),
    Case("window_of_one", window=Window(0, 0)),
    Case("centered_even", window=Window.centered(8)),
    Case("centered_odd", window=Window.centered(9)),
    Case("only_the_future", window=Window(0, 6)),
    Case("wider_than_a_tile", query_length=150, key_length=150, window=Window(70, 11)),
    Case("wider_than_the_sequence", query_length=20, key_length=20, window=Window(33, 45)),
    Case("far_wider_than_the_sequence", query_length=5, key_length=5, window=Window(300, 200)),
    # lengths
    _lengths("one_query_one_key", 1, 1, Window(2, 1)),
    _lengths("decode_step", 1, 50, Window.causal(16)),
    _lengths("few_queries_many_keys", 5, 70, Window(9, 2)),
    _lengths("more_queries_than_keys", 40, 13, Window(3, 4)),
    _lengths("far_more_queries_than_keys", 70, 2, Window(1, 1)),
    _lengths("tile_sized", 64, 64, Window.causal(64)),
    _lengths("one_over_a_tile", 65, 129, Window.centered(33)),
    _lengths("no_query", 0, 9, Window(2, 1)),
    _lengths("no_key", 9, 0, Window(2, 1)),
    _lengths("empty_batch", 9, 9, Window(2, 1), batch=0),
    # head dims
    *(
        Case(f"head_dim_{size}", head_dim=size, value_dim=size, query_length=19, key_length=19)
        for size in (1, 3, 17, 80)
    ),
    # What kernels pad to several sizes in one call, over more than one tile of rows and keys.
    Case(
        "head_dim_80_over_tiles",
        head_dim=80,
        value_dim=80,
        query_length=150,
        key_length=150,
        window=Window(70, 11),
        batch=1,
    ),
    Case("head_dim_256", head_dim=256, value_dim=256, query_length=19, key_length=19, batch=1),
    Case("value_dim_larger", head_dim=8, value_dim=40),
    Case("value_dim_smaller", head_dim=40, value_dim=1),
    # grouped heads
    Case("grouped_heads", heads=6, kv_heads=2),
    Case("one_kv_head", heads=5, kv_heads=1, window=Window(4, 3)),
    Case("grouped_decode", heads=8, kv_heads=2, query_length=1, key_length=40, key_lengths=(40, 17)),
    # bias
    Case("bias_full", bias="NHLW"),
    Case("bias_relative_table", bias="H1W", window=Window(5, 5)),
    Case("bias_per_row", bias="N1L1"),
    Case("bias_alibi_slope", bias="H11"),
    Case("bias_scalar", bias="1"),
    Case("bias_band", bias="LW", window=Window(6, 3)),
    Case("bias_over_batch", bias="NH1W", heads=4, kv_heads=2),
    Case("bias_hides_some", bias="NHLW", hidden=0.4),
    Case("bias_hides_whole_rows", bias="N1L1", hidden=0.4),
    Case("bias_hides_everything", bias="NHLW", hidden=1.0),
    Case("bias_in_float32", bias="H1W", bias_dtype=torch.float32),
    Case("bias_table_long", bias="H1W", query_length=150, key_length=150, window=Window(70, 11)),
    # key lengths
    Case("key_lengths", key_lengths=(23, 37)),
    Case("key_lengths_zero", key_lengths=(0, 5), window=Window(3, 2)),
    Case("key_lengths_with_bias", key_lengths=(30, 9), bias="NHLW", hidden=0.3),
    # layouts and scale
    Case("transposed", layout="transposed", heads=3, kv_heads=3),
    Case("strided", layout="strided"),
    Case("expanded", layout="expanded"),
    Case("last_dimension_strided", layout="last_dimension_strided"),
    Case("scale_negative", scale=-0.7),
    Case("scale_zero", scale=0.0),
    # everything at once
    Case(
        "everything",
        heads=6,
        kv_heads=3,
        query_length=70,
        key_length=90,
        head_dim=24,
        value_dim=17,
        window=Window(20, 9),
        bias="H1W",
        key_lengths=(90, 41),
        layout="transposed",
        scale=0.3,
    ),
]

# Larger than a few tiles in every direction: for a GPU, where such a case costs nothing.
LARGE_CASES = [
    Case("large_causal_64", batch=2, heads=4, kv_heads=4, query_length=1000, key_length=1000, head_dim=64, value_dim=64,
         window=Window.causal(64)),
    Case("large_causal_256", batch=1, heads=4, kv_heads=2, query_length=777, key_length=1500, head_dim=128, value_dim=128,
         window=Window.causal(256)),
    Case("large_centered_512", batch=1, heads=2, kv_heads=2, query_length=1025, key_length=1025, head_dim=64, value_dim=96,
         window=Window.centered(512), bias="H1W", key_lengths=(900,)),
    Case("large_head_dim_256", batch=1, heads=2, kv_heads=1, query_length=300, key_length=300, head_dim=256, value_dim=256,
         window=Window(65, 65), bias="NHLW", hidden=0.2),
    Case("large_grouped_key_lengths", batch=3, heads=8, kv_heads=2, query_length=500, key_length=777, head_dim=64,
         value_dim=128, window=Window(40, 25), key_lengths=(777, 300, 0), layout="transposed"),
    Case("large_head_dim_80", batch=2, heads=3, kv_heads=1, query_length=333, key_length=333, head_dim=80, value_dim=48,
         window=Window.causal(200)),
    Case("large_narrow", batch=2, heads=4, kv_heads=4, query_length=515, key_length=515, head_dim=128, value_dim=128,
         window=Window.centered(9), key_lengths=(515, 130)),
    Case("large_all_keys", batch=1, heads=2, kv_heads=2, query_length=300, key_length=200, head_dim=32, value_dim=64,
         window=Window(1000, 1000)),
    Case("large_negative_scale", batch=1, heads=2, kv_heads=2, query_length=200, key_length=200, head_dim=64,
         value_dim=64, window=Window(30, 3), scale=-0.2),
    Case("large_one_kv_head", batch=1, heads=64, kv_heads=1, query_length=300, key_length=300, head_dim=64, value_dim=64,
         window=Window(3, 3)),
    Case("many_heads", batch=700, heads=100, kv_heads=50, query_length=3, key_length=3, head_dim=8, value_dim=8,
         window=Window(1, 1)),
]  # fmt: skip


@dataclass
class Inputs:
    """The tensors of one case, and the gradient to send back."""

    tensors: dict[str, Tensor]
    key_lengths: Tensor | None
    options: dict[str, object]
    grad: Tensor

    def to(self, dtype: torch.dtype) -> Inputs:
        """A copy in another dtype; the bias too."""
        return Inputs(
            {name: tensor.detach().to(dtype) for name, tensor in self.tensors.items()},
            self.key_lengths,
            self.options,
            self.grad.to(dtype),
        )


def make_inputs(op: str, case: Case, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> Inputs:
    """Random tensors for one case; the incoming gradient is random too: one of ones would hide a flipped window."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return _laid_out(torch.randn(shape, generator=generator), case.layout).to(dtype).to(device)

    sizes = {"N": case.batch, "H": case.heads, "L": case.query_length, "W": case.window.size, "1": 1}
    query = random(case.batch, case.heads, case.query_length, case.head_dim)
    key = random(case.batch, case.kv_heads, case.key_length, case.head_dim)
    value = random(case.batch, case.kv_heads, case.key_length, case.value_dim)
    weights = random(case.batch, case.heads, case.query_length, case.window.size)
    band_grad = random(case.batch, case.heads, case.query_length, case.window.size)
    row_grad = random(case.batch, case.heads, case.query_length, case.value_dim)

    key_lengths = None
    if case.key_lengths is not None:
        key_lengths = torch.tensor(case.key_lengths[: case.batch], device=device)
    if op == "local_weighted_average":
        return Inputs({"weights": weights, "value": value}, key_lengths, {}, row_grad)
    tensors = {"query": query, "key": key}
    if op == "local_attention":
        tensors["value"] = value
    if case.bias is not None:
        shape = [sizes[letter] for letter in case.bias]
        bias = torch.randn(shape, generator=generator)
        bias[torch.rand(shape, generator=generator) < case.hidden] = -torch.inf
        tensors["bias"] = bias.to(case.bias_dtype or dtype).to(device)
    options = {} if case.scale is None else {"scale": case.scale}
    return Inputs(tensors, key_lengths, options, row_grad if op == "local_attention" else band_grad)


def _laid_out(tensor: Tensor, layout: str) -> Tensor:
    if layout == "transposed":  # (N, L, H, E) in memory
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "strided":  # a part of something larger in every dimension
        n, h, length, dim = tensor.shape
        larger = tensor.new_full((n + 1, h + 2, length + 3, dim + 8), float("nan"))
        larger[1:, 1:-1, 2:-1, 4:-4] = tensor
        return larger[1:, 1:-1, 2:-1, 4:-4]
    if layout == "expanded":
        return tensor[:, :1].expand(tensor.shape)
    if layout == "last_dimension_strided":
        return tensor.transpose(2, 3).contiguous().transpose(2, 3)
    return tensor


def small_case(
    query_length: int, key_length: int, left: int, right: int, head_dim: int = 3, value_dim: int = 2
) -> Case:
    """A case whose only point is its window and lengths."""
    return replace(
        Case(f"{query_length}x{key_length}_{left}_{right}"),
        batch=1,
        heads=1,
        kv_heads=1,
        query_length=query_length,
        key_length=key_length,
        head_dim=head_dim,
        value_dim=value_dim,
        window=Window(left, right),
    )
