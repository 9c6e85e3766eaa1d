"""What window an attention really has, by measurement: ``docs/audit.md``."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as Sequence_
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from attnreg.printable import brief, told
from attnreg.testing import audit_inputs as inputs_
from attnreg.testing.audit_claims import (
    Claim,
    Claims,
    Pattern,
    check_claims,
    chunks,
    claim_of,
    claims_full,
    full,
    looks_like_attention,
    plain_name,
    reach,
    read,
    told_claim,
    window_and_first,
)
from attnreg.testing.audit_inputs import Arguments, Inputs
from attnreg.testing.audit_judging import (
    Fault,
    Seen,
    Sequence,
    Sparse,
    faults,
    gaps,
    holes,
    measured,
    own_key_fault,
    rows_without_own,
)
from attnreg.testing.audit_probing import (
    DRAWS,
    OTHER_DRAWS,
    Draw,
    Key,
    Measured,
    NothingFound,
    Probe,
    Run,
    Site,
    discover,
)

__all__ = ["Audit", "LayerAudit", "Pattern", "WindowLie", "audit_window", "chunks", "full", "window_and_first"]

# Past the borders of the tiles that kernels have, and no size of anything in a model.
SHORTEST = 149
LONG = 521
# Of which lengths that people train with are multiples.
LARGEST_TILE = 128
# Longer ones are not tried unasked: a dense mask of a row and a key each takes a while.
LONGEST = 2100
# Up to this length every position is tried; of longer sequences those at the ends, in the middle and at the borders of tiles.
EXHAUSTIVE = 260
# Elements of one run's scores, and of what its layers give: more are run in pieces.
MOST_SCORES = 2**25
MOST_OUTPUTS = 2**25
# Of the name of a whole model in a report.
WHOLE = "(the whole model)"


class WindowLie(AssertionError):
    """An attention has another window than it claims."""


@dataclass(frozen=True)
class LayerAudit:
    """What was found of one layer.

    Attributes:
        name: of its module in the model.
        claimed: what it says of its window; None where it says nothing.
        forward: what its output at one position changes with, of the first way to run it: the claim where it holds, else the
            window that was measured, a :class:`Pattern` where it is none; None is full attention, to the left or to both sides.
        backward: likewise what the gradient of its output at one position reaches.
        faults: how the claim is wrong, and in which ways to run it.
        gaps: which keys inside the claimed window some rows do not see, though nothing is wrong with its border: what an
            attention has that chooses among the keys of its window. They are no faults.
    """

    name: str
    claimed: Claim | None
    forward: Claim | None
    backward: Claim | None
    faults: tuple[str, ...] = ()
    gaps: tuple[str, ...] = ()


@dataclass(frozen=True)
class Audit:
    """What was found of a model or an attention.

    Attributes:
        layers: of each layer that joins positions.
        whole: faults that belong to no layer.
        ways: in which it was run.
        notes: what was not tried, and why.
        called_with: query, key and value, where the attention takes these; else nothing.
    """

    layers: tuple[LayerAudit, ...]
    whole: tuple[str, ...] = ()
    ways: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    called_with: str = ""

    @property
    def faults(self) -> tuple[str, ...]:
        """Every fault, with the layer's name."""
        return tuple(f"{layer.name}: {fault}" for layer in self.layers for fault in layer.faults) + self.whole

    @property
    def gaps(self) -> tuple[str, ...]:
        """Every gap inside a window, with the layer's name: none is a fault."""
        return tuple(f"{layer.name}: {gap}" for layer in self.layers for gap in layer.gaps)

    @property
    def ok(self) -> bool:
        """Whether there is no fault, and any layer whose claim was tried."""
        return not self.faults and any(layer.claimed is not None for layer in self.layers)

    def raise_if_faulty(self) -> None:
        """Raise where a claim is wrong.

        Raises:
            WindowLie: with every fault; or where no layer claims anything, so that nothing was proved.
        """
        if not self.ok:
            raise WindowLie(str(self))

    def __str__(self) -> str:
        headings = ("layer", "claimed", "forward", "backward", "")
        rows = [headings, *map(row_of, self.layers)]
        widths = [max(map(len, column)) for column in zip(*rows)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
        told_each = [*self.faults, *self.gaps]
        return "\n".join([*lines, *(["", *told_each] if told_each else []), "", *verdict(self)])


def row_of(layer: LayerAudit) -> tuple[str, str, str, str, str]:
    """The cells of a layer in a table: name, claim, what was measured forward and backward, and whether it lies."""
    return (
        layer.name,
        told_claim(layer.claimed),
        told_claim(layer.forward, "full"),
        told_claim(layer.backward, "full"),
        _verdict_of(layer),
    )


def _verdict_of(layer: LayerAudit) -> str:
    if layer.faults:
        return "LIES"
    if layer.claimed is None:
        return ""
    return "as claimed, sparse" if layer.gaps else "as claimed"


def verdict(audit: Audit) -> list[str]:
    """The last lines of a report."""
    lying = sum(bool(layer.faults) for layer in audit.layers)
    claiming = sum(layer.claimed is not None for layer in audit.layers)
    if audit.faults:
        said = (
            f"{lying} of {len(audit.layers)} layers {'lies' if lying == 1 else 'lie'}"
            if lying
            else "no layer lies alone, the whole does"
        )
    elif claiming:
        said = f"{claiming} of {len(audit.layers)} layers claim something, and it holds"
        without = sum(layer.claimed is not None and claims_full(layer.claimed) for layer in audit.layers)
        sparse = sum(bool(layer.gaps) for layer in audit.layers)
        if without:
            said += f"; {without} of them {'claims' if without == 1 else 'claim'} full attention, no window"
        if sparse:
            said += f"; {sparse} of them {'is' if sparse == 1 else 'are'} sparse inside the window, which is no lie"
    else:
        said = "no layer says what its window is: nothing was proved; give window="
    called = [f"called with: {audit.called_with}"] if audit.called_with else []
    return [*called, f"run: {'; '.join(audit.ways)}", *(f"not tried: {note}" for note in audit.notes), said]


def audit_window(
    attention: Callable[..., Any],
    *,
    window: Claims | None = None,
    inputs: Inputs | None = None,
    layers: str | Sequence_[str] | None = None,
    layout: str | None = None,
    heads: int = 4,
    kv_heads: int | None = None,
    head_dim: int = 16,
    length: int | None = None,
    documents: Sequence_[int] | None = None,
    padding: tuple[int, int] | None = None,
    dtypes: Sequence_[torch.dtype] | None = None,
    train: bool = True,
    cache: bool | None = None,
    compile: bool | str | Callable[..., Any] = False,
    device: torch.device | str | None = None,
) -> Audit:
    """Measure which keys the rows of each layer see, forward and backward, and compare that with what it claims.

    Each layer's input is replaced at one position, and its output compared at all others: a layer is measured alone, with the
    masks that the model gives it. The gradient of its output at one position tells the same of the backward pass.

    Args:
        attention: a model (``torch.nn.Module``), whose layers are found by measurement; or an attention, a function of query, key
            and value.
        window: the claim: a Window, a :class:`Pattern` such as ``chunks(size)``, a mapping of patterns of layer names to these
            (the first that matches), or a function of a layer's name and module. None: what layers and their configuration say.
        inputs: what a model is called with, once: a tensor, or positional or named arguments, of one sequence; or a function of
            the length that gives them. None: random tokens or hidden states.
        layers: patterns of the names of the layers to audit; None: all that join positions.
        layout: of query, key and value, where ``attention`` takes these: the letters N (left out where there is no batch), H, L,
            E. None: "NHLE" where ``attention`` is no module and there are no ``inputs``.
        heads: of the query, where ``attention`` takes query, key and value.
        kv_heads: likewise of key and value; None: half as many as of the query, or as many where the attention refuses that.
        head_dim: likewise.
        length: of the sequence; None: more than any claim reaches, and 149 at least.
        documents: lengths of the documents that are packed in the sequence, which must not see each other. Language models of
            Hugging Face get position ids that restart; others must be told by ``inputs``, or know it.
        padding: how many positions on the left and on the right are padding, which no other position may see. Language models of
            Hugging Face get an ``attention_mask``, and are run so on both sides where this is None.
        dtypes: further dtypes to run it in; None: bfloat16.
        train: whether it is run in training mode, too.
        cache: whether it is run with a cache, in pieces and token by token, too; None: where a language model takes one.
        compile: whether it is run under ``torch.compile``, too: True, or a backend of that.
        device: where query, key and value are, or random hidden states; None: where the model is, or "cpu".

    Returns:
        What was found; ``raise_if_faulty()`` raises where a claim is wrong.

    Raises:
        TypeError, ValueError: an argument is wrong, or nothing was found to audit.
    """
    check_claims(window)
    if not callable(attention):
        raise TypeError(f"attention must be a torch.nn.Module or a function, got {brief(attention)}")
    if documents is not None and (not documents or any(not isinstance(each, int) or each < 1 for each in documents)):
        raise ValueError(f"documents must be lengths of at least 1, got {brief(documents)}")
    if padding is not None and (len(padding) != 2 or min(padding) < 0):
        raise ValueError(f"padding must be two counts, left and right, of at least 0; got {brief(padding)}")
    if documents is not None and padding is not None:
        raise ValueError("give documents or padding, not both: run the audit twice")
    if layout is None and inputs is None and not isinstance(attention, nn.Module):
        layout = "NHLE"
    if layout is not None:
        inputs_.check_layout(layout)
        if inputs is not None:
            raise ValueError("give layout, of query, key and value, or inputs, not both")
        if window is None:
            raise ValueError("an attention of query, key and value says nothing of its window: give window=")
        if heads < 1 or (kv_heads is not None and (kv_heads < 1 or heads % kv_heads)):
            raise ValueError(f"heads must be a multiple of kv_heads, got {heads} and {kv_heads}")
    if compile is not False and compile is not True and not isinstance(compile, str) and not callable(compile):
        raise TypeError(f"compile must be a bool or a backend of torch.compile, got {brief(compile)}")
    model = attention if layout is None and isinstance(attention, nn.Module) else _Holder(attention)
    auditor = _Auditor(
        model=model,
        window=window,
        inputs=inputs,
        patterns=(layers,) if isinstance(layers, str) else None if layers is None else tuple(layers),
        layout=layout,
        sizes={"heads": heads, "kv_heads": heads if kv_heads is None else kv_heads, "head_dim": head_dim},
        grouped=kv_heads is None and heads % 2 == 0,
        documents=None if documents is None else tuple(documents),
        padding=padding,
        device=torch.device("cpu" if device is None else device),
    )
    return auditor.audit(
        length=length,
        dtypes=None if dtypes is None else tuple(dtypes),
        train=train,
        cache=cache,
        backend=None if compile is False else "inductor" if compile is True else compile,
    )


class _Function(nn.Module):
    """A function as a module, so that it can be hooked."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *arguments: Any, **named: Any) -> Any:
        return self.function(*arguments, **named)


class _Holder(nn.Module):
    """A model of one layer, an attention."""

    def __init__(self, attention: Callable[..., Any]) -> None:
        super().__init__()
        self.attention = attention if isinstance(attention, nn.Module) else _Function(attention)

    def forward(self, *arguments: Any, **named: Any) -> Any:
        return self.attention(*arguments, **named)


@dataclass(frozen=True)
class _Way:
    """One way to run the model."""

    name: str
    length: int
    padding: tuple[int, int] = (0, 0)
    training: bool = False
    dtype: torch.dtype | None = None
    steps: tuple[tuple[int, int], ...] | None = None
    compiled: Any = None
    thorough: bool = False
    # Whether the batch has no copies: libraries choose masks and kernels by that, too.
    alone: bool = False
    # Of an attention of query, key and value: whether these are transposes, and how many heads of key and value there are.
    transposed: bool = False
    kv_heads: int | None = None
    # How many sequences the batch has.
    copies: int | None = None
    # Whether the query alone has a gradient.
    of_query: bool = False
    # Whether dropout drops: then a key that is not seen may have been dropped.
    dropout: bool = False
    # Whether the user asked for it: then it must run.
    asked: bool = False
    # Whether a language model may make the cache that it makes unasked.
    with_cache: bool = False


@dataclass
class _Auditor:
    """One audit: what it is told, and what it finds."""

    model: nn.Module
    window: Claims | None
    inputs: Inputs | None
    patterns: tuple[str, ...] | None
    layout: str | None
    sizes: dict[str, int]
    # Whether half as many heads of key and value are tried first.
    grouped: bool
    documents: tuple[int, ...] | None
    padding: tuple[int, int] | None
    device: torch.device
    notes: list[str] = field(default_factory=list)
    whole: list[str] = field(default_factory=list)
    ways: list[str] = field(default_factory=list)
    claims: dict[Key, Claim | None] = field(default_factory=dict)
    found: dict[Key, list[tuple[str, str, Fault]]] = field(default_factory=dict)
    # Where keys are missing in scattered places: by the number of positions, which.
    sparse: dict[Key, dict[int, Tensor]] = field(default_factory=dict)
    open: dict[Key, list[tuple[str, str, Fault]]] = field(default_factory=dict)
    first: dict[Key, tuple[Claim | None, Claim | None]] = field(default_factory=dict)
    # Whether it takes one sequence at a time.
    one_at_a_time: bool = False
    # Modules that were run, and of which nothing can be measured.
    unmeasured: set[str] = field(default_factory=set)

    def audit(
        self,
        *,
        length: int | None,
        dtypes: tuple[torch.dtype, ...] | None,
        train: bool,
        cache: bool | None,
        backend: Any,
    ) -> Audit:
        called_with = ""
        with _as_it_was(self.model):
            if self.layout is not None:
                called_with = self._heads(length or self._fixed_length() or SHORTEST)
            ways = list(self._ways(length, dtypes, train, cache, backend))
            for number, way in enumerate(ways):
                if way.copies is not None and self.one_at_a_time:
                    continue
                try:
                    self._run(way)
                except Exception as error:
                    if number == 0:
                        raise
                    if way.asked:
                        self.whole.append(f"{WHOLE}: {way.name}: cannot be run: {told(error)}")
                    else:
                        self.notes.append(f"{way.name}: {told(error)}")
                else:
                    self.ways.append(way.name)
        self._tell_what_was_not_measured()
        layers = [self._layer(key) for key in self.first]
        return Audit(tuple(layers), tuple(self.whole), tuple(self.ways), tuple(self.notes), called_with)

    def _tell_what_was_not_measured(self) -> None:
        """Attentions that could not be measured; patterns that name none that was; what joins positions and claims nothing."""
        measured_names = {plain_name(name) for name, _ in self.first}
        modules = dict(self.model.named_modules())
        for name, module in modules.items() if self.layout is None else ():
            plain = plain_name(name)
            inside = any(at and looks_like_attention(each) for at, each in module.named_modules())
            if plain in measured_names or inside or not looks_like_attention(module) or not self._is_chosen(name):
                continue
            if name in self.unmeasured:
                self.notes.append(
                    f"{plain}, which takes or gives no tensor with the positions in a dimension of their own"
                )
        for name, _ in self.first:
            below = f"{name}.".lstrip(".")
            claiming = any(
                other != name and other.startswith(below) and claim is not None
                for (other, _), claim in self.claims.items()
            )
            if claiming and self.claims[(name, 0)] is None:
                self.notes.append(
                    f"what {plain_name(name) or 'the model'} joins beside the layers in it, as it claims nothing itself"
                )
        for pattern in self.window if isinstance(self.window, Mapping) else ():
            named = {plain_name(name) for name in modules if fnmatchcase(plain_name(name), pattern)}
            chosen = {name for name in named if self._is_chosen(name)}
            if chosen and not any(fnmatchcase(name, pattern) for name in measured_names):
                some = ", ".join(sorted(chosen)[:3])
                self.whole.append(f"{WHOLE}: window for {pattern!r}: none of the modules it names was measured: {some}")

    def _heads(self, length: int) -> str:
        """Settle with how many heads of key and value the attention is called, and say it.

        Raises:
            ValueError: it cannot be called.
        """
        heads = self.sizes["heads"]
        way = _Way("", length)
        refused: Exception | None = None
        for kv_heads in (heads // 2, heads) if self.grouped else (self.sizes["kv_heads"],):
            self.sizes["kv_heads"] = kv_heads
            tensors = self._arguments(way).tensors
            shapes = f"query {tuple(tensors[0].shape)}, key and value {tuple(tensors[1].shape)}"
            try:
                self.model.eval()
                with torch.no_grad():
                    output = self.model(*tensors)
            except Exception as error:
                if refused is None:
                    refused, given = error, shapes
            else:
                if refused is not None:
                    self.notes.append(f"grouped heads, {given}: {told(refused)}")
                if not _outputs(output, length):
                    raise ValueError(
                        f"the attention must return a tensor of rows, as the query has them, of {shapes}; got {brief(output)}"
                    )
                return f"{shapes}, {self.layout}"
        assert refused is not None
        tried = given if given == shapes else f"{given}, nor with as many heads, {shapes}"
        raise ValueError(
            f"the attention cannot be called with {tried}; in layout {self.layout}, {tensors[0].dtype} on {self.device}: "
            f"{told(refused)}; give the layout=, heads=, kv_heads=, head_dim=, length= and device= that it takes"
        ) from refused

    def _ways(
        self, length: int | None, dtypes: tuple[torch.dtype, ...] | None, train: bool, cache: bool | None, backend: Any
    ) -> Iterator[_Way]:
        fixed = self._fixed_length()
        border = self._reach()
        if length is not None and fixed is not None and length != fixed:
            raise ValueError(f"length must be that of inputs and documents, {fixed}; got {length}")
        language = self.layout is None and self.inputs is None and inputs_.is_language_model(self.model)
        main = length or fixed or self._free(max(SHORTEST, border + min(border, SHORTEST) + 21))
        if main <= border + 1:
            self.notes.append(f"the border of a window that reaches {border} positions, in a sequence of {main}")
        padding = self.padding or (0, 0)
        yield _Way(f"eval, {main} positions", main, padding, thorough=True)
        yield _Way("a batch of one", main, padding, alone=True)
        if self.layout is not None:
            yield from self._of_tensors(main, padding)
        if train and not (isinstance(self.model, _Holder) and isinstance(self.model.attention, _Function)):
            yield _Way("training", main, padding, training=True)
            if any(True for _ in _dropouts(self.model)):
                yield _Way("training with dropout", main, padding, training=True, dropout=True)
        others = {
            str(dtype).removeprefix("torch."): dtype
            for dtype in ((torch.bfloat16,) if dtypes is None else dtypes)
            if dtype != self._dtype()
        }
        for name, dtype in others.items():
            yield _Way(name, main, padding, dtype=dtype, asked=dtypes is not None)
        if fixed is None and length is None:
            short = self._free(border + 13)
            if short < main:
                yield _Way(f"{short} positions", short, padding, thorough=True)
            longer = self._free_of_tiles(max(LONG, 2 * main + 1))
            if main < longer <= LONGEST:
                yield _Way(f"{longer} positions", longer, padding)
            else:
                self.notes.append(f"sequences of more than {main} positions: give length=")
        if language and self.documents is not None and cache is not False and inputs_.takes(self.model, "use_cache"):
            yield _Way("with the cache that it makes unasked", main, padding, with_cache=True)
        if language and self.padding is None and self.documents is None:
            some = max(main // 5, 3)
            yield _Way(f"{some} padded on the left", main, (some, 0))
            yield _Way(f"{some} padded on the right", main, (0, some))
            if train:
                yield _Way(f"{some} padded on the left, training", main, (some, 0), training=True)
            for name, dtype in others.items():
                yield _Way(f"{some} padded on the left, {name}", main, (some, 0), dtype=dtype)
        can_cache = language and inputs_.takes(self.model, "use_cache") and self.documents is None
        if cache or (cache is None and can_cache and self.padding is None and not _is_encoder(self.model)):
            if not can_cache:
                raise ValueError(
                    "cache=True needs a language model that takes input_ids and use_cache, without inputs and documents"
                )
            else:
                yield from self._cached(main, border, asked=bool(cache))
        if backend is not None:
            told_backend = backend if isinstance(backend, str) else getattr(backend, "__name__", "a backend")
            yield _Way(f"compiled by {told_backend}", main, padding, compiled=backend, asked=True)
            if train:
                yield _Way(
                    f"compiled by {told_backend}, training", main, padding, training=True, compiled=backend, asked=True
                )

    def _of_tensors(self, main: int, padding: tuple[int, int]) -> Iterator[_Way]:
        """How models call an attention of query, key and value."""
        yield _Way("as transposes", main, padding, transposed=True)
        if self.grouped and 1 < self.sizes["kv_heads"] < self.sizes["heads"]:
            yield _Way("one head of key and value", main, padding, kv_heads=1)
        yield _Way("two sequences", main, padding, copies=2)
        yield _Way("a gradient of the query alone", main, padding, of_query=True)

    def _cached(self, main: int, border: int, *, asked: bool) -> Iterator[_Way]:
        """The first tokens at once, then one by one; and in pieces of which some are longer than the window."""
        total = min(main, max(2 * border + 17, 41))
        begin = max(total - min(border + 13, 40), 1)
        singles = ((0, begin), *((place, place + 1) for place in range(begin, total)))
        yield _Way("with a cache, token by token", total, steps=singles, asked=asked)
        pieces, at = [], 0
        for size in (border // 2 + 1, 5, border + 3, 1, 7, 2, total):
            if at < total:
                pieces.append((at, min(at + size, total)))
                at = pieces[-1][1]
        yield _Way("with a cache, in pieces", total, steps=tuple(pieces), asked=asked)
        some = max(begin // 3, 1)
        yield _Way(f"with a cache, token by token, {some} padded on the left", total, (some, 0), steps=singles)

    def _fixed_length(self) -> int | None:
        if self.documents is not None:
            return sum(self.documents)
        if self.inputs is not None and (not callable(self.inputs) or isinstance(self.inputs, Tensor)):
            return inputs_.length_of(inputs_.given_arguments(self.inputs))
        return None

    def _reach(self) -> int:
        names = [name for name, _ in self.model.named_modules()]
        return max((reach(claim_of(self.window, name, self.model)) for name in names), default=0)

    def _dtype(self) -> torch.dtype:
        return next((each.dtype for each in self.model.parameters() if each.is_floating_point()), torch.float32)

    def _free(self, least: int) -> int:
        """A length that is no size of anything in the model, and that it can take."""
        most, taken = self._longest(), self._taken()
        length = least | 1
        while any(size % length == 0 for size in taken):
            length += 2
        return min(length, most - (most % 2 == 0)) if most is not None and most > 2 else length

    def _free_of_tiles(self, least: int) -> int:
        """Such a length that is a multiple of the tiles of kernels, where there is one."""
        most, taken = self._longest(), self._taken()
        for length in range(least - least % -LARGEST_TILE, min(2 * least, LONGEST) + 1, LARGEST_TILE):
            if (most is None or length <= most) and not any(size % length == 0 for size in taken):
                return length
        return self._free(least)

    def _taken(self) -> set[int]:
        """The sizes of anything in the model."""
        return {size for each in self.model.parameters() for size in each.shape} | set(self.sizes.values())

    def _longest(self) -> int | None:
        most = read(getattr(self.model, "config", None), "max_position_embeddings")
        return most if isinstance(most, int) else None

    def _arguments(self, way: _Way) -> Arguments:
        if self.layout is not None:
            return inputs_.attention_arguments(
                self.layout,
                way.length,
                heads=self.sizes["heads"],
                kv_heads=way.kv_heads or self.sizes["kv_heads"],
                head_dim=self.sizes["head_dim"],
                device=self.device,
                dtype=way.dtype or torch.float32,
                transposed=way.transposed,
            )
        if self.inputs is not None:
            given = self.inputs
            if callable(given) and not isinstance(given, Tensor):
                given = given(way.length)
            return inputs_.given_arguments(given).cast(way.dtype)
        if inputs_.is_language_model(self.model):
            return inputs_.language_arguments(
                self.model, way.length, padding=way.padding, documents=self.documents, with_cache=way.with_cache
            )
        return inputs_.guessed_arguments(self.model, way.length).cast(way.dtype)

    def _run(self, way: _Way) -> None:
        model = self.model
        if way.dtype is not None and self.layout is None:
            model = copy.deepcopy(model).to(way.dtype)
        model.train(way.training)
        arguments = self._arguments(way)
        sequence = Sequence.of(way.length, self.documents, way.padding)
        with _without_dropout(model) if way.training and not way.dropout else nullcontext():
            sites, batch = self._sites(model, arguments, way)
            if way.compiled is not None:
                with _compiling():
                    self._measure(
                        way, model, torch.compile(model, backend=way.compiled), sites, arguments, sequence, batch
                    )
                    self._compare(way, model, arguments)
            else:
                if way.steps is not None:
                    self._compare_in_steps(way, model, arguments)
                self._measure(way, model, model, sites, arguments, sequence, batch)

    def _sites(self, model: nn.Module, arguments: Arguments, way: _Way) -> tuple[list[Site], int]:
        """The layers to audit, and how many copies of the sequence go in a batch."""
        names = {key[0] for key in self.first}

        def wanted(name: str, module: nn.Module) -> bool:
            if name in names:
                return True
            if isinstance(model, _Holder):
                return name == "attention"
            inside = [each for at, each in module.named_modules() if at and looks_like_attention(each)]
            return looks_like_attention(module) and not inside and claim_of(self.window, name, model) is not None

        whole = way if way.steps is None else _Way(way.name, way.length)
        batch = 5 if arguments.batched and not way.alone else 1
        while True:
            run = Run(lambda count: _called(model, self._arguments(whole), count), way.length, ((0, way.length),))
            try:
                unmeasured: set[str] = set()
                sites = discover(model, run, batch, wanted, unmeasured)
                if not self.first:
                    self.unmeasured = unmeasured
                break
            except NothingFound:
                if batch == 1:
                    raise
                batch = 1
            except Exception as error:
                # One copy is what it was first called with, where it is an attention.
                if batch == 1 or self.layout is None:
                    raise
                note = f"a batch of more than one: {told(error)}"
                self.notes += [note] if note not in self.notes else []
                batch = 1
        sites = [site for site in sites if self._is_chosen(site.key[0])]
        if self.first:
            # What joins positions in one way to run the model alone is audited there, too.
            sites.sort(key=lambda site: site.key not in self.first)
        if not sites:
            raise ValueError(f"no layer that joins positions has a name like {', '.join(self.patterns or ())}")
        for site in sites:
            if site.key not in self.claims:
                self.claims[site.key] = claim_of(self.window, site.key[0], model)
        if batch == 1:
            self.one_at_a_time |= not way.alone
            return sites, 1
        if way.copies is not None:
            return sites, way.copies
        width = sum(axes.first(base).flatten(2).shape[2] for site in sites for axes, base in site.sources.values())
        most = min(
            MOST_OUTPUTS // max(width * way.length, 1), MOST_SCORES // (4 * way.length**2), (way.length + 1) // 2
        )
        # Never so many that it is mistaken for the length.
        return sites, max(min(most, 8 if way.compiled is not None else most), 2)

    def _is_chosen(self, name: str) -> bool:
        return self.patterns is None or any(fnmatchcase(plain_name(name), pattern) for pattern in self.patterns)

    def _measure(
        self,
        way: _Way,
        model: nn.Module,
        called: Callable[..., Any],
        sites: list[Site],
        arguments: Arguments,
        sequence: Sequence,
        batch: int,
    ) -> None:
        steps = way.steps or ((0, way.length),)
        if way.steps is None:
            run = Run(lambda count: _called(called, arguments, count), way.length, steps)
        else:
            batch = min(batch, 16)
            cache = _name_of_cache(model)
            run = Run(lambda count: _in_steps(called, cache, arguments.repeated(count), steps), way.length, steps)
        probe = Probe(sites, run, inner=way.compiled is None, only_first=way.of_query)
        thorough = way.thorough and way.length <= EXHAUSTIVE and way.length <= 6 * batch
        columns = list(range(way.length)) if thorough else _sampled(sequence)
        if (way.alone or way.copies) and self.documents is None:
            # Each takes a run of its own.
            columns = columns[1::3]
        dependence: list[tuple[int, list[int]]] = []
        if not way.of_query:
            probe.forward(columns, batch)
        if way.steps is None and not way.of_query:
            probe.backward(columns, batch)
            probe.through = probe.takes_keys_of_others()
            if probe.through:
                probe.backward(columns, batch)
        if way.steps is None and not way.alone:
            last = way.length - 1 - way.padding[1]
            dependence.append((last, self._around(last, sites, columns, way.length)))
            if thorough:
                dependence.append((way.length // 2, columns))
        for row, some in dependence:
            probe.dependence([row], some, batch)
        for draw in (*DRAWS[1:], *OTHER_DRAWS):
            if way.dropout or way.of_query:
                break
            rows, keys = self._missing(probe, sites, sequence, scattered=draw in OTHER_DRAWS)
            if not rows and not keys:
                break
            self._again(probe, draw, rows, keys, columns, dependence, batch, forward_only=way.steps is not None)
        if way.steps is not None:
            self._compare_cached(way, probe, model, sites, arguments, sequence)
        if way.thorough and way.steps is None:
            self._measure_parts(probe, sites, sequence, columns, batch)
        for site in sites:
            self._judge(way, probe, site, sequence, thorough)

    def _measure_parts(
        self, probe: Probe, sites: list[Site], sequence: Sequence, columns: list[int], batch: int
    ) -> None:
        """What only single tensors, heads and rows tell: whether rows see their own key, and what a query's gradient is of."""
        apart = self.layout is not None
        pairs = sorted({pair for site in sites for pair in _inside(sequence, self.claims[site.key])})
        rows = _sampled(sequence)
        rows = rows[:: max(len(rows) * self.sizes["heads"] // (2 * batch), 1)]
        for number, draw in enumerate((*DRAWS, *OTHER_DRAWS)):
            honest = [site for site in sites if self.claims[site.key] is not None and not self.found.get(site.key)]
            found = [probe.found[site.key] for site in honest]
            if apart and (not number or any(_lacks_own(each, sequence, self.claims[each.key]) for each in found)):
                probe.keys_alone(columns, batch, draw)
            if draw in OTHER_DRAWS:
                continue
            if apart and (not number or any(_lacks(each.by_head(), sequence, self.claims[each.key]) for each in found)):
                probe.by_head(rows, batch, draw)
            if pairs and (
                not number or any(_lacks(each.own(apart=apart), sequence, self.claims[each.key]) for each in found)
            ):
                probe.own_gradients(pairs, batch, draw, apart=apart)

    def _around(self, row: int, sites: list[Site], columns: list[int], length: int) -> list[int]:
        """Positions at the borders of what a row may see, and a few others."""
        far = {reach(self.claims[site.key]) for site in sites}
        near = {row + sign * (at + step) for at in far for sign in (-1, 1) for step in (-1, 0, 1, 2)}
        return sorted({each for each in (*near, *columns[:: max(len(columns) // 4, 1)]) if 0 <= each < length})

    def _missing(
        self, probe: Probe, sites: list[Site], sequence: Sequence, *, scattered: bool
    ) -> tuple[set[int], set[int]]:
        """The rows that lack a key in the backward, and the keys that lack a row in the forward, of layers honest so far."""
        lacking: tuple[set[int], set[int]] = (set(), set())
        for site in sites:
            claim = self.claims[site.key]
            if claim is None or self.found.get(site.key):
                continue
            for found, name, dim in zip(lacking, ("backward", "forward"), (1, 0)):
                seen = probe.found[site.key].seen(name)
                for side in ("left", "right"):
                    hidden = holes(seen, sequence, claim, side)
                    pairs = hidden.scattered if scattered else hidden.scattered | hidden.systematic
                    found.update(pairs.any(dim).nonzero()[:, 0].tolist())
                if name == "backward":
                    found.update(rows_without_own(seen, sequence, claim))
        return lacking

    @staticmethod
    def _again(
        probe: Probe,
        draw: Draw,
        rows: set[int],
        keys: set[int],
        columns: list[int],
        dependence: list[tuple[int, list[int]]],
        batch: int,
        *,
        forward_only: bool,
    ) -> None:
        """Those rows and keys once more, with other numbers."""
        if keys:
            probe.forward(sorted(keys & set(columns)) or columns, batch, draw)
        if rows and not forward_only:
            probe.backward(sorted(rows & set(columns)) or columns, batch, draw)
        # It has the forward with gradients, too.
        for row, some in dependence if keys else ():
            probe.dependence([row], sorted(keys & set(some)) or some, batch, draw)

    def _judge(self, way: _Way, probe: Probe, site: Site, sequence: Sequence, thorough: bool) -> None:
        claim, found = self.claims[site.key], probe.found[site.key]
        noted = self.found.setdefault(site.key, [])
        open_ = self.open.setdefault(site.key, [])
        here = []
        # Nothing at all: an output that is multiplied by 0, as one that is about to be trained may be.
        without = found.without_gradient or not (found.touched or way.of_query)
        # It has all its layers in it, whose outputs it adds to what it joins itself.
        of_tokens = bool(site.tokens)
        for name in ("forward", "backward", "dependence"):
            if name != "forward" and (way.steps is not None or without):
                continue
            if name == "backward" and way.of_query:
                continue
            padded = sequence.document < 0 if name != "forward" and way.padding != (0, 0) else None
            seen = found.seen(name, padded)
            parts = "heads" if name == "forward" else "gradients"
            sparse = None
            if site.key in self.sparse:
                sparse = Sparse(self.sparse[site.key].get(len(sequence)), not thorough)
            if way.dropout or way.of_query or of_tokens or name == "dependence":
                # What a row's gradients do not change with, its backward told already: by every row.
                seen = seen.beyond(sequence, claim)
            noted += [(way.name, name, fault) for fault in faults(seen, sequence, claim, parts, sparse)]
            if name != "dependence" and not (way.dropout or way.of_query or of_tokens):
                texts, pairs = gaps(seen, sequence, claim, parts, sparse)
                open_ += [(way.name, name, gap) for gap in texts]
                if thorough and texts:
                    self.sparse[site.key] = self.sparse.get(site.key, {})
                    known = self.sparse[site.key].get(len(sequence), torch.zeros_like(pairs))
                    self.sparse[site.key][len(sequence)] = known | pairs
            if name == "backward" and not way.dropout:
                noted += [(way.name, name, fault) for fault in own_key_fault(seen, sequence, claim)]
            if name != "dependence":
                here.append(measured(seen, sequence, claim))
        if claim is not None and site.key not in self.first and not found.seen("forward").known.any():
            # Nothing that can be compared came out: that is no proof.
            self.claims[site.key] = None
            self.notes.append(
                f"{way.name}: {plain_name(site.key[0]) or 'the model'}, which claims {told_claim(claim)}, "
                "gives no tensor with the positions in a dimension of their own"
            )
        if without and way.steps is None and not of_tokens:
            self.notes.append(
                f"{way.name}: the backward of {plain_name(site.key[0]) or 'the model'}, whose output gives no gradient"
            )
        # Where an attention chooses among its keys, each row and each head chooses others.
        chooses = site.key in self.sparse
        if claim is not None and not (without or noted or chooses):
            own = found.own(apart=self.layout is not None)
            wrong = faults(own, sequence, claim, "gradients")
            noted += [(way.name, "dependence", Fault(f"of the query, {fault.text}", fault.example)) for fault in wrong]
        if self.layout is not None and not (without or chooses):
            by_head = found.by_head()
            if by_head.known.any():
                noted += [(way.name, "backward", fault) for fault in faults(by_head, sequence, claim, "gradients")]
        if self.layout is not None:
            alone = found.seen("keys alone")
            noted += [(way.name, "forward", fault) for fault in own_key_fault(alone, sequence, claim)]
            if not without:
                noted += [
                    (
                        way.name,
                        "backward",
                        Fault(f"no gradient reaches the {tensor}", "though the output depends on it"),
                    )
                    for place, tensor in enumerate(("query", "key", "value"))
                    if place in found.depends_on and not found.has_gradient(place)
                ]
        if found.not_finite:
            noted.append((way.name, "backward", Fault("a gradient is not finite", f"of {len(sequence)} positions")))
        if site.key not in self.first:
            self.first[site.key] = (here[0], here[-1])

    def _compare_cached(
        self, way: _Way, probe: Probe, model: nn.Module, sites: list[Site], arguments: Arguments, sequence: Sequence
    ) -> None:
        """The outputs of each layer with a cache, against those without, for what first came in."""
        whole = Probe(
            sites, Run(lambda count: _called(model, arguments, count), way.length, ((0, way.length),)), inner=False
        )
        once, pieces = whole.reference(2), probe.reference(2)
        for place, expected in once.items():
            rows = [row for row in _apart(pieces.get(place), expected) if sequence.document[row] >= 0]
            if rows:
                fault = Fault(
                    "the output differs from that without a cache", f"rows {rows[0]} to {rows[-1]} of {way.length}"
                )
                self.found.setdefault(place[0], []).append((way.name, "forward", fault))

    def _compare_in_steps(self, way: _Way, model: nn.Module, arguments: Arguments) -> None:
        """What the whole model gives with a cache, against what it gives without."""
        assert way.steps is not None
        with torch.no_grad():
            plain = _called(model, arguments, 1)
            pieces = _in_steps(model, _name_of_cache(model), arguments, way.steps)
        for name in (name for name in RESULTS if isinstance(getattr(plain, name, None), Tensor)):
            wanted = getattr(plain, name)[0]
            given = torch.cat([getattr(piece, name)[0] for piece in pieces])
            # What a model gives of the last position alone cannot be compared.
            if given.shape != wanted.shape:
                self.notes.append(
                    f"{way.name}: {name}, of which it gives {tuple(given.shape)}, not {tuple(wanted.shape)}"
                )
                continue
            rows = [row for row in _apart(given, wanted) if row >= way.padding[0]]
            if rows:
                where = f"rows {rows[0]} to {rows[-1]} of {way.length}"
                self.whole.append(f"{WHOLE}: {way.name}: {name}: the output differs from that without a cache: {where}")

    def _compare(self, way: _Way, model: nn.Module, arguments: Arguments) -> None:
        """The whole compiled model, without hooks, against the model as it is."""
        torch._dynamo.reset()
        compiled = torch.compile(model, backend=way.compiled)
        with torch.no_grad():
            torch.manual_seed(0)
            expected = _outputs(_called(model, arguments, 1), way.length)
            torch.manual_seed(0)
            actual = _outputs(_called(compiled, arguments, 1), way.length)
        for one, other in zip(expected, actual):
            rows = _apart(other, one)
            if rows:
                where = f"rows {rows[0]} to {rows[-1]} of {way.length}"
                self.whole.append(f"{WHOLE}: {way.name}: the output differs from that of the model as it is: {where}")

    def _layer(self, key: Key) -> LayerAudit:
        name, number = key
        again = sum(other[0] == name for other in self.first) > 1
        forward, backward = self.first[key]
        return LayerAudit(
            f"{plain_name(name) or type(self.model).__name__}{f' (call {number + 1})' if again else ''}",
            self.claims[key],
            forward,
            backward,
            tuple(_gathered(self.found.get(key, []), self.ways)),
            tuple(_gathered(self.open.get(key, []), self.ways)),
        )


# Rows and keys whose gradients are looked at one by one: of so many rows, so many keys each.
ROWS_APART = 6
KEYS_APART = 24


def _inside(sequence: Sequence, claim: Claim | None) -> list[tuple[int, int]]:
    """Some rows with keys that a claim says they see: those at its border, the nearest, and some between, of each the same."""
    if claim is None:
        return []
    expected = sequence.expected(claim) & ~torch.eye(len(sequence), dtype=torch.bool)
    counts = expected.sum(1)
    # The gradient of a row that sees one key is 0.
    full_rows = ((counts == counts.max()) & (counts > 0)).nonzero()[:, 0].tolist()
    if not full_rows:
        return []
    pairs = []
    for row in dict.fromkeys(
        full_rows[place * (len(full_rows) - 1) // (ROWS_APART - 1)] for place in range(ROWS_APART)
    ):
        keys = expected[row].nonzero()[:, 0].tolist()
        some = [*keys[:3], *keys[-3:], *keys[:: max(len(keys) // (KEYS_APART - 6), 1)]]
        pairs += [(row, key) for key in (keys if len(keys) <= KEYS_APART else some)]
    return pairs


def _lacks(seen: Seen, sequence: Sequence, claim: Claim | None) -> bool:
    """Whether any part of what was seen lacks a key of a claim."""
    return claim is not None and any(
        bool((sequence.expected(claim) & part.known & ~part.found).fill_diagonal_(False).any()) for part in seen.parts
    )


def _lacks_own(found: Measured, sequence: Sequence, claim: Claim | None) -> bool:
    return bool(rows_without_own(found.seen("keys alone"), sequence, claim))


def _gathered(found: list[tuple[str, str, Fault]], ways: list[str]) -> Iterator[str]:
    """Each fault once, with all the ways in which it was seen."""
    texts = dict.fromkeys(fault.text for _, _, fault in found)
    for text in texts:
        same = [(way, direction, fault) for way, direction, fault in found if fault.text == text]
        directions = list(dict.fromkeys(direction for _, direction, _ in same))
        if len(directions) > 1 and directions[-1] == "dependence":
            directions.pop()
        where = list(dict.fromkeys(way for way, _, _ in same))
        told_where = "" if set(where) >= set(ways) else f" ({'; '.join(where)})"
        told_directions = " and ".join(directions).replace("dependence", "backward, what a row's gradients depend on")
        yield f"{told_directions}: {text}{told_where}: {same[0][2].example}"


def _called(model: Callable[..., Any], arguments: Arguments, batch: int) -> Any:
    repeated = arguments.repeated(batch)
    return model(*repeated.positional, **dict(repeated.named))


# What transformers' models give for each position.
RESULTS = ("logits", "last_hidden_state")


def _name_of_cache(model: nn.Module) -> str:
    """It has changed in version 5.24 of transformers, which takes the other with a warning."""
    return "cache" if inputs_.takes(model, "cache") else "past_key_values"


def _in_steps(
    model: Callable[..., Any], name: str, arguments: Arguments, steps: tuple[tuple[int, int], ...]
) -> list[Any]:
    """The sequence in pieces, with what the model gives as its cache: what it gives of each."""
    named = dict(arguments.named)
    tokens, mask, positions = named["input_ids"], named.get("attention_mask"), named.get("position_ids")
    cache: dict[str, Any] = {}
    outputs = []
    for begin, end in steps:
        given: dict[str, Any] = {} if mask is None else {"attention_mask": mask[:, :end]}
        if positions is not None:
            given["position_ids"] = positions[:, begin:end]
        output = model(input_ids=tokens[:, begin:end], use_cache=True, **given, **cache)
        if getattr(output, name, None) is None:
            raise ValueError(f"the model gives no {name}")
        cache = {name: getattr(output, name)}
        outputs.append(output)
    return outputs


def _outputs(output: Any, length: int) -> list[Tensor]:
    """The tensors of features in what a model gives, each with the positions first."""
    from attnreg.testing.audit_probing import _flat, axes_of

    found = []
    values = list(output.values()) if isinstance(output, Mapping) else output
    for leaf in _flat(values)[0]:
        axes = axes_of(leaf, 1, length)
        if axes is not None:
            found.append(axes.first(leaf)[0])
    return found


def _apart(actual: Tensor | None, expected: Tensor) -> list[int]:
    """The rows in which two outputs differ by more than rounding does."""
    if actual is None or actual.shape != expected.shape:
        return []
    one, other = actual.double().flatten(1), expected.double().flatten(1)
    rounding = {torch.float64: 1e-9, torch.float32: 1e-4}.get(expected.dtype, 0.05)
    wrong = ((one - other).abs() > rounding * (other.abs().amax(1, keepdim=True) + other.abs().mean())).any(1)
    return [int(row) for row in wrong.nonzero()[:, 0]]


def _sampled(sequence: Sequence) -> list[int]:
    """Positions at the ends of the sequence and of its documents, at the borders of tiles and in the middle."""
    length = len(sequence)
    inside = (sequence.document >= 0).nonzero()[:, 0]
    begin, end = int(inside.min()), int(inside.max()) + 1
    wished = [begin - 1, begin, begin + 1, 63, 64, 128, length // 2, end - 2, end - 1, end]
    for border in (sequence.document.diff().nonzero()[:, 0] + 1).tolist():
        wished += [border - 1, border, border + 1]
    wished += (
        [127, 255, 256, 511, 512] if length > EXHAUSTIVE else [0, begin + 3, 16, 65, 127, 3 * length // 4, length - 1]
    )
    return sorted({each for each in wished if 0 <= each < length})


def _is_encoder(model: nn.Module) -> bool:
    config = getattr(model, "config", None)
    return bool(getattr(config, "is_encoder_decoder", False)) or any(
        getattr(module, "is_causal", None) is False for module in model.modules()
    )


@contextmanager
def _compiling() -> Iterator[None]:
    """A compiler that starts anew, and gives up on no layer because it compiled others."""
    torch._dynamo.reset()
    try:
        with torch._dynamo.config.patch(recompile_limit=1000, accumulated_recompile_limit=10000):
            yield
    finally:
        torch._dynamo.reset()


@contextmanager
def _as_it_was(model: nn.Module) -> Iterator[None]:
    """The model's modes and torch's random numbers are afterwards what they were."""
    modes = [(module, module.training) for module in model.modules()]
    with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if torch.cuda.is_available() else []):
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training


@contextmanager
def _without_dropout(model: nn.Module) -> Iterator[None]:
    """Every dropout that says so is 0: a dropped weight would look like a key that is not seen."""
    changed = list(_dropouts(model))
    for owner, name, _ in changed:
        setattr(owner, name, 0.0)
    try:
        yield
    finally:
        for owner, name, value in changed:
            setattr(owner, name, value)


def _dropouts(model: nn.Module) -> Iterator[tuple[Any, str, float]]:
    """The probabilities of dropout that are not 0: whose, the name, the value."""
    configs = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    owners: list[Any] = [*model.modules(), *(each for each in configs.values() if hasattr(each, "__dict__"))]
    for owner in owners:
        for name, value in list(vars(owner).items()):
            if (
                isinstance(value, float)
                and 0 < value < 1
                and ("drop" in name or (name == "p" and isinstance(owner, nn.modules.dropout._DropoutNd)))
            ):
                yield owner, name, value
