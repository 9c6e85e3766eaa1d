"""One call to try: a Problem, and the few facts that a Problem does not hold, such as how its tensors lie in memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from attnreg.measuring.sizes import result_shape, tensor_shapes
from attnreg.op import ROWS, Argument
from attnreg.problem import Given, Problem, dtype_name
from attnreg.testing.inputs import Inputs, incoming_shapes, random_integers
from attnreg.window import Window

# The letters of a bias as tests write them, "NHLW", and as an op's row has them.
_AS_IN_ROWS = str.maketrans("L", "Q")

# How large a scaled tensor may be: an element that overflows would make all that it reaches NaN, and prove nothing; and the
# gradients that it is a factor of are to fit its dtype, too.
MOST_OF_RANGE = 2.0**-5


@dataclass(frozen=True, kw_only=True)
class Case:
    """One call to try.

    Attributes:
        name: what reports call it.
        problem: the call; ``needs_grad`` says whether gradients are asked for.
        values: of the arguments that have chosen ones, by name: numbers, and of tensors of one dimension their elements, from the
            first again where there are more.
        dims: of the arguments that broadcast, by name, how many dimensions are written; all where it is not here.
        dtypes: of the arguments that have a dtype of their own, by name; the others have that of the tensors.
        layout: how the floating-point tensors lie in memory, a name of ``LAYOUTS``.
        hidden: the share of a bias' elements that are -inf.
        lowest: whether these are the lowest number of its dtype instead, as of a mask in another library: it hides nothing.
        shift: what is added to a bias.
        magnitude: what the first tensor is multiplied by, as far as its dtype allows.
        value_magnitude: what values are multiplied by, likewise.
        one_sign: whether the tensors of scores have no negative number: the scores of a row are near each other then.
        seed: of the random numbers, among them the seed of dropout.
    """

    name: str
    problem: Problem
    values: tuple[tuple[str, Any], ...] = ()
    dims: tuple[tuple[str, int], ...] = ()
    dtypes: tuple[tuple[str, torch.dtype], ...] = ()
    layout: str = "contiguous"
    hidden: float = 0.0
    lowest: bool = False
    shift: float = 0.0
    magnitude: float = 1.0
    value_magnitude: float = 1.0
    one_sign: bool = False
    seed: int = 0

    def __str__(self) -> str:
        return self.name

    def of(self, op: str, dtype: torch.dtype, device: torch.device, *, needs_grad: bool = True) -> Case:
        """The same case for another op, without what that does not have."""
        row, problem = ROWS[op], self.problem
        letters = "".join(row.tensors.values())
        names = {argument.name for argument in (row.extras if needs_grad else row.arguments)}

        def is_floating(name: str) -> bool:
            argument = _argument(op, name)
            return argument.dims is not None and argument.kind == "floating" and name not in dict(self.dtypes)

        other = replace(
            problem,
            op=op,
            dtype=dtype,
            device=device,
            head_dim=problem.head_dim if "E" in letters else 0,
            value_dim=problem.value_dim if "D" in letters else 0,
            given=tuple(
                (name, replace(given, dtype=dtype) if is_floating(name) else given)
                for name, given in problem.given
                if name in names
            ),
            needs_grad=needs_grad,
        )
        return replace(
            self,
            problem=other,
            values=tuple((name, value) for name, value in self.values if name in names),
            dims=tuple((name, count) for name, count in self.dims if name in names),
            dtypes=tuple((name, its) for name, its in self.dtypes if name in names),
            hidden=self.hidden if "bias" in names else 0.0,
            lowest=self.lowest and "bias" in names,
            shift=self.shift if "bias" in names else 0.0,
            value_magnitude=self.value_magnitude if "D" in letters else 1.0,
        )

    def changed(self, **facts: Any) -> Case:
        """The case with another problem: ``facts`` of it are changed, and the arguments that are given have its sizes."""
        row = ROWS[self.problem.op]
        changed = replace(self.problem, **facts)
        rows = {argument.name: argument for argument in (row.extras if changed.needs_grad else row.arguments)}
        given = tuple(
            (name, replace(each, shape=_resized(rows[name], each.shape, changed)))
            for name, each in changed.given
            if name in rows
        )
        return replace(self, problem=replace(changed, given=given))

    def draw(self) -> Inputs:
        """Its tensors: random, also the incoming gradient, as one of ones would hide a flipped window."""
        problem = self.problem
        generator = torch.Generator().manual_seed(self.seed)

        def random(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
            drawn = torch.randn(shape, generator=generator)
            return _laid(self.layout, name, drawn.to(dtype).to(problem.device))

        tensors = {name: random(name, shape, problem.dtype) for name, shape in tensor_shapes(problem).items()}
        if self.one_sign:
            tensors = {name: each if name in ("value", "weights") else each.abs() for name, each in tensors.items()}
        largest = torch.finfo(problem.dtype).max
        # A result is an average of values, and no factor of gradients where none are asked for.
        for name, factor, share in (
            (next(iter(tensors)), self.magnitude, MOST_OF_RANGE),
            ("value", self.value_magnitude, MOST_OF_RANGE if problem.needs_grad else 0.5),
        ):
            if factor != 1:
                scaled = (tensors[name].double() * factor).clamp(-largest * share, largest * share)
                tensors[name] = _laid(self.layout, name, scaled.to(problem.dtype))
        upstream = random("upstream", result_shape(problem), problem.dtype)
        arguments: dict[str, Any] = {}
        for argument in ROWS[problem.op].arguments:
            given, value = problem.gives(argument.name), dict(self.values).get(argument.name)
            if argument.dims is None:
                if value is not None:
                    arguments[argument.name] = value
            elif given is None or given.dtype is None:
                continue
            elif argument.kind == "integer":
                arguments[argument.name] = self._integers(argument, given, generator)
            elif argument.broadcasts:
                arguments[argument.name] = self._bias(
                    argument, random(argument.name, given.shape, given.dtype), generator
                )
            else:
                numbers = torch.randn(given.shape, generator=generator)
                if value is not None:
                    numbers = _repeated(value, given.shape)
                drawn = numbers.to(given.dtype).to(problem.device)
                arguments[argument.name] = _with_gaps(drawn) if self.layout == "strided" else drawn
        incoming = {
            name: torch.randn(shape, generator=generator).to(dtype).to(problem.device)
            for name, (shape, dtype) in incoming_shapes(problem).items()
        }
        return Inputs(tensors, arguments, upstream, incoming)

    def _bias(self, argument: Argument, drawn: Tensor, generator: torch.Generator) -> Tensor:
        if self.shift:
            drawn = _laid(self.layout, argument.name, drawn + self.shift)
        if self.hidden:
            kept = torch.rand(drawn.shape, generator=generator) >= self.hidden
            fill = torch.finfo(drawn.dtype).min if self.lowest else -math.inf
            drawn = _laid(self.layout, argument.name, drawn.masked_fill(~kept.to(drawn.device), fill))
        written = dict(self.dims).get(argument.name, drawn.dim())
        for _ in range(drawn.dim() - written):
            drawn = drawn[0]
        return drawn

    def _integers(self, argument: Argument, given: Given, generator: torch.Generator) -> Tensor:
        chosen = dict(self.values).get(argument.name)
        if chosen is None and argument.dims == "N" and argument.at_most is not None:
            most = self.problem.size(argument.at_most)
            numbers = torch.randint(most + 1, given.shape, generator=generator)
        elif chosen is None:
            numbers = random_integers(self.problem, argument, given, generator)
        else:
            numbers = _repeated(chosen, (len(chosen),) if argument.ascends else given.shape)
            if argument.at_most is not None:
                numbers = numbers.clamp(max=self.problem.size(argument.at_most))
        return numbers.to(given.dtype).to(self.problem.device)

    def lines(self) -> list[str]:
        """Python that makes this case, with ``make_case`` imported."""
        facts = {**_written(self.problem), **dict(self.values)}
        for name, each in self.problem.given:
            argument = _argument(self.problem.op, name)
            if argument in ROWS[self.problem.op].incoming:
                facts[name] = True
            elif name == "seed":
                continue  # that of dropout comes with the share that is dropped
            elif argument.broadcasts:
                facts[name] = self._letters(argument, each)
            elif name not in facts:
                facts[name] = ()
            elif argument.dims is not None and not argument.ascends:
                # As many as there are.
                facts[name] = tuple(facts[name])[: max(math.prod(each.shape), 1)]
            if name in dict(self.dtypes):
                facts[f"{name}_dtype"] = each.dtype
        for field, default in (
            ("layout", "contiguous"),
            ("hidden", 0.0),
            ("lowest", False),
            ("shift", 0.0),
            ("magnitude", 1.0),
            ("value_magnitude", 1.0),
            ("one_sign", False),
            ("seed", 0),
        ):
            if getattr(self, field) != default:
                facts[field] = getattr(self, field)
        lines, line = ["case = make_case("], "   "
        for name, fact in facts.items():
            written = f" {name}={_source(fact)},"
            # A long one goes over several lines.
            for part in [written] if len(written) <= 72 - len("   ") else _split(written):
                if len(line) + len(part) > 72:
                    lines.append(line)
                    line = "   "
                line += part
        return [*lines, line, ")"]

    def _letters(self, argument: Argument, given: Given) -> str:
        assert argument.dims is not None
        letters = "".join(
            "1" if size == 1 else letter for size, letter in zip(given.shape, argument.dims.replace("Q", "L"))
        )
        return letters[len(letters) - dict(self.dims).get(argument.name, len(letters)) :]


def make_case(
    name: str = "",
    *,
    op: str = "local_attention",
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    batch: int = 2,
    heads: int = 2,
    kv_heads: int | None = None,
    query_length: int = 37,
    key_length: int | None = None,
    head_dim: int = 16,
    value_dim: int | None = None,
    window: Window | None = None,
    needs_grad: bool = True,
    layout: str = "contiguous",
    hidden: float = 0.0,
    lowest: bool = False,
    shift: float = 0.0,
    magnitude: float = 1.0,
    value_magnitude: float = 1.0,
    one_sign: bool = False,
    seed: int = 0,
    **arguments: Any,
) -> Case:
    """A case by its facts; those that are not given are small and ordinary.

    Args:
        name: what reports call it.
        op: the op's name.
        dtype: of the tensors.
        device: where they are.
        batch: the batch size, N
        heads: the number of query heads, H
        kv_heads: Hkv; that of query heads where not given.
        query_length: the number of queries, Lq
        key_length: Lk; that of queries where not given.
        head_dim: of queries and keys, E
        value_dim: of values; that of keys where not given.
        window: the window of keys; eight keys, causal, where not given.
        needs_grad: whether gradients are asked for.
        layout: as in :class:`Case`.
        hidden: likewise.
        lowest: likewise.
        shift: likewise.
        magnitude: likewise.
        value_magnitude: likewise.
        one_sign: likewise.
        seed: likewise.
        arguments: optional arguments of the op: of one that broadcasts its sizes in letters, "NHLW", "H1W", "1"; of a
            tensor of one dimension its elements, () for random ones; else a number. ``NAME_dtype`` gives a tensor's dtype. A
            share that is dropped, ``dropout_p``, brings a random ``seed`` along. ``grad_log_sum_exp=True`` asks for the
            log-sum-exp too, which then has an incoming gradient. Offsets of sequences make the batch size 1.

    Raises:
        ValueError: the op, an argument or the layout is unknown.
    """
    if op not in ROWS:
        raise ValueError(f"op must be one of {', '.join(ROWS)}, got {op!r}")
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    window = Window.causal(8) if window is None else window
    letters = "".join(ROWS[op].tensors.values())
    value_dim = head_dim if value_dim is None else value_dim
    wanted = {key: value for key, value in arguments.items() if value is not None}
    if "dropout_p" in wanted:
        wanted["seed"] = ()
    for argument in ROWS[op].arguments:
        if argument.name in wanted:
            batch = argument.sizes.get("N", batch)
    problem = Problem(
        op=op,
        device=torch.device(device),
        dtype=dtype,
        batch=batch,
        heads=heads,
        kv_heads=heads if kv_heads is None else kv_heads,
        query_length=query_length,
        key_length=query_length if key_length is None else key_length,
        head_dim=head_dim if "E" in letters else 0,
        value_dim=value_dim if "D" in letters else 0,
        window=window,
        needs_grad=needs_grad,
    )
    given, values, dims, dtypes = [], [], [], []
    for argument in ROWS[op].arguments:
        dtype_of = wanted.pop(f"{argument.name}_dtype", None)
        if argument.name not in wanted:
            continue
        value = wanted.pop(argument.name)
        if dtype_of is not None:
            dtypes.append((argument.name, dtype_of))
        if argument.dims is None:
            values.append((argument.name, value))
            if not argument.for_all:
                given.append((argument.name, Given()))
        elif argument.broadcasts and argument.kind == "floating":
            written = value.translate(_AS_IN_ROWS)
            whole = written.rjust(len(argument.dims), "1")
            shape = tuple(1 if letter == "1" else problem.size(letter) for letter in whole)
            given.append((argument.name, Given(shape, dtype_of or dtype)))
            if len(written) < len(argument.dims):
                dims.append((argument.name, len(written)))
        else:
            # The number of sequences is no fact of a problem.
            shape = tuple(1 if letter == "1" else problem.size(letter) for letter in argument.dims if letter != "S")
            its = torch.int64 if argument.kind == "integer" else dtype
            given.append((argument.name, Given(shape, dtype_of or its)))
            if value:
                values.append((argument.name, tuple(value)))
    for argument in ROWS[op].incoming:
        if wanted.pop(argument.name, False) and needs_grad:
            given.append((argument.name, Given()))
    if wanted:
        raise ValueError(f"{op} has no argument {', '.join(sorted(wanted))}")
    return Case(
        name=name or "case",
        problem=replace(problem, given=tuple(given)),
        values=tuple(values),
        dims=tuple(dims),
        dtypes=tuple(dtypes),
        layout=layout,
        hidden=hidden,
        lowest=lowest,
        shift=shift,
        magnitude=magnitude,
        value_magnitude=value_magnitude,
        one_sign=one_sign,
        seed=seed,
    )


def _argument(op: str, name: str) -> Argument:
    return next(argument for argument in ROWS[op].extras if argument.name == name)


def _repeated(numbers: Sequence[float], shape: tuple[int, ...]) -> Tensor:
    """Numbers, again from the first where a shape has room for more."""
    count = math.prod(shape)
    return torch.tensor((list(numbers) * (count // len(numbers) + 1))[:count]).view(shape)


def _with_gaps(tensor: Tensor) -> Tensor:
    """Every second element of something with NaN between them."""
    return torch.stack([tensor, torch.full_like(tensor, math.nan)], -1)[..., 0]


def _split(written: str) -> list[str]:
    return [f" {part}" for part in written.split(" ")[1:]]


def _source(fact: Any) -> str:
    """What makes a fact, with ``torch`` imported."""
    if isinstance(fact, tuple):
        return f"({', '.join(map(_source, fact))}{',' if len(fact) == 1 else ''})"
    if isinstance(fact, float) and not math.isfinite(fact):
        return f"{'-' if fact < 0 else ''}torch.inf"
    return repr(fact)


def _resized(argument: Argument, shape: tuple[int, ...], problem: Problem) -> tuple[int, ...]:
    """The shape of an argument for the sizes of ``problem``; a dimension of 1 that may broadcast does so."""
    return tuple(
        1 if argument.broadcasts and size == 1 else problem.size(letter)
        for letter, size in zip(argument.dims or "", shape)
    )


def _written(problem: Problem) -> dict[str, Any]:
    """The facts of a problem as :func:`make_case` takes them, without those that follow."""
    facts: dict[str, Any] = {"op": problem.op, "dtype": problem.dtype}
    if problem.device.type != "cpu":
        facts["device"] = str(problem.device)
    facts.update(batch=problem.batch, heads=problem.heads)
    if problem.kv_heads != problem.heads:
        facts["kv_heads"] = problem.kv_heads
    facts["query_length"] = problem.query_length
    if problem.key_length != problem.query_length:
        facts["key_length"] = problem.key_length
    if problem.head_dim:
        facts["head_dim"] = problem.head_dim
    if problem.value_dim and problem.value_dim != problem.head_dim:
        facts["value_dim"] = problem.value_dim
    facts["window"] = problem.window
    if not problem.needs_grad:
        facts["needs_grad"] = False
    return facts


def case_id(case: Case) -> str:
    """A case's name with its op and dtype."""
    return f"{case.problem.op.removeprefix('local_')}-{dtype_name(case.problem.dtype)}-{case.name}"


# How tensors lie in memory


def _contiguous(tensor: Tensor) -> Tensor:
    return tensor


def _lengths_first(tensor: Tensor) -> Tensor:
    """(N, L, H, E), as models keep it."""
    return tensor.transpose(1, 2).contiguous().transpose(1, 2)


def _packed(tensor: Tensor) -> Tensor:
    """A slice of packed projections, (N, L, 3, H, E)."""
    return torch.stack([tensor.transpose(1, 2)] * 3, dim=2)[:, :, 1].transpose(1, 2)


def _heads_last(tensor: Tensor) -> Tensor:
    """(L, N, H, E), as torch's own multi-head attention keeps it."""
    return tensor.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)


def _strided(tensor: Tensor) -> Tensor:
    """A part of something larger in every dimension, with NaN around it."""
    n, h, length, dim = tensor.shape
    larger = tensor.new_full((n + 1, h + 2, length + 3, dim + 8), math.nan)
    larger[1:, 1:-1, 2:-1, 4:-4] = tensor
    return larger[1:, 1:-1, 2:-1, 4:-4]


def _expanded(tensor: Tensor) -> Tensor:
    """All heads are the first one."""
    return tensor[:, :1].expand(tensor.shape)


def _expanded_batch(tensor: Tensor) -> Tensor:
    """All sequences are the first one."""
    return tensor[:1].expand(tensor.shape)


def _last_dimension_strided(tensor: Tensor) -> Tensor:
    return tensor.transpose(2, 3).contiguous().transpose(2, 3)


def _misaligned(tensor: Tensor) -> Tensor:
    """All but the first column of something wider: no row begins where an access of several elements may."""
    wider = tensor.new_full((*tensor.shape[:-1], tensor.shape[-1] + 1), math.nan)
    wider[..., 1:] = tensor
    return wider[..., 1:]


_LAYOUTS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "contiguous": _contiguous,
    "transposed": _lengths_first,
    "packed": _packed,
    "heads_last": _heads_last,
    "strided": _strided,
    "expanded": _expanded,
    "expanded_batch": _expanded_batch,
    "last_dimension_strided": _last_dimension_strided,
    "misaligned": _misaligned,
}
# Those in which tensors differ, by the tensors' names; the others are contiguous.
_MIXED: Mapping[str, Mapping[str, Callable[[Tensor], Tensor]]] = {
    "mixed": {
        "key": _lengths_first,
        "value": _heads_last,
        "weights": _packed,
        "bias": _heads_last,
        "upstream": _strided,
    },
    "one_key": {"key": lambda tensor: tensor[:, :, :1].expand(tensor.shape)},
}
LAYOUTS = (*_LAYOUTS, *_MIXED)


def _laid(layout: str, name: str, tensor: Tensor) -> Tensor:
    """The tensor of this name as it lies in memory."""
    of_name = _MIXED.get(layout)
    return _LAYOUTS[layout](tensor) if of_name is None else of_name.get(name, _contiguous)(tensor)
