"""What positions each layer of a model joins: its input is replaced at one position, and its output is compared.

A hook before each audited module replaces what comes in by what came in at first, with one position changed: so every run of the
model measures each layer alone, with the masks and positions that the model gives it. The copies in a batch have another position
changed each. For gradients the input is a leaf of its own, so that no gradient crosses a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from attnreg.testing.audit_claims import looks_like_attention, own_window
from attnreg.testing.audit_judging import Part, Seen

# A call of a module in a run: its name, and how often it was called before.
Key = tuple[str, int]
# Of one tensor of a call: the module, "in" or "out", and its place among the leaves.
Place = tuple[Key, str, int]
Each = TypeVar("Each")

# Modules of torch that never join positions, and are no layer of their own.
POSITIONWISE = (
    nn.Linear,
    nn.Embedding,
    nn.LayerNorm,
    nn.Dropout,
    nn.Identity,
    nn.ReLU,
    nn.GELU,
    nn.SiLU,
    nn.Tanh,
    nn.Sigmoid,
)


@dataclass(frozen=True)
class Draw:
    """What comes in, and what replaces it at one position.

    Attributes:
        scale: how large what comes in is, in units of its own size.
        noise: how large what replaces it is.
        order: of the positions of what comes in: 0 is as it came, others are other random orders, with other replacements.
        sign: of what replaces it.
    """

    scale: float
    noise: float
    order: int = 0
    sign: int = 1


# The first of all, then others where keys seemed to be missing, as a sharp softmax hides them.
DRAWS = (Draw(1.0, 4.0), Draw(0.05, 0.5), Draw(0.005, 0.05), Draw(1.0, 32.0))
# Where keys are missing in scattered places, as an attention hides them that chooses keys by what they hold.
OTHER_DRAWS = (Draw(1.0, 4.0, 0, -1), *(Draw(1.0, 4.0, order, sign) for order in (1, 2, 3) for sign in (1, -1)))
# More than what runs that are told the same differ by.
NOISE = 16.0


# Of modules that are no attention: what changes by fewer units in the last place of the largest number is rounding.
ROUNDING = 16.0
# The ids of tokens below this one often mean padding, and the begin and the end of documents.
SPECIAL = 3


class NothingFound(ValueError):
    """No module that joins positions was found."""


@dataclass(frozen=True)
class Axes:
    """Where a tensor has the batch, if it has it, and the positions."""

    batch: int | None
    position: int

    def first(self, tensor: Tensor) -> Tensor:
        """The tensor with batch and position as its first dimensions."""
        if self.batch is None:
            return tensor.movedim(self.position, 0)[None]
        return tensor.movedim((self.batch, self.position), (0, 1))


def axes_of(tensor: object, batch: int, length: int) -> Axes | None:
    """Where a tensor of features has batch and positions; None for what is none, such as a mask."""
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or tensor.dim() < 2:
        return None
    positions = [place for place, size in enumerate(tensor.shape) if size == length]
    if len(positions) != 1 or positions[0] == tensor.dim() - 1:
        return None
    if batch == 1:
        return Axes(0 if tensor.shape[0] == 1 and positions[0] != 0 else None, positions[0])
    batches = [place for place, size in enumerate(tensor.shape[:-1]) if size == batch and place != positions[0]]
    return Axes(batches[0], positions[0]) if batches else None


def tokens_of(tensor: object, batch: int, length: int) -> Axes | None:
    """Where a tensor of token ids has batch and positions; None for other numbers: position ids, documents, masks."""
    if not isinstance(tensor, Tensor) or tensor.dtype not in (torch.int64, torch.int32):
        return None
    if tuple(tensor.shape) not in ((batch, length), (length,)):
        return None
    steps = tensor.reshape(-1, length)[0].diff()
    counted = (steps >= 0) & (steps <= 1)
    return None if 2 * int(counted.sum()) > length else Axes(0 if tensor.dim() == 2 else None, tensor.dim() - 1)


@dataclass
class Site:
    """A call of an audited module.

    Attributes:
        key: which.
        module: the module.
        sources: of the tensors that come in, by place among the leaves, their axes and what they hold for one sequence.
        tokens: likewise of token ids, of a module that takes nothing else.
        outs: of those that come out, their axes.
        inner: of those that its children take and return.
    """

    key: Key
    module: nn.Module
    sources: dict[int, tuple[Axes, Tensor]] = field(default_factory=dict)
    tokens: dict[int, tuple[Axes, Tensor]] = field(default_factory=dict)
    outs: dict[int, Axes] = field(default_factory=dict)
    inner: dict[Place, Axes] = field(default_factory=dict)

    @property
    def head_dim(self) -> int | None:
        """The features of a head, where the module says it."""
        config = getattr(self.module, "config", None)
        for owner in (self.module, config):
            size = getattr(owner, "head_dim", None)
            if isinstance(size, int) and size > 0:
                return size
        for owner in (self.module, config):
            for name in ("num_heads", "num_attention_heads", "n_heads", "n_head", "nhead", "heads"):
                heads = getattr(owner, name, None)
                if isinstance(heads, int) and heads > 0:
                    for axes, base in self.sources.values():
                        width = axes.first(base).shape[-1]
                        if base.dim() - (axes.batch is not None) == 2 and width % heads == 0:
                            return int(width // heads)
        return None


@dataclass(frozen=True)
class Run:
    """How the model is run.

    Attributes:
        call: runs the model with so many copies of the sequence in a batch, on the given steps.
        length: of the sequence.
        steps: the pieces in which the sequence is handed over, one for all but a cache.
        seed: of the random numbers of each run.
    """

    call: Callable[[int], Any]
    length: int
    steps: tuple[tuple[int, int], ...]
    batched: bool = True
    seed: int = 0


class Hooked:
    """The hooks of one audit; what they do is changed between runs, they are not."""

    def __init__(self, modules: dict[str, nn.Module]) -> None:
        """Nothing is hooked yet.

        Args:
            modules: those to hook, by name.
        """
        self.modules = modules
        self.before: Callable[[Key, list[Any]], list[Any] | None] = lambda key, leaves: None
        self.after: Callable[[Key, list[Any]], None] = lambda key, leaves: None
        self.counts: dict[str, int] = {}
        self.open: list[Key] = []

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """With the hooks in place."""
        handles = []
        try:
            for name, module in self.modules.items():
                before, after = self._hooks(name)
                handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
                handles.append(module.register_forward_hook(after))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hooks(self, name: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
        def before(module: nn.Module, args: Any, kwargs: Any) -> Any:
            key = (name, self.counts.get(name, 0))
            self.counts[name] = key[1] + 1
            leaves, spec = _flat((args, kwargs))
            changed = self.before(key, leaves)
            self.open.append(key)
            return None if changed is None else tree_unflatten(changed, spec)

        def after(module: nn.Module, args: Any, output: Any) -> None:
            key = self.open.pop()
            self.after(key, _flat(output)[0])

        # A layer may be compiled inside.
        return torch.compiler.disable(before), torch.compiler.disable(after)

    def run(self, run: Run, batch: int) -> Any:
        """Run the model with the random numbers of every other run."""
        self.counts.clear()
        self.open.clear()
        # Of the CPU alone where nothing else is: many runs are short.
        (torch.manual_seed if torch.accelerator.is_available() else torch.default_generator.manual_seed)(run.seed)
        return run.call(batch)


def _flat(tree: Any) -> tuple[list[Any], Any]:
    # A cache is a leaf, though its library may have taught torch to take it apart: the copy of it would be another cache.
    return tree_flatten(tree, is_leaf=lambda node: not isinstance(node, (tuple, list, dict)))


def _leaves_of(modules: dict[str, nn.Module]) -> set[str]:
    return {
        name for name, module in modules.items() if isinstance(module, POSITIONWISE) and _is_as_torch_has_it(module)
    }


def _is_as_torch_has_it(module: nn.Module) -> bool:
    """Whether its forward is torch's: another may look at other positions."""
    return "forward" not in vars(module) and type(module).forward.__module__.startswith("torch.")


def _rounds(module: nn.Module) -> bool:
    """Whether what changes in the last bits is rounding: of experts, whose products depend on how many tokens they get.

    An attention is not among them: of it every bit counts.
    """
    return own_window(module, causal=True) is None and not any(map(looks_like_attention, module.modules()))


def discover(
    model: nn.Module,
    run: Run,
    batch: int,
    wanted: Callable[[str, nn.Module], bool],
    unmeasured: set[str] | None = None,
) -> list[Site]:
    """The calls of modules that join positions by themselves, and of those that are ``wanted``, with what came in.

    Every module's input is replaced at one position. One that joins positions by itself is one whose output changes at others,
    where none of its children explains it; or one that hands a child what no earlier child explains. Of what takes token ids one
    of these is replaced.

    Args:
        model: the whole.
        run: how it is run.
        batch: of how many copies.
        wanted: of a name and a module, whether it is audited though it joins nothing.
        unmeasured: takes the names of modules that take, or give, no tensor with positions.

    Raises:
        NothingFound: there is none.
    """
    modules = dict(model.named_modules())
    hooked = Hooked({name: module for name, module in modules.items() if name not in _leaves_of(modules)})
    changed = run.length // 2
    taken: dict[Key, dict[int, tuple[Axes, Tensor]]] = {}
    received: dict[Key, dict[int, tuple[Axes, Tensor]]] = {}
    given: dict[Key, dict[int, tuple[Axes, Tensor]]] = {}

    def keep(leaves: list[Any], axes_of: Callable[..., Axes | None] = axes_of) -> dict[int, tuple[Axes, Tensor]]:
        found = {}
        for place, leaf in enumerate(leaves):
            axes = axes_of(leaf, batch, run.length)
            if axes is not None:
                one = leaf.detach() if axes.batch is None else leaf.detach().narrow(axes.batch, 0, 1)
                found[place] = (axes, one.clone())
        return found

    def differ(leaves: list[Any], before: dict[int, tuple[Axes, Tensor]], *, rounds: bool = False) -> Tensor:
        found = torch.zeros(run.length, dtype=torch.bool)
        for place, (axes, base) in before.items():
            leaf = leaves[place].detach() if place < len(leaves) else None
            if isinstance(leaf, Tensor) and leaf.shape[axes.position] == run.length:
                one = leaf if axes.batch is None else leaf.narrow(axes.batch, 0, 1)
                limit = ROUNDING * torch.finfo(base.dtype).eps * float(base.abs().max()) if rounds else 0.0
                found |= _positions(axes, (one - base).abs() > limit if rounds else one != base).any(0).cpu()
        return found

    def take(key: Key, leaves: list[Any]) -> None:
        taken[key] = keep(leaves) or keep(leaves, tokens_of)

    def give(key: Key, leaves: list[Any]) -> None:
        given[key] = keep(leaves)

    def replace(key: Key, leaves: list[Any], at: int | None) -> list[Any] | None:
        replaced = list(leaves)
        for place, (axes, base) in taken.get(key, {}).items():
            replaced[place] = _with_noise(leaves[place], axes, base, [at] * batch, DRAWS[0], place)
        return replaced if taken.get(key) else None

    def replace_nothing(key: Key, leaves: list[Any]) -> list[Any] | None:
        received[key] = keep(leaves) | keep(leaves, tokens_of)
        return replace(key, leaves, None)

    with hooked.hooked(), torch.no_grad():
        hooked.before = take
        hooked.run(run, batch)
        # What comes in lies in memory as it will when it is replaced, which may change the last bits of what comes out.
        hooked.before, hooked.after = replace_nothing, give
        hooked.run(run, batch)
        explained = {key: torch.zeros(run.length, dtype=torch.bool) for key in taken}
        joins: set[Key] = set()

        def change(key: Key, leaves: list[Any]) -> list[Any] | None:
            if key not in taken:
                return None
            sources = received.get(key, taken[key])
            if hooked.open and hooked.open[-1] in explained:
                parent = hooked.open[-1]
                beyond = differ(leaves, sources) & ~explained[parent]
                beyond[changed] = False
                if beyond.any():
                    joins.add(parent)
            return replace(key, leaves, changed)

        def compare(key: Key, leaves: list[Any]) -> None:
            if key not in taken:
                return
            out = differ(leaves, given.get(key, {}))
            rounds = _rounds(modules[key[0]])
            beyond = (differ(leaves, given.get(key, {}), rounds=True) if rounds else out) & ~explained[key]
            beyond[changed] = False
            if beyond.any():
                joins.add(key)
            if hooked.open and hooked.open[-1] in explained:
                explained[hooked.open[-1]] |= out

        hooked.before, hooked.after = change, compare
        hooked.run(run, batch)
    if unmeasured is not None:
        seen = {key[0] for key, each in taken.items() if each and given.get(key)}
        unmeasured |= {name for name, _ in taken if name not in seen}
    attentions = [f"{key[0]}.".lstrip(".") for key in joins if looks_like_attention(modules[key[0]])]
    sites = []
    for key, sources in taken.items():
        # What an attention does besides, position by position, is no layer of its own, whatever its class is called: with what
        # comes into it put back, the attention around it would seem to see nothing.
        is_part = key not in joins and key[0].startswith(tuple(attentions))
        if sources and not is_part and (key in joins or wanted(key[0], modules[key[0]])):
            tokens = {place: each for place, each in sources.items() if not each[1].is_floating_point()}
            outs = {place: axes for place, (axes, _) in given.get(key, {}).items()}
            sites.append(Site(key, modules[key[0]], {} if tokens else sources, tokens, outs))
    if not sites:
        raise NothingFound(
            "no module was found whose output at one position changes with its input at another; "
            "a model that pads its input needs a length that it does not pad"
        )
    return sites


def _positions(axes: Axes, wrong: Tensor) -> Tensor:
    """(batch, L): where anything is wrong."""
    first = axes.first(wrong)
    return first if first.dim() == 2 else first.flatten(2).any(2)


def _groups(axes: Axes, wrong: Tensor, head_dim: int | None) -> Tensor:
    """(batch, L, groups): where anything is wrong in a head, or in a part of the features of a head's size."""
    first = axes.first(wrong)
    if first.dim() == 3 and head_dim is not None and first.shape[2] % head_dim == 0:
        first = first.reshape(*first.shape[:2], -1, head_dim)
    if first.dim() == 4:
        return first.any(3)
    return first.flatten(2).any(2, keepdim=True)


def _with_noise(like: Tensor, axes: Axes, base: Tensor, columns: Sequence[int | None], draw: Draw, seed: int) -> Tensor:
    """What first came in, for every copy, with random numbers at the position of each; where that is None, as it was."""
    count = 1 if axes.batch is None else len(columns)
    if not base.is_floating_point():
        return _with_other_tokens(like, axes, base, columns[:count])
    whole = (base * draw.scale).movedim(axes.position, 0)
    if draw.order:
        # The same order for all that comes in.
        order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(draw.order))
        whole = whole[order.to(whole.device)]
    size = float(base.float().square().mean().sqrt()) or 1.0
    generator = torch.Generator().manual_seed(1000 * (1 + draw.order) + seed)
    one = torch.randn(whole.shape[1:], generator=generator) * (draw.sign * draw.noise * size)
    copies = []
    for column in columns[:count]:
        copy = whole.clone()
        if column is not None:
            copy[column] = one.to(copy)
        copies.append(copy.movedim(0, axes.position))
    joined = copies[0] if axes.batch is None else torch.cat(copies, axes.batch)
    if joined.shape != like.shape or 0 in like.stride():
        return joined.to(device=like.device, dtype=like.dtype)
    # As it came in: kernels are chosen by strides.
    return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=like.device).copy_(joined)


def _with_other_tokens(like: Tensor, axes: Axes, base: Tensor, columns: Sequence[int | None]) -> Tensor:
    """The tokens that first came in, for every copy, with one of the others at the position of each.

    The first few ids are left alone: a model may make a mask of them, as of what is padding.
    """
    copies = []
    for column in columns:
        copy = base.reshape(-1).clone()
        others = [] if column is None else copy[(copy != copy[column]) & (copy >= SPECIAL)].tolist()
        if column is not None and others and int(copy[column]) >= SPECIAL:
            copy[column] = others[column % len(others)]
        copies.append(copy)
    joined = copies[0] if axes.batch is None else torch.stack(copies)
    return joined.to(like)


@dataclass
class Table:
    """Of one tensor, which rows see which keys: bool (L, L, groups), where ``known``, bool (L, L), says so."""

    found: Tensor
    known: Tensor


# What is measured of a site. "by head": the gradients of keys and values where one head's output alone has an incoming one.
# "own": with which keys the gradients at a row's own position change; "asked": with which its output does.
WAYS = ("forward", "backward", "dependence", "keys alone", "by head", "own", "asked")


@dataclass
class Measured:
    """What was measured of a site.

    Attributes:
        key: of the site.
        length: L.
        tables: by way, of ``WAYS``, and by tensor.
        without_gradient: whether its output has no gradient.
        touched: whether any gradient is other than 0.
        not_finite: whether a gradient is not finite.
        depends_on: with which of the tensors that come in alone, by place, the output changes.
    """

    key: Key
    length: int
    tables: dict[str, dict[Any, Table]] = field(default_factory=lambda: {way: {} for way in WAYS})
    without_gradient: bool = False
    touched: bool = False
    not_finite: bool = False
    depends_on: set[int] = field(default_factory=set)

    def has_gradient(self, place: int) -> bool:
        """Whether any of what comes in at that place has a gradient other than 0."""
        table = self.tables["backward"].get((self.key, "in", place))
        return table is not None and bool(table.found.any())

    def saw(self, way: str, tensor: Any, rows: Tensor, columns: Tensor, found: Tensor) -> None:
        """Note ``found`` (n, groups) for pairs of ``rows`` and ``columns``, each (n,)."""
        tables = self.tables[way]
        if tensor not in tables:
            square = (self.length, self.length)
            tables[tensor] = Table(
                torch.zeros(*square, found.shape[-1], dtype=torch.bool), torch.zeros(square, dtype=torch.bool)
            )
        tables[tensor].found[rows, columns] |= found
        tables[tensor].known[rows, columns] = True

    def by_head(self) -> Seen:
        """Of the gradients of keys and values what each head gives them: nothing, too, where the head sees any key."""
        seen = Seen.nothing(self.length)
        outputs = self.tables["forward"].get((self.key, "out", 0))
        own = torch.eye(self.length, dtype=torch.bool)
        for (place, head), table in self.tables["by head"].items():
            sees = outputs is not None and bool((outputs.found[:, :, head] & ~own).any())
            if sees and self.has_gradient(place[2]):
                seen.add(Part(table.found[:, :, 0], table.known))
        return seen

    def own(self, *, apart: bool) -> Seen:
        """With which of the keys that change a row's output its own gradients change, each head's where they are ``apart``.

        A projection of the output has a gradient that no key changes: it tells nothing. That of a query must change.
        """
        seen = Seen.nothing(self.length)
        for place, table in self.tables["own"].items():
            asked = self.tables["asked"][place].found
            for group in range(table.found.shape[2]):
                found = table.found[:, :, group]
                known = table.known & asked[:, :, group if asked.shape[2] == table.found.shape[2] else 0]
                if found.any() or (apart and self.has_gradient(place[2])):
                    seen.add(Part(found, known))
        return seen

    def _is_output(self, place: Any) -> bool:
        return place in ((self.key, "out", 0), (self.key, "out with gradients", 0))

    def seen(self, way: str, padded: Tensor | None = None) -> Seen:
        """Of the tensors and groups that see any key but the row's own, what some and what every one sees.

        What is added up at ``padded`` positions (L,) inside of the layer says nothing: it may have been zeroed on its way in.
        """
        seen = Seen.nothing(self.length)
        seen.every |= True
        own = torch.eye(self.length, dtype=torch.bool)[:, :, None]
        active = torch.zeros(self.length, self.length, dtype=torch.bool)
        for place, table in self.tables[way].items():
            seen.known |= table.known
            found = table.found
            if padded is not None and place[0] != self.key:
                found = found & ~padded[None, :, None]
            sees = (found & ~own).any(0).any(0)
            if sees.any():
                if self._is_output(place):
                    # A head that sees nothing but itself, beside heads that see more.
                    sees |= found.any(0).any(0)
                seen.parts += [Part(found[:, :, group], table.known) for group in sees.nonzero()[:, 0].tolist()]
                active |= table.known
                some, every = found[:, :, sees].any(2), found[:, :, sees].all(2)
                seen.some |= some
                seen.every &= every | ~table.known
                seen.parted |= some & ~every
        if active.any():
            # A tensor in which nothing at all is seen, as an output that is multiplied by 0, tells nothing.
            seen.known &= active
        seen.every &= active
        if way != "forward":
            seen.parted = seen.some & ~seen.every
        return seen


class Probe:
    """The layers of a model under audit, measured in one way to run it."""

    def __init__(self, sites: list[Site], run: Run, *, inner: bool = True, only_first: bool = False) -> None:
        """Nothing is measured yet.

        Args:
            sites: the layers, with what came in.
            run: how the model is run.
            inner: whether what their children take and return is looked at, too.
            only_first: whether of what comes in the first alone, the query, has a gradient.
        """
        self.sites = {site.key: site for site in sites}
        self.run = run
        self.inner = inner and len(run.steps) == 1
        self.only_first = only_first
        # Layers whose keys come from other ones.
        self.through: set[Key] = set()
        modules = {site.key[0]: site.module for site in sites}
        self.children: dict[str, str] = {}
        if self.inner:
            for name, module in list(modules.items()):
                for child, part in module.named_children():
                    inside = f"{name}.{child}".lstrip(".")
                    if inside not in modules:
                        self.children[inside] = name
                        modules[inside] = part
        self.hooked = Hooked(modules)
        self.found = {site.key: Measured(site.key, run.length) for site in sites}

    # What a run records: by tensor, with its axes.
    def _record(
        self,
        batch: int,
        columns: Sequence[int | None],
        draw: Draw,
        *,
        only: Container[int] | None = None,
        leaves: dict[Place, Tensor] | None = None,
    ) -> dict[Place, tuple[Axes, Tensor]]:
        outs: dict[Place, list[tuple[Axes, Tensor]]] = {}
        per_step = {name: 0 for name, _ in self.sites}
        for name, number in self.sites:
            per_step[name] = max(per_step[name], number + 1)

        def place_of(key: Key) -> tuple[Key, tuple[int, int]] | None:
            """The call in a run of one step, and which positions this one has."""
            times = per_step.get(key[0])
            if times is None:
                return None
            step = key[1] // times
            if step >= len(self.run.steps):
                return None
            return (key[0], key[1] % times), self.run.steps[step]

        def before(key: Key, given: list[Any]) -> list[Any] | None:
            if key[0] in self.children:
                if leaves is None and self._open_site(key) is not None:
                    self._note(outs, (key, "in"), given, batch)
                return None
            found = place_of(key)
            if found is None or found[0] not in self.sites:
                return None
            site, (begin, end) = self.sites[found[0]], found[1]
            replaced = list(given)
            for place, (axes, base) in (site.sources or site.tokens).items():
                if place >= len(given) or not isinstance(given[place], Tensor):
                    continue
                here = list(columns) if only is None or place in only else [None] * len(columns)
                whole = _with_noise(given[place], axes, base, here, draw, place)
                new = whole.narrow(axes.position, begin, end - begin)
                if new.shape != given[place].shape:
                    raise ValueError(
                        f"{site.key[0]} takes a tensor of {tuple(given[place].shape)} here, expected {tuple(new.shape)}"
                    )
                if leaves is not None and place in site.sources and not (place and self.only_first):
                    leaf = new.detach().requires_grad_()
                    leaves[(found[0], "in", place)] = leaf
                    # A copy, as the layer may write into it.
                    new = leaf.clone()
                replaced[place] = new
            return replaced

        def after(key: Key, given: list[Any]) -> None:
            if key[0] in self.children:
                if leaves is not None and self._open_site(key) is not None:
                    self._keep_leaves(leaves, (key, "out"), given, batch)
                return
            found = place_of(key)
            if found is None or found[0] not in self.sites:
                return
            site = self.sites[found[0]]
            for place, axes in site.outs.items():
                if place < len(given) and isinstance(given[place], Tensor):
                    outs.setdefault((found[0], "out", place), []).append((axes, given[place]))

        self.hooked.before, self.hooked.after = before, after
        self.hooked.run(self.run, batch)
        return {place: (pieces[0][0], _joined(pieces)) for place, pieces in outs.items()}

    def _open_site(self, key: Key) -> Key | None:
        """The audited call inside which a child is called."""
        name = self.children[key[0]]
        return next((each for each in reversed(self.hooked.open) if each[0] == name and each in self.sites), None)

    def _note(
        self, outs: dict[Place, list[tuple[Axes, Tensor]]], what: tuple[Key, str], leaves: list[Any], batch: int
    ) -> None:
        for place, leaf in enumerate(leaves):
            axes = axes_of(leaf, batch, self.run.length)
            if axes is not None:
                outs.setdefault((*what, place), []).append((axes, leaf))

    def _keep_leaves(self, kept: dict[Place, Tensor], what: tuple[Key, str], leaves: list[Any], batch: int) -> None:
        for place, leaf in enumerate(leaves):
            if axes_of(leaf, batch, self.run.length) is not None and leaf.requires_grad:
                kept[(*what, place)] = leaf

    def _site_of(self, place: Place) -> Key:
        (name, number), _, _ = place
        if name not in self.children:
            return (name, number)
        owner = self.children[name]
        same = [key for key in self.sites if key[0] == owner]
        # Of a layer that is called several times, its children are, too, as often in each.
        return same[min(number * len(same) // max(self.hooked.counts.get(name, 1), 1), len(same) - 1)]

    def forward(self, columns: Sequence[int], batch: int, draw: Draw = DRAWS[0]) -> None:
        """Which rows' outputs change with each of these positions."""
        batch = _fitting(batch, len(columns))
        with self.hooked.hooked(), torch.no_grad():
            before = self._record(batch, [None] * batch, draw)
            noises = self._noises(before, batch, draw)
            for chunk in _chunks(columns, batch):
                now = self._record(batch, chunk, draw)
                for place, (axes, base) in before.items():
                    if place in now and now[place][1].shape == base.shape:
                        self._differing("forward", place, axes, now[place][1], base, chunk, noises.get(place, 0.0))

    def keys_alone(self, columns: Sequence[int], batch: int, draw: Draw = DRAWS[0]) -> None:
        """Of layers that take query, key and value, whether rows see their own key, and on which of the three they depend."""
        batch = _fitting(batch, len(columns))
        with self.hooked.hooked(), torch.no_grad():
            before = self._record(batch, [None] * batch, draw)
            noises = self._noises(before, batch, draw)
            for chunk in _chunks(columns, batch):
                now = self._record(batch, chunk, draw, only=(1, 2))
                for place, (axes, base) in before.items():
                    if place in now and now[place][1].shape == base.shape:
                        self._differing("keys alone", place, axes, now[place][1], base, chunk, noises.get(place, 0.0))
            # A first row may have one key, and such a row's output does not depend on the query.
            spread = [columns[copy * len(columns) // batch] for copy in range(batch)] if batch > 1 else columns[-1:]
            for tensor in range(3):
                now = self._record(batch, spread, draw, only=(tensor,))
                for place, (_, base) in before.items():
                    if place in now and now[place][1].shape == base.shape:
                        changed = _unlike(now[place][1], base, noises.get(place, 0.0)).any()
                        if changed and place[0] in self.sites:
                            self.found[place[0]].depends_on.add(tensor)

    def _differing(
        self, way: str, place: Place, axes: Axes, now: Tensor, base: Tensor, chunk: Sequence[int], noise: float
    ) -> None:
        site = self.sites[self._site_of(place)]
        wrong = _groups(axes, _unlike(now, base, noise), site.head_dim if place[0][0] in self.children else None).cpu()
        rows = torch.arange(self.run.length)
        for copy, column in enumerate(chunk):
            if copy < wrong.shape[0]:
                self.found[site.key].saw(way, place, rows, torch.full_like(rows, column), wrong[copy])

    def _noises(self, before: dict[Place, tuple[Axes, Tensor]], batch: int, draw: Draw) -> dict[Place, float]:
        """By tensor, what two runs that are told the same differ by: nothing on most machines."""
        again = self._record(batch, [None] * batch, draw)
        found = {}
        for place, (_, base) in before.items():
            if place in again and again[place][1].shape == base.shape:
                apart = (again[place][1].float() - base.float()).abs().nan_to_num()
                found[place] = NOISE * float(apart.max()) if apart.numel() else 0.0
        return found

    def backward(self, rows: Sequence[int], batch: int, draw: Draw = DRAWS[0]) -> None:
        """Which positions have a gradient of each of these rows' outputs."""
        batch = _fitting(batch, len(rows))
        with self.hooked.hooked(), torch.enable_grad():
            for chunk in _chunks(rows, batch):
                gradients = self._gradients(batch, [None] * batch, chunk, draw)
                for place, (axes, gradient) in gradients.items():
                    site = self.sites[self._site_of(place)]
                    inside = place[0][0] in self.children
                    if not gradient.isfinite().all():
                        self.found[site.key].not_finite = True
                    self.found[site.key].touched |= not inside and bool((gradient != 0).any())
                    wrong = _groups(axes, gradient != 0, site.head_dim if inside else None).cpu()
                    columns = torch.arange(self.run.length)
                    for copy, row in enumerate(chunk):
                        if copy < wrong.shape[0]:
                            self.found[site.key].saw(
                                "backward", place, torch.full_like(columns, row), columns, wrong[copy]
                            )
                for key in self.through:
                    self._backward_through(key, chunk, batch, draw)

    def takes_keys_of_others(self) -> set[Key]:
        """The layers whose output changes with other positions, and no gradient of it reaches one in what they take."""
        own = torch.eye(self.run.length, dtype=torch.bool)
        found = set()
        for key in self.sites:
            forward, backward = self.found[key].seen("forward"), self.found[key].seen("backward")
            if (forward.some & ~own).any() and not (backward.some & ~own).any() and self.found[key].touched:
                found.add(key)
        return found if len(self.sites) > 1 else set()

    def _backward_through(self, key: Key, rows: Sequence[int], batch: int, draw: Draw) -> None:
        """What of one layer's output has a gradient in what other layers take: it may have its keys of them."""
        columns = torch.arange(self.run.length)
        gradients = self._gradients(batch, [None] * batch, rows, draw, of=key)
        for place, (axes, gradient) in gradients.items():
            if place[1] == "in" and place[0] in self.sites and place[0] != key:
                wrong = _positions(axes, gradient != 0).cpu()
                for copy, row in enumerate(rows[: len(wrong)]):
                    self.found[key].saw("backward", place, torch.full_like(columns, row), columns, wrong[copy, :, None])

    def by_head(self, rows: Sequence[int], batch: int, draw: Draw = DRAWS[0]) -> None:
        """Which positions' keys and values have a gradient of these rows' outputs, of one head at a time.

        Where heads share keys and values the sum of their gradients hides what one of them lacks.
        """
        heads = {axes.first(base).shape[2] for site in self.sites.values() for axes, base in [site.sources[0]]}
        pairs = [(row, head) for row in rows for head in range(max(heads))]
        batch = _fitting(batch, len(pairs))
        columns = torch.arange(self.run.length)
        with self.hooked.hooked(), torch.enable_grad():
            for chunk in _chunks(pairs, batch):
                some = [row for row, _ in chunk]
                gradients = self._gradients(batch, [None] * batch, some, draw, heads=[head for _, head in chunk])
                for place, (axes, gradient) in gradients.items():
                    if place[1] != "in" or place[2] not in (1, 2) or place[0] not in self.sites:
                        continue
                    wrong = _positions(axes, gradient != 0).cpu()
                    for copy, (row, head) in enumerate(chunk[: len(wrong)]):
                        self.found[place[0]].saw(
                            "by head", (place, head), torch.full_like(columns, row), columns, wrong[copy, :, None]
                        )

    def own_gradients(
        self, pairs: Sequence[tuple[int, int]], batch: int, draw: Draw = DRAWS[0], *, apart: bool
    ) -> None:
        """For pairs of a row and a key, whether the gradients at the row's own position change with the key.

        That of a query does, with every key that changes the row's output: it is made of all that the row sees.

        Args:
            pairs: of a row and a key.
            batch: how many copies are run at once.
            draw: what replaces the key.
            apart: whether the layers take query, key and value.
        """
        batch = _fitting(batch, len(pairs))
        noises: dict[Place, float] | None = None
        with self.hooked.hooked(), torch.enable_grad():
            for chunk in _chunks(pairs, batch):
                rows = [row for row, _ in chunk]
                before = self._gradients(batch, [None] * batch, rows, draw, taken=True)
                if noises is None:
                    noises = self._noises_of_gradients(
                        before, self._gradients(batch, [None] * batch, rows, draw, taken=True)
                    )
                now = self._gradients(batch, [key for _, key in chunk], rows, draw, taken=True)
                changed = {
                    place: _groups(
                        axes, _unlike(now[place][1], base, noises[place]), self.sites[self._site_of(place)].head_dim
                    ).cpu()
                    for place, (axes, base) in before.items()
                    if place in now and place in noises
                }
                self._note_own(chunk, changed, apart=apart)

    def _note_own(self, pairs: Sequence[tuple[int, int]], changed: dict[Place, Tensor], *, apart: bool) -> None:
        outputs = {
            place[0]: each for place, each in reversed(changed.items()) if place[1] == "out" and place[0] in self.sites
        }
        for place, groups in changed.items():
            site = self._site_of(place)
            # What children return is looked at where a layer takes hidden states, else the query.
            of_query = place == (site, "in", 0) if apart else place[0] not in self.sites
            if not of_query or site not in outputs:
                continue
            output = outputs[site] if apart else outputs[site].any(2, keepdim=True)
            if not apart:
                # A head may choose other keys than the next: behind a projection they cannot be told apart.
                groups = groups.any(2, keepdim=True)
            for copy, (row, key) in enumerate(pairs[: len(groups)]):
                pair = torch.tensor([row]), torch.tensor([key])
                self.found[site].saw("own", place, *pair, groups[copy, row][None])
                self.found[site].saw("asked", place, *pair, output[copy, row][None])

    @staticmethod
    def _noises_of_gradients(
        first: dict[Place, tuple[Axes, Tensor]], again: dict[Place, tuple[Axes, Tensor]]
    ) -> dict[Place, float]:
        return {
            place: NOISE * float((again[place][1] - base).abs().nan_to_num().max())
            for place, (_, base) in first.items()
            if place in again
        }

    def dependence(self, rows: Sequence[int], columns: Sequence[int], batch: int, draw: Draw = DRAWS[0]) -> None:
        """Which positions the gradients of each of these rows' outputs change with; and the outputs, with gradients.

        A backward pass may forget the window in a gradient that only the row's own position gets, that of the query.
        """
        batch = _fitting(batch, len(columns))
        noises: dict[Place, float] = {}
        with self.hooked.hooked(), torch.enable_grad():
            for row in rows:
                before = self._gradients(batch, [None] * batch, [row] * batch, draw, taken=True)
                if row == rows[0]:
                    again = self._gradients(batch, [None] * batch, [row] * batch, draw, taken=True)
                    noises = self._noises_of_gradients(before, again)
                for chunk in _chunks(columns, batch):
                    now = self._gradients(batch, chunk, [row] * batch, draw, taken=True)
                    for place, (axes, base) in before.items():
                        if place not in now or place not in noises:
                            continue
                        apart = noises[place]
                        unlike = _unlike(now[place][1], base, apart)
                        if place[1] == "out" and place[0] in self.sites:
                            self._differing(
                                "forward",
                                (place[0], "out with gradients", place[2]),
                                axes,
                                now[place][1],
                                base,
                                chunk,
                                apart,
                            )
                            continue
                        wrong = _positions(axes, unlike).cpu()
                        key = self._site_of(place)
                        for copy, column in enumerate(chunk):
                            if copy < wrong.shape[0]:
                                changed = wrong[copy]
                                self.found[key].saw(
                                    "dependence",
                                    "any",
                                    torch.tensor([row]),
                                    torch.tensor([column]),
                                    changed.any()[None, None],
                                )

    def _gradients(
        self,
        batch: int,
        columns: Sequence[int | None],
        rows: Sequence[int],
        draw: Draw,
        *,
        taken: bool = False,
        heads: Sequence[int] | None = None,
        of: Key | None = None,
    ) -> dict[Place, tuple[Axes, Tensor]]:
        """By what came in, and what children returned, its gradient where only these rows' outputs have an incoming one.

        With ``heads`` only that head's output of each copy has one, with ``of`` only that layer's.
        """
        leaves: dict[Place, Tensor] = {}
        outs = self._record(batch, columns, draw, leaves=leaves)
        results, incoming = [], []
        generator = torch.Generator().manual_seed(7)
        found: dict[Place, tuple[Axes, Tensor]] = {}
        with_gradient: set[Key] = set()
        first_out: set[Key] = set()
        for place, (axes, out) in outs.items():
            # Of what takes tokens the gradients would be those of all its layers.
            if place[0] in first_out or (place[0] in self.sites and not self.sites[place[0]].sources):
                continue
            first_out.add(place[0])
            if not out.requires_grad:
                continue
            with_gradient.add(place[0])
            if of is not None and place[0] != of:
                continue
            first = axes.first(torch.zeros_like(out, memory_format=torch.contiguous_format))
            one = torch.randn(first.shape[2:], generator=generator).to(first)
            for copy, row in enumerate(rows[: first.shape[0]]):
                if heads is None:
                    first[copy, row] = one
                elif one.dim() == 2 and heads[copy] < len(one):
                    first[copy, row, heads[copy]] = one[heads[copy]]
            base = (
                first[0].movedim(0, axes.position)
                if axes.batch is None
                else first.movedim((0, 1), (axes.batch, axes.position))
            )
            results.append(out)
            incoming.append(base)
            if taken:
                found[place] = (axes, out.detach())
        for key, site in self.sites.items():
            if not site.sources:
                continue
            self.found[key].without_gradient |= key not in with_gradient
        # A checkpoint runs its layers once more when gradients are asked for.
        self.hooked.counts.clear()
        self.hooked.before = partial(self._again, leaves)
        self.hooked.after = lambda key, given: None
        places = list(leaves)
        if not results or not places:
            return found
        gradients = torch.autograd.grad(results, [leaves[place] for place in places], incoming, allow_unused=True)
        for place, gradient in zip(places, gradients):
            of_leaf = self._axes(place, leaves[place], batch)
            if of_leaf is not None:
                found[place] = (of_leaf, torch.zeros_like(leaves[place]) if gradient is None else gradient.detach())
        return found

    def _again(self, leaves: dict[Place, Tensor], key: Key, given: list[Any]) -> list[Any] | None:
        replaced = [leaves.get((key, "in", place), each) for place, each in enumerate(given)]
        return (
            [each if each is before else each.clone() for each, before in zip(replaced, given)]
            if key in self.sites
            else None
        )

    def _axes(self, place: Place, leaf: Tensor, batch: int) -> Axes | None:
        if place[0] in self.sites and place[1] == "in":
            return self.sites[place[0]].sources[place[2]][0]
        return axes_of(leaf, batch, self.run.length)

    def reference(self, batch: int) -> dict[Place, Tensor]:
        """What each layer gives for what first came in, of the first copy."""
        with self.hooked.hooked(), torch.no_grad():
            outs = self._record(batch, [None] * batch, DRAWS[0])
        return {
            place: axes.first(out)[0].clone()
            for place, (axes, out) in outs.items()
            if place[0] in self.sites and place[1] == "out"
        }


def _fitting(batch: int, count: int) -> int:
    """A size of pieces that leaves no large remainder."""
    return max(-(-count // -(-count // batch)), 2) if batch > 1 else 1


def _joined(pieces: list[tuple[Axes, Tensor]]) -> Tensor:
    return pieces[0][1] if len(pieces) == 1 else torch.cat([piece for _, piece in pieces], pieces[0][0].position)


def _unlike(now: Tensor, base: Tensor, noise: float) -> Tensor:
    """Where two tensors differ, by more than noise; NaN is NaN's like."""
    if noise == 0:
        return (now != base) & ~(now.isnan() & base.isnan())
    return ((now.float() - base.float()).abs() > noise) | (now.isnan() != base.isnan())


def _chunks(numbers: Sequence[Each], size: int) -> Iterator[list[Each]]:
    """What there is in pieces of one size: the last repeats its own last."""
    for begin in range(0, len(numbers), size):
        piece = list(numbers[begin : begin + size])
        yield piece + [piece[-1]] * (size - len(piece))
