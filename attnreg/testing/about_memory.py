"""Properties of memory: what is hidden or not initialised, what is written into, and how results lie."""

from __future__ import annotations

import gc
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from attnreg.memory import strides_like
from attnreg.op import ROWS
from attnreg.testing.about_values import judged
from attnreg.testing.case import Case, make_case
from attnreg.testing.cases import cases_named, rows_of
from attnreg.testing.inputs import Inputs, copy_into
from attnreg.testing.judging import difference, expected_of, fault_of_outcome, truth_in
from attnreg.testing.property import calls, holds, of_run, one, two
from attnreg.testing.subject import Outcome, Seen, Subject, outcome_of, with_leaves
from attnreg.testing.visibility import spoil, visibility
from attnreg.window import Window

BAD = (math.nan, math.inf, -math.inf)
# How many rounding steps of the largest element a result may be off by, where a backend computes anew what a product over hidden
# slots has spoilt.
STEPS_OF_REPAIR = 8


@holds(
    "hidden",
    "NaN or inf in what is hidden reaches nothing",
    lambda subject, quick: calls(subject, rows_of("hidden", quick=quick), dtypes=subject.dtypes),
)
def hidden(subject: Subject, case: Case) -> str | None:
    """In keys and values that no row sees, rows that see no key, hidden slots, and the incoming gradients of these."""
    inputs = case.draw()
    clean = subject.run(case, inputs)
    for bad in BAD:
        dirty = subject.run(case, spoil(case, inputs, bad))
        for (name, got), wanted in zip(dirty.parts().items(), clean.parts().values()):
            finite = wanted.isfinite()
            size = float(wanted[finite].abs().max()) if bool(finite.any()) else 0.0
            steps = STEPS_OF_REPAIR * torch.finfo(got.dtype).eps
            apart = (got.double() - wanted.double()).abs().where(finite, 0)
            same = (got == wanted)[~finite].all() and (
                apart <= steps * (size + wanted.double().abs().where(finite, 0))
            ).all()
            if not bool(same):
                return f"{name}: another one where {bad} lies in what is hidden"
    return None


@holds(
    "visible_nan",
    "a NaN in what is seen shows in every row that sees it",
    lambda subject, quick: calls(
        subject,
        cases_named(
            *("causal", "key_lengths"),
            *([] if quick else ["over_a_tile", "everything", "grouped_heads", "packed_unequal", "query_starts"]),
        ),
        gradients=False,
    ),
)
def visible_nan(subject: Subject, case: Case) -> str | None:
    """It may reach further rows of a tile, where weights of 0 are multiplied by it; but it does not disappear."""
    inputs = case.draw()
    sight = visibility(case, inputs)
    for name, dims in ROWS[case.problem.op].tensors.items():
        seen = sight.of(dims)
        spoilt = inputs.tensors[name].clone()
        spoilt[tuple(seen.nonzero()[int(seen.sum()) // 2])] = math.nan
        dirty = replace(inputs, tensors={**inputs.tensors, name: spoilt})
        found = subject.run(case, dirty).output
        wanted = next(iter(truth_in(case, dirty, torch.float64).results.values())).isnan()
        if bool((wanted & ~found.isnan()).any()):
            return f"output: a NaN in a {name} that is seen does not show"
    return None


@contextmanager
def filled_memory() -> Iterator[None]:
    """Memory that torch gives out uninitialised holds NaN."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # There is no other switch for it, and none that is seen below Python.
            torch.use_deterministic_algorithms(True, warn_only=True)
            torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
            yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined]
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def _in_all(subject: Subject, cases: Sequence[Case], few: Sequence[Case], quick: bool) -> Iterator[Case]:
    """Cases in one dtype or two, and a few of them in all."""
    yield from calls(subject, cases, dtypes=one(subject) if quick else two(subject))
    yield from calls(subject, few, dtypes=subject.dtypes)


@holds(
    "uninitialised",
    "results are written in full: no uninitialised memory shows",
    lambda subject, quick: _in_all(
        subject,
        rows_of("window", "lengths", "grouped", "key_lengths", "bias", "combined", quick=True)
        if quick
        else [
            *rows_of("window", "lengths", "grouped", "key_lengths", "bias", "hidden", "combined"),
            *rows_of("packed", "query_starts", quick=True),
        ],
        cases_named("hidden_by_lengths"),
        quick,
    ),
)
def uninitialised(subject: Subject, case: Case) -> str | None:
    """Every torch.empty and its like holds NaN while the backend runs."""
    with filled_memory():
        return judged(subject, case)


def _few(subject: Subject, quick: bool) -> Sequence[Case]:
    names = ["causal", "window_of_one", "grouped_heads", "bias_full", "key_lengths", "transposed", "strided"]
    if not quick:
        names += ["everything", "over_a_tile", "tile_sized", "decode_step", "bias_over_batch", "packed", "expanded"]
        names += ["all_padded", "packed_softmax", "packed_unequal"]
    return cases_named(*names)


def _few_in_all(subject: Subject, quick: bool) -> Iterator[Case]:
    return _in_all(subject, _few(subject, quick), cases_named("causal", "key_lengths_int32", "bias_in_float32"), quick)


@holds(
    "inputs_unchanged",
    "nothing that a call is given is written into",
    _few_in_all,
)
def inputs_unchanged(subject: Subject, case: Case) -> str | None:
    """Nor what lies between the elements of a strided tensor; nor does the backward write into the results of the forward."""
    inputs = case.draw()
    held = {
        **inputs.tensors,
        **{name: given for name, given in inputs.arguments.items() if isinstance(given, Tensor)},
        "incoming gradient": inputs.upstream,
        **{f"incoming gradient of {name}": gradient for name, gradient in inputs.incoming.items()},
    }
    before = {name: _memory(tensor).clone() for name, tensor in held.items()}
    if not case.problem.needs_grad:
        subject.run(case, inputs)
    else:
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.leaves.items()}
        with subject.watched() as seen:
            given = subject.results(case, with_leaves(inputs, leaves))
            results = [result.detach() for call in seen for result in _results(call)]
        copies = [result.clone() for result in results]
        outcome_of(given, leaves, inputs)
        if not all(_same(result, copy) for result, copy in zip(results, copies)):
            return "a result of the forward: changed by the backward"
    for name, tensor in held.items():
        if not torch.equal(_memory(tensor), before[name]):
            return f"{name}: it, or what lies between its elements, is changed by the call"
    return None


@holds(
    "nothing_aliased",
    "results are new memory: no input's, no other result's, no earlier call's",
    _few_in_all,
)
def nothing_aliased(subject: Subject, case: Case) -> str | None:
    """What the functions of the backend return, before attnreg puts it into its order."""
    with subject.watched() as seen:
        outcome = subject.run(case, case.draw())
    for call in seen:
        given = [*call.inputs, *[each for each in call.options.values() if isinstance(each, Tensor)]]
        places = [_place(tensor) for tensor in given]
        for result in _results(call):
            if result.numel() and _place(result) in places:
                return f"{_function(call)}: a result lies in the memory of an input or another result"
            places.append(_place(result))
    kept = [part.clone() for part in outcome.parts().values()]
    subject.run(case, replace(case, seed=case.seed + 1).draw())
    for (name, part), copy in zip(outcome.parts().items(), kept):
        if not _same(part, copy):
            return f"{name}: changed by a later call"
    return None


@holds(
    "described",
    "results have the shapes, dtypes and device of the contract",
    lambda subject, quick: calls(
        subject,
        [*_few(subject, quick), *rows_of("bias_dtype", "value_dim", "combined", quick=quick)],
        dtypes=of_run(subject, quick),
    ),
)
def described(subject: Subject, case: Case) -> str | None:
    """What the functions of the backend return; gradients by the names that were asked for."""
    with subject.watched() as seen:
        outcome = subject.run(case, case.draw())
        if case.problem.needs_grad:
            subject.run(case.changed(needs_grad=False), case.draw())
            _last_gradient(subject, case)
    for call in seen:
        fault = _fault_of_description(call)
        if fault is not None:
            return f"{_function(call)}: {fault}"
    leaves = case.draw().leaves
    for name, gradient in outcome.gradients.items():
        if (gradient.shape, gradient.dtype) != (leaves[name].shape, leaves[name].dtype):
            return f"gradient of {name}: {_text(gradient)}, expected {_text(leaves[name])}"
    return None


def _last_gradient(subject: Subject, case: Case) -> None:
    """Ask for one gradient alone."""
    inputs = case.draw()
    *_, name = inputs.leaves
    leaves = {each: tensor.detach().requires_grad_(each == name) for each, tensor in inputs.leaves.items()}
    outcome_of(subject.results(case, with_leaves(inputs, leaves)), {name: leaves[name]}, inputs)


@holds(
    "memory_order",
    "results lie in memory as the tensors that they belong to",
    lambda subject, quick: calls(
        subject, rows_of("layout", quick=quick), dtypes=one(subject) if quick else two(subject)
    ),
)
def memory_order(subject: Subject, case: Case) -> str | None:
    """What the functions of the backend return: attnreg would copy it into order, at a cost.

    Of a backend that consists of torch operations, which order their results in ways of their own, what users get.
    """
    with subject.watched() as seen:
        outcome = subject.run(case, case.draw())
    for call in () if subject.backend.differentiable else seen:
        first = next(iter(call.tensors.values()))
        if call.is_backward:
            named = {**call.tensors, **call.options}
            pairs = [
                (f"gradient of {name}", gradient, strides_like(named[name]))
                for name, gradient in call.returned.items()
                if gradient.shape == named[name].shape
            ]
        else:
            pairs = [
                (name, result, strides_like(result.new_empty(result.shape) if row.of_rows else first, result.shape[-1]))
                for result, (name, row) in zip(_results(call), call.op.results.items())
            ]
        for name, result, wanted in pairs:
            if any(own != other for own, other, size in zip(result.stride(), wanted, result.shape) if size != 1):
                return f"{_function(call)}: {name} has strides {result.stride()}, expected {wanted}"
    first = next(iter(case.draw().tensors.values()))
    if outcome.output.stride() != strides_like(first, outcome.output.shape[-1]):
        return (
            f"output: has strides {outcome.output.stride()}, expected {strides_like(first, outcome.output.shape[-1])}"
        )
    return None


@holds(
    "repeatable",
    "the same call gives the same bits",
    lambda subject, quick: _in_all(
        subject,
        cases_named("causal", "key_lengths_with_bias", "grouped_heads", "all_packed")
        if quick
        else rows_of("everything", "window", "grouped", "bias", "combined"),
        cases_named("causal"),
        quick,
    ),
)
def repeatable(subject: Subject, case: Case) -> str | None:
    """Also after another one, of other numbers."""
    inputs = case.draw()
    first = subject.run(case, inputs)
    for round in range(3):
        if round == 1:
            subject.run(case, replace(case, seed=case.seed + 1).draw())
        fault = difference(subject.run(case, inputs), first)
        if fault is not None:
            return f"{fault} in a repeated call"
    return None


# What is kept between calls


@holds(
    "other_numbers",
    "a call hangs on nothing but its own numbers: neither on an earlier one of the same shapes nor on one of the same tensors",
    # The first is of a shape of its own: what a first call keeps of a bias hides other slots.
    lambda subject, quick: calls(
        subject,
        [
            make_case("twice", query_length=23, window=Window(4, 1), bias="NHLW", hidden=0.3, key_lengths=(19, 6)),
            *cases_named(
                *("causal", "all_padded", "all_packed", "packed_softmax"),
                *([] if quick else ["everything", "grouped_heads", "bias_full", "packed_unequal", "query_starts"]),
            ),
        ],
        dtypes=one(subject),
    ),
)
def other_numbers(subject: Subject, case: Case) -> str | None:
    """With other lengths, another bias and another scale; and with new numbers copied into the tensors of the first call."""
    first, other = case.draw(), _other(case)
    subject.run(case, first)
    wanted = expected_of(case, other)
    fault = fault_of_outcome(subject.run(case, other), wanted)
    if fault is not None:
        return f"{fault} after a call of the same shapes"
    copy_into(first, other)
    same_tensors = replace(first, arguments={**other.arguments, **_tensors(first)})
    fault = fault_of_outcome(subject.run(case, same_tensors), wanted)
    return None if fault is None else f"{fault} where new numbers were copied into the tensors of an earlier call"


def _other(case: Case) -> Inputs:
    drawn = replace(case, seed=case.seed + 1).draw()

    def changed(name: str, given: Any) -> Any:
        if not isinstance(given, Tensor):
            return given * 1.5
        if given.is_floating_point():
            return given
        # Of offsets, those of the same sequences in reverse.
        return given[-1] - given.flip(0) if name.startswith("cu_") else given.flip(0)

    return replace(drawn, arguments={name: changed(name, given) for name, given in drawn.arguments.items()})


def _tensors(inputs: Inputs) -> dict[str, Tensor]:
    return {name: given for name, given in inputs.arguments.items() if isinstance(given, Tensor)}


@holds(
    "interleaved",
    "two calls whose forwards come before their backwards give the bits that each gives alone",
    lambda subject, quick: calls(
        subject,
        cases_named(
            *("causal", "key_lengths_with_bias", "all_packed"),
            *([] if quick else ["everything", "grouped_heads", "all_padded"]),
        ),
        dtypes=one(subject) if quick else two(subject),
        gradients=True,
    ),
)
def interleaved(subject: Subject, case: Case) -> str | None:
    """A backward knows its own forward by what it is given."""
    both = [case.draw(), replace(case, seed=case.seed + 1).draw()]
    alone = [subject.run(case, inputs) for inputs in both]
    leaves = [{name: tensor.detach().requires_grad_() for name, tensor in inputs.leaves.items()} for inputs in both]
    results = [subject.results(case, with_leaves(inputs, own)) for inputs, own in zip(both, leaves)]
    for inputs, own, found, wanted in zip(both, leaves, results, alone):
        fault = difference(outcome_of(found, own, inputs), wanted)
        if fault is not None:
            return f"{fault}, where another forward of the same shapes came between"
    return None


# A call's tensors may be kept for so many calls.
CALLS_TO_LET_GO = 4


@holds(
    "lets_go",
    "the tensors of a call are not kept alive when it is over",
    lambda subject, quick: calls(subject, cases_named("causal", "key_lengths_with_bias"), dtypes=one(subject)),
)
def lets_go(subject: Subject, case: Case) -> str | None:
    """Those of the last few calls may be, in whatever a backend remembers."""
    kept: dict[str, StorageWeakRef] = {}
    for call in range(CALLS_TO_LET_GO + 1):
        inputs = replace(case, seed=case.seed + call).draw()
        subject.run(case, inputs)
        if call == 0:
            kept = {name: StorageWeakRef(tensor.untyped_storage()) for name, tensor in inputs.leaves.items()}
        del inputs
    if not all(each.expired() for each in kept.values()):
        gc.collect()
    alive = [name for name, each in kept.items() if not each.expired()]
    return f"{alive[0]}: still in memory after {CALLS_TO_LET_GO} more calls" if alive else None


def _memory(tensor: Tensor) -> Tensor:
    """All bytes of the memory in which a tensor lies."""
    whole = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    return whole.set_(tensor.untyped_storage())


def _results(call: Seen) -> list[Tensor]:
    found = call.returned
    values = found.values() if isinstance(found, Mapping) else found if isinstance(found, tuple) else (found,)
    return [each for each in values if isinstance(each, Tensor)]


def _function(call: Seen) -> str:
    return call.op.backward if call.is_backward else call.op.name


def _fault_of_description(call: Seen) -> str | None:
    tensors, returned = call.tensors, call.returned
    first = next(iter(tensors.values()))
    wanted: dict[str, tuple[Sequence[int], torch.dtype]]
    found: dict[str, Any]
    if call.is_backward:
        if not isinstance(returned, Mapping):
            return f"returned {type(returned).__name__}, not gradients by name"
        named = {**tensors, **call.options}
        wanted = {name: (named[name].shape, named[name].dtype) for name in sorted(call.options["needs_grad"])}
        missing = wanted.keys() - returned.keys()
        if missing:
            return f"left out the gradient of {', '.join(sorted(missing))}"
        further = returned.keys() - wanted.keys()
        if further:
            return f"returned a gradient of {', '.join(sorted(map(str, further)))}, which nobody asked for"
        found = dict(returned)
    else:
        results = returned if isinstance(returned, tuple) else (returned,)
        if len(results) != len(call.op.results):
            return f"returned {len(results)} results, not {len(call.op.results)}"
        sizes = {
            letter: size for name, dims in call.op.tensors.items() for letter, size in zip(dims, tensors[name].shape)
        }
        found = dict(zip(call.op.results, results))
        wanted = {}
        for name, row in call.op.results.items():
            # The width of a band that is made, and not given, is seen where users get it.
            of_result = [sizes.get(letter, found[name].shape[-1]) for letter in row.dims]
            wanted[name] = (of_result, row.dtype(first.dtype))
    for name, (shape, dtype) in wanted.items():
        result = found[name]
        if not isinstance(result, Tensor):
            return f"{name} is {type(result).__name__}, not a tensor"
        if (tuple(result.shape), result.dtype, result.device) != (tuple(shape), dtype, first.device):
            return f"{name} is {_text(result)}, expected {tuple(shape)}, {dtype} on {first.device}"
        if type(result) is not Tensor:
            return f"{name} is a {type(result).__name__}, expected a plain tensor"
        # Torch itself makes it so of a result whose gradients it has to record.
        given = [*call.inputs, *[each for each in call.options.values() if isinstance(each, Tensor)]]
        if result.requires_grad and not any(each.requires_grad for each in given):
            return f"{name} requires gradients where none of its inputs does"
        if result.is_neg() or result.is_conj():
            return f"{name} is a view that is to be negated when it is read"
    return None


def _text(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)}, {tensor.dtype} on {tensor.device}"


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _same(got: Tensor, wanted: Tensor) -> bool:
    return difference(Outcome(got, {}), Outcome(wanted, {})) is None
