"""A mask that is a band: what transformers hands from its mask functions to its attention functions.

Models pass a mask on, put it into dictionaries and graphs, and some slice or join it. A ``BandMask`` is to all of them the mask
(N, 1, Lq, Lk) of their eager attention, to be added to scores, and is made dense where an operation reads it: whatever a model
does with a mask, it does to this one. What attention needs is in a few small tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.nn.functional import pad
from torch.utils._pytree import tree_map
from transformers.utils.import_utils import is_tracing

from attnreg import Window
from attnreg.integrations._transformers_rule import MaskFunction, Rule
from attnreg.rows import rows_of

__all__ = [
    *(
        "BandMask",
        "Facts",
        "Sizes",
        "additive",
        "band_of",
        "dense",
        "hides_nothing",
        "is_full",
        "key_length_of",
        "may_look",
        "surely",
    ),
    *("tensors_of", "visibility", "window_of", "with_offsets", "with_restarts"),
]

# Its tensors by name, each may be None but the first, which says the device.
_TENSORS = ("anchor", "query_starts", "key_starts", "key_lengths", "offsets_q", "offsets_k", "visible")


# Its facts that are no tensors: the rule's, in their order, the unused keys and the dtype. Dynamo knows tuples and numbers alone.
Facts = tuple[int | None, int | None, bool, int | None, int, torch.dtype]


class BandMask(Tensor):
    """Which keys each query sees: a window, and where rows stand.

    Attributes:
        first, last, packed, chunk_size: as a ``Rule`` has them.
        plain: whether the window and the lengths say all.
        unused: how many keys at the end belong to no token yet, as in a static cache at its first call.
        query_starts, key_starts, key_lengths: (N,), as ``attnreg.local_attention`` takes them, or None.
        offsets_q, offsets_k: (S + 1,), where documents begin in N * Lq queries and N * Lk keys, one sequence after the other.
            Where they are given they say what the three say too.
        visible: (N, Lk), False for keys that are hidden beside all this.
    """

    facts: Facts
    first: int | None
    last: int | None
    packed: bool
    chunk_size: int | None
    unused: int
    plain: bool
    anchor: Tensor
    query_starts: Tensor | None
    key_starts: Tensor | None
    key_lengths: Tensor | None
    offsets_q: Tensor | None
    offsets_k: Tensor | None
    visible: Tensor | None

    @staticmethod
    def __new__(
        cls: type[BandMask],
        shape: tuple[int, ...],
        facts: Facts,
        tensors: Mapping[str, Tensor],
    ) -> BandMask:
        made: BandMask = torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=facts[5], device=tensors["anchor"].device
        )
        return made

    def __init__(self, shape: tuple[int, ...], facts: Facts, tensors: Mapping[str, Tensor]) -> None:
        self.facts = facts
        self.first, self.last, self.packed, self.chunk_size, self.unused, _ = facts
        self.plain = len(tensors) == 1
        for name in _TENSORS:
            setattr(self, name, tensors.get(name))

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return list(tensors_of(self)), (tuple(self.shape), self.facts)

    @staticmethod
    def __tensor_unflatten__(inner: Mapping[str, Tensor], context: Any, size: Any, stride: Any) -> BandMask:
        return BandMask(tuple(size), context[1], inner)

    # Whoever knows no BandMask has an ordinary mask.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if func in _KEEPING:
            return _moved(args[0], kwargs or {})
        args, kwargs = tree_map(_made_dense, (args, kwargs or {}))
        return func(*args, **kwargs)

    def __repr__(self, *, tensor_contents: object = None) -> str:  # type: ignore[override]
        given = ", ".join(name for name in tensors_of(self) if name != "anchor")
        return f"BandMask({tuple(self.shape)}, keys {self.first}..{self.last} from a query{given and ', ' + given})"


# What leaves a mask what it is, on another device or in another dtype: layers on several devices get copies of one.
_KEEPING = (
    *(torch.ops.aten.detach.default, torch.ops.aten.alias.default),
    *(torch.ops.aten.clone.default, torch.ops.aten._to_copy.default),
)


def _moved(mask: BandMask, asked: Mapping[str, Any]) -> Tensor:
    dtype, device = asked.get("dtype") or mask.dtype, asked.get("device")
    if not dtype.is_floating_point:
        return dense(mask).to(device=device, dtype=dtype)
    moved: dict[int, Tensor] = {id(each): each.to(device=device) for each in tensors_of(mask).values()}
    tensors = {name: moved[id(each)] for name, each in tensors_of(mask).items()}
    return BandMask(tuple(mask.shape), (*mask.facts[:5], dtype), tensors)


# What follows are functions, as Dynamo reads a property of a traced mask as if it were a constant.


def tensors_of(mask: BandMask) -> dict[str, Tensor]:
    """Those of its tensors that are given."""
    given = {}
    for name in _TENSORS:
        tensor = getattr(mask, name)
        if tensor is not None:
            given[name] = tensor
    return given


def is_full(mask: BandMask) -> bool:
    """Whether no window bounds what a query sees."""
    return mask.first is None


def hides_nothing(mask: BandMask) -> bool:
    """Whether the window reaches everything that causality leaves, and nothing else hides a key."""
    if mask.first is None or not mask.plain:
        return mask.plain
    farthest = key_length_of(mask) - 1
    return surely(-mask.first >= farthest) and (mask.last is None or mask.last == 0 or surely(mask.last >= farthest))


def surely(what_lengths_say: Any) -> bool:
    """Whether it is so; of a program that is exported, at every length that the program serves."""
    if torch.compiler.is_exporting() or isinstance(what_lengths_say, torch.SymBool):
        return statically_known_true(what_lengths_say)
    return bool(what_lengths_say)


def key_length_of(mask: BandMask) -> int:
    """The keys that belong to tokens, and all of a static cache's."""
    return mask.shape[-1] - mask.unused


def window_of(mask: BandMask) -> Window:
    """The window, which where nothing bounds it has all keys."""
    farthest = key_length_of(mask) - 1
    first = -farthest if mask.first is None else mask.first
    last = farthest if mask.last is None else mask.last
    if mask.visible is not None:
        # A bias has a slot for each key of the window, reachable or not.
        first, last = torch.sym_max(first, -farthest), torch.sym_min(last, farthest)
    return Window(-first, last)


def dense(mask: BandMask) -> Tensor:
    """The mask as an ordinary tensor: 0 where a query sees a key, and the least number of its dtype where not."""
    return additive(visibility(mask), mask.dtype)


def visibility(mask: BandMask) -> Tensor:
    """Which keys a query sees: boolean, (N, 1, Lq, Lk)."""
    batch, _, query_length, _ = mask.shape
    key_length, device = key_length_of(mask), mask.anchor.device
    if mask.offsets_q is None:
        folds = 1
        given = {"key_lengths": mask.key_lengths, "key_starts": mask.key_starts, "query_starts": mask.query_starts}
    else:
        folds, given = batch, {"cu_seqlens_q": mask.offsets_q, "cu_seqlens_k": mask.offsets_k}
    rows = rows_of(folds * query_length, folds * key_length, device, **given)
    first, last = rows.seen(folds * query_length, window_of(mask))
    if mask.offsets_q is not None:
        begin = key_length * torch.arange(batch, device=device)[:, None]
        first, last = first.view(batch, query_length) - begin, last.view(batch, query_length) - begin
    keys = torch.arange(key_length, device=device)
    sees = (keys >= first[..., None]) & (keys < last[..., None])
    if mask.visible is not None:
        sees = sees & mask.visible[:, None]
    if mask.unused:
        sees = pad(sees, (0, mask.unused))
    return sees[:, None].expand(mask.shape)


def additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to scores, as transformers has it for its eager functions."""
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill(~visible, torch.finfo(dtype).min)


def _made_dense(value: Any) -> Any:
    return dense(value) if isinstance(value, BandMask) else value


@dataclass(frozen=True)
class Sizes:
    """What a mask function is told of lengths: positions are those of tokens in the whole text.

    Attributes:
        batch: N.
        query_length: Lq.
        key_length: Lk.
        query_offset: the position of the first query; of a static cache a tensor.
        key_offset: the position of the first key.
        device: where the mask is needed.
    """

    batch: int
    query_length: int
    key_length: int
    query_offset: int | Tensor
    key_offset: int
    device: torch.device

    @property
    def start(self) -> int | Tensor:
        """The key at which the first query stands."""
        return self.query_offset - self.key_offset


def may_look(tensor: Tensor, looks: bool) -> bool:
    """Whether numbers may be read on the host: never in a graph, and on an accelerator where the user lets it be."""
    return not is_tracing(tensor) and (tensor.device.type == "cpu" or looks)


def band_of(
    rule: Rule,
    sizes: Sizes,
    function: MaskFunction,
    attention_mask: Tensor | None,
    dtype: torch.dtype,
    looks: bool,
) -> BandMask | None:
    """The mask of a rule; None where none of its kind is.

    Args:
        rule: what the mask function states.
        sizes: the lengths.
        function: the mask function, asked where documents begin.
        attention_mask: (N, L), boolean, False at padding, or None.
        dtype: of the mask, where it is made dense.
        looks: whether numbers of an accelerator may be read.
    """
    if (rule.first is not None and rule.first > 0) or (rule.last is not None and rule.last < 0):
        return None
    start, query_length, length = sizes.start, sizes.query_length, sizes.key_length
    unused = 0
    if isinstance(start, int) and rule.last == 0 and start + query_length < length:
        unused = length - (start + query_length)
        length -= unused
    sizes = replace(sizes, key_length=length)
    tensors: dict[str, Tensor] = {"anchor": torch.empty(0, device=sizes.device)}
    if (rule.first, rule.last) != (None, None) and not (isinstance(start, int) and start + query_length == length):
        # A sum, as the cache counts its own tensor on while the layers run.
        tensors["query_starts"] = torch.zeros(sizes.batch, dtype=torch.long, device=sizes.device) + start
    if attention_mask is not None:
        tensors.update(_padding(attention_mask, sizes, rule, looks))
    if rule.has_documents:
        tensors = _with_breaks(tensors, _breaks(function, sizes), sizes)
    shape = (sizes.batch, 1, query_length, length + unused)
    return BandMask(shape, (rule.first, rule.last, rule.packed, rule.chunk, unused, dtype), tensors)


def _padding(attention_mask: Tensor, sizes: Sizes, rule: Rule, looks: bool) -> dict[str, Tensor]:
    """What hides padded keys: where tokens begin and end, and all of it where there may be holes between."""
    offset, length = sizes.key_offset, sizes.key_length
    visible = attention_mask[:, offset : offset + length].bool()
    if visible.shape[1] < length:
        visible = pad(visible, (0, length - visible.shape[1]))
    visible = visible.expand(sizes.batch, -1)
    is_looked_at = may_look(visible, looks)
    if is_looked_at and bool(visible.all()):
        return {}
    keys = torch.arange(length, device=sizes.device)
    starts = torch.where(visible, keys, length).amin(-1)
    lengths = torch.where(visible, keys + 1, 0).amax(-1)
    if is_looked_at:
        starts_at_all, ends_at_all, has_holes = torch.stack(
            [(starts > 0).any(), (lengths < length).any(), (visible.sum(-1) < lengths - starts).any()]
        ).tolist()
    else:
        starts_at_all = ends_at_all = has_holes = True
    found = {}
    if starts_at_all:
        found["key_starts"] = starts
    if ends_at_all:
        found["key_lengths"] = lengths
    if has_holes:
        found["visible"] = visible
    return found


def _breaks(function: MaskFunction, sizes: Sizes) -> Tensor:
    """(N, Lk), True where a key's document is another one than that of the key before."""
    batch = torch.arange(sizes.batch, device=sizes.device)[:, None]
    head = torch.zeros(1, 1, dtype=torch.long, device=sizes.device)
    key = torch.arange(sizes.key_length, device=sizes.device)[None] + sizes.key_offset
    before = (key - 1).clamp_min(0)
    return ~function(batch, head, key, before).expand(sizes.batch, sizes.key_length)


def _with_breaks(tensors: Mapping[str, Tensor], breaks: Tensor, sizes: Sizes) -> dict[str, Tensor]:
    """The tensors of a mask whose documents begin at these keys."""
    tensors = dict(tensors)
    batch, length, device = sizes.batch, sizes.key_length, sizes.device
    keys = torch.arange(length, device=device)
    starts = tensors.get("query_starts")
    if sizes.query_length == 1:
        # One query sees one document: that in which it stands.
        at = torch.full((batch,), length - 1, device=device) if starts is None else starts
        begin = torch.where(breaks & (keys <= at[:, None]), keys, 0).amax(-1)
        given = tensors.get("key_starts")
        tensors["key_starts"] = begin if given is None else begin.maximum(given)
        return tensors
    # Padding on either side is a document of its own, and so is what lies past the last query.
    breaks = breaks | (keys == 0)
    for name in ("key_starts", "key_lengths"):
        if name in tensors:
            breaks = breaks | (keys == tensors[name][:, None])
    if starts is not None:
        breaks = breaks | (keys == (starts + sizes.query_length)[:, None])
    count = batch * length
    flat = breaks.flatten()
    if may_look(flat, looks=False):
        offsets = pad(flat.nonzero()[:, 0], (0, 1), value=count)
    else:
        # As many as there could be, of which the last ones are empty.
        number = flat.cumsum(0) - 1
        places = torch.where(flat, number, count + 1)
        offsets = torch.full((count + 2,), count, device=device)
        offsets = offsets.scatter(0, places, torch.arange(count, device=device))[: count + 1]
    tensors["offsets_q"] = tensors["offsets_k"] = offsets.int()
    if sizes.query_length != length or starts is not None:
        at = torch.arange(sizes.query_length, device=device)
        at = at + (length - sizes.query_length if starts is None else starts[:, None])
        number = (flat.cumsum(0) - 1).view(batch, length)
        of_queries = number.gather(1, at.expand(batch, -1).clamp(0, length - 1)).flatten()
        documents = torch.arange(offsets.shape[0], device=device)
        tensors["offsets_q"] = torch.searchsorted(of_queries, documents).int()
    return tensors


def _places(mask: BandMask, count: int) -> Tensor:
    """(N, Lq), the keys at which this many queries stand."""
    batch, device = mask.shape[0], mask.anchor.device
    first = key_length_of(mask) - count if mask.query_starts is None else mask.query_starts[:, None]
    return (first + torch.arange(count, device=device)).expand(batch, -1)


def restarts(mask: BandMask, positions: Tensor) -> Tensor:
    """(N, Lq), where documents of a pack begin, by the positions (N, Lq) of the queries.

    A row is a pack if each of its positions is 0 or the one after the last; padding's, which have numbers of their own, do not
    count. Where a row repeats or skips positions in another way nothing begins.
    """
    batch, length = mask.shape[0], positions.shape[1]
    positions = positions.long().expand(batch, -1)
    places = _places(mask, length)
    is_token = torch.ones(batch, length, dtype=torch.bool, device=positions.device)
    if mask.key_starts is not None:
        is_token = is_token & (places >= mask.key_starts[:, None])
    if mask.key_lengths is not None:
        is_token = is_token & (places < mask.key_lengths[:, None])
    if mask.visible is not None:
        is_token = is_token & mask.visible.gather(1, places.clamp(0, mask.visible.shape[1] - 1))
    # The token before each, past holes, which positions may count or leave out.
    rows = torch.arange(length, device=positions.device)
    last = torch.where(is_token, rows, -1).cummax(-1).values[:, (rows - 1).clamp_min(0)].masked_fill(rows == 0, -1)
    steps = positions - positions.gather(-1, last.clamp_min(0))
    follows = is_token & (last >= 0)
    goes_on = follows & ((steps == 1) | (steps == rows - last))
    begins = follows & (positions == 0)
    is_pack = (goes_on | begins | ~follows).all(-1, keepdim=True) & goes_on.any(-1, keepdim=True)
    return begins & is_pack


def with_restarts(mask: BandMask, begins: Tensor, positions: Tensor) -> BandMask:
    """The mask with documents that begin at these queries (N, Lq), whose positions within their documents are given."""
    if mask.chunk_size is not None:
        begins = begins | (positions % mask.chunk_size == 0)
    batch, query_length, length = mask.shape[0], mask.shape[2], key_length_of(mask)
    places = _places(mask, query_length)
    breaks = torch.zeros(batch, length + 1, dtype=torch.bool, device=places.device)
    # What lies past the keys of a static cache begins nothing.
    breaks = breaks.scatter(1, places.clamp(0, length), begins.expand(batch, -1))[:, :length]
    kept = {name: each for name, each in tensors_of(mask).items() if name not in ("offsets_q", "offsets_k")}
    sizes = Sizes(batch, query_length, length, 0, 0, mask.anchor.device)
    return BandMask(tuple(mask.shape), mask.facts, _with_breaks(kept, breaks, sizes))


def with_offsets(mask: BandMask, offsets_q: Tensor, offsets_k: Tensor) -> BandMask:
    """The mask, of one sequence, with documents at these offsets."""
    if mask.plain and not mask.unused:
        given = {"anchor": mask.anchor, "offsets_q": offsets_q.int(), "offsets_k": offsets_k.int()}
        return BandMask(tuple(mask.shape), mask.facts, given)
    length = mask.shape[2]
    begins = torch.zeros(length + 1, dtype=torch.bool, device=mask.anchor.device)
    begins = begins.scatter(0, offsets_q.long(), True)[:length]
    rows = torch.arange(length, device=begins.device)
    positions = rows - torch.where(begins, rows, 0).cummax(0).values
    return with_restarts(mask, begins[None], positions[None])
