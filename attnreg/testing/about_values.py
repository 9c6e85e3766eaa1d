"""Properties of numbers: results and gradients against float64."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from itertools import combinations

import torch

from attnreg.op import ATTENTION, DOT_PRODUCT, ROWS
from attnreg.precision import allow_tf32
from attnreg.testing.budget import TF32_ACCURATE
from attnreg.testing.case import Case
from attnreg.testing.cases import QUICK_LENGTHS, SMALL_LENGTHS, cases_named, rows_of, small_windows
from attnreg.testing.judging import expected, expected_of, fault_of_outcome, largest_difference, truth_in
from attnreg.testing.property import calls, holds, narrow, of_run, one, takes, two
from attnreg.testing.subject import Subject, outcome_of, with_leaves
from attnreg.testing.sums import fault_of_gradients, fault_of_results, sums_of_gradients, sums_of_results
from attnreg.testing.visibility import visibility


def judged(subject: Subject, case: Case) -> str | None:
    """What is wrong with the result and the gradients of a case."""
    return fault_of_outcome(subject.run(case, case.draw()), expected(case))


def _ordinary(subject: Subject, quick: bool) -> list[Case]:
    on_accelerator = () if subject.device.type == "cpu" or quick else ("large",)
    return rows_of("window", "scale", "everything", "combined", *on_accelerator, quick=quick)


def _ordinary_calls(subject: Subject, quick: bool, *, gradients: bool) -> Iterable[Case]:
    yield from calls(subject, _ordinary(subject, quick), dtypes=of_run(subject, quick), gradients=gradients)
    # One in every dtype: a kernel of one alone may be the wrong one.
    yield from calls(subject, cases_named("causal"), dtypes=subject.dtypes, gradients=gradients)


@holds(
    "values",
    "results are those of float64, within the error budget",
    lambda subject, quick: _ordinary_calls(subject, quick, gradients=False),
)
def values(subject: Subject, case: Case) -> str | None:
    """Without gradients, which is a way of its own."""
    return judged(subject, case)


@holds(
    "gradients",
    "all gradients under a random incoming one are those of float64",
    lambda subject, quick: _ordinary_calls(subject, quick, gradients=True),
)
def gradients(subject: Subject, case: Case) -> str | None:
    """With the result of the same call."""
    return judged(subject, case)


def _windows(subject: Subject, quick: bool) -> Iterable[Case]:
    if subject.device.type == "cpu" or quick:
        return calls(subject, small_windows(QUICK_LENGTHS if quick else SMALL_LENGTHS), dtypes=one(subject))
    # Kernels for 16 bits are others; a few rows more than a tile cost an accelerator nothing.
    return calls(subject, small_windows((*SMALL_LENGTHS, (65, 64), (63, 130))))


# How many rounding steps of 1 a small result may be off by, in a wide dtype and in one of 16 bits.
STEPS_OF_WIDE, STEPS_OF_NARROW = 100, 10


@holds(
    "windows",
    "every small window sees exactly the keys of its definition",
    _windows,
)
def windows(subject: Subject, case: Case) -> str | None:
    """All windows of a few lengths up to one that is wider than both sequences.

    With so few numbers, each a sum of a few terms that may cancel, the budget of an error's norm would judge by luck. A key too
    many or too few is far outside this tolerance.
    """
    outcome, dtype = subject.run(case, case.draw()), case.problem.dtype
    steps = torch.finfo(dtype).eps * (STEPS_OF_WIDE if dtype.itemsize > 2 else STEPS_OF_NARROW)
    for name, part in outcome.parts().items():
        true, _ = expected(case)[name]
        if part.shape != true.shape or not torch.allclose(part.double(), true, rtol=steps, atol=steps):
            return f"{name}: off by {largest_difference(part.to(true.dtype), true):.1e}"
    return None


@holds(
    "unequal_lengths",
    "where Lq and Lk differ the ends are aligned",
    lambda subject, quick: calls(subject, rows_of("lengths", quick=quick), dtypes=of_run(subject, quick)),
    unless=lambda subject: None if subject.backend.capability.unequal_lengths else "it takes equal lengths only",
)
def unequal_lengths(subject: Subject, case: Case) -> str | None:
    """From a decode step to far more queries than keys."""
    return judged(subject, case)


@holds(
    "sizes",
    "head dims, lengths, windows, and numbers of sequences and heads past a kernel's bounds are right",
    lambda subject, quick: calls(
        subject, rows_of("sizes", quick=quick), dtypes=one(subject) if quick else two(subject)
    ),
)
def sizes(subject: Subject, case: Case) -> str | None:
    """A case each; of a backend that takes other head dims, at the nearest of these."""
    return judged(subject, case)


@holds(
    "value_dim",
    "values may be wider or narrower than keys",
    lambda subject, quick: calls(
        subject, rows_of("value_dim", quick=quick), ops=[op for op in subject.ops if op == ATTENTION.name]
    ),
    unless=lambda subject: None if ATTENTION.name in subject.ops else f"it has no {ATTENTION.name}",
)
def value_dim(subject: Subject, case: Case) -> str | None:
    """E and D differ, as far as the head dims that it takes let them."""
    return judged(subject, case)


@holds(
    "grouped_heads",
    "query head h reads key/value head h // (H // Hkv)",
    lambda subject, quick: calls(subject, rows_of("grouped", quick=quick), dtypes=of_run(subject, quick)),
    unless=lambda subject: None if subject.backend.capability.grouped_heads else "it takes no grouped heads",
)
def grouped_heads(subject: Subject, case: Case) -> str | None:
    """Their gradients are sums over the heads that read them."""
    return judged(subject, case)


@holds(
    "key_lengths",
    "keys at or past a sequence's length are invisible",
    lambda subject, quick: calls(subject, rows_of("key_lengths", quick=quick), dtypes=of_run(subject, quick)),
    unless=lambda subject: takes("key_lengths", subject),
)
def key_lengths(subject: Subject, case: Case) -> str | None:
    """Also where a length is 0, and in 32 bits."""
    return judged(subject, case)


def _with_bias(subject: Subject) -> list[str]:
    return [op for op in subject.ops if any(argument.name == "bias" for argument in ROWS[op].arguments)]


@holds(
    "bias",
    "a bias is added after scaling, and hides where it is -inf",
    lambda subject, quick: calls(
        subject, rows_of("bias", "bias_dtype", quick=quick), dtypes=of_run(subject, quick), ops=_with_bias(subject)
    ),
    unless=lambda subject: takes("bias", subject),
)
def bias(subject: Subject, case: Case) -> str | None:
    """Of its own dtype."""
    return judged(subject, case)


# How many of its rounding steps a result of 16 bits may be off by whose bias is wider: weights are rounded, and so is the result.
STEPS_OF_WIDE_BIAS = 4


@holds(
    "wide_bias",
    "a bias in float32 is added to scores in float32, not rounded to the 16 bits of the queries",
    lambda subject, quick: calls(
        subject, rows_of("wide_bias", quick=quick), dtypes=narrow(subject), gradients=False, ops=[ATTENTION.name]
    ),
    unless=lambda subject: _of_attention(subject) or _no_narrow(subject) or takes("bias", subject),
)
def wide_bias(subject: Subject, case: Case) -> str | None:
    """As of ALiBi, -100 and less; the naive computation rounds it, and is no measure."""
    inputs = case.draw()
    found = subject.run(case, inputs).output
    true = truth_in(case, inputs, torch.float64).results["output"]
    wrong = largest_difference(found.double(), true) / float(true.abs().max())
    most = STEPS_OF_WIDE_BIAS * torch.finfo(case.problem.dtype).eps
    return None if wrong <= most else f"output: off by {wrong:.1e} of the largest element, more than {most:.1e}"


@holds(
    "bias_gradients",
    "the gradient of a broadcast bias is summed to its own shape",
    lambda subject, quick: calls(
        subject,
        rows_of("broadcast", quick=quick),
        dtypes=one(subject) if quick else two(subject),
        gradients=True,
        ops=_with_bias(subject),
    ),
    unless=lambda subject: takes("bias", subject),
)
def bias_gradients(subject: Subject, case: Case) -> str | None:
    """In every way to broadcast one."""
    return judged(subject, case)


@holds(
    "layouts",
    "strides of any kind are read rightly, also of the incoming gradient",
    lambda subject, quick: calls(
        subject, rows_of("layout", quick=quick), dtypes=one(subject) if quick else subject.dtypes
    ),
)
def layouts(subject: Subject, case: Case) -> str | None:
    """Transposed, packed, expanded tensors, and parts of larger ones."""
    return judged(subject, case)


def _of_attention(subject: Subject) -> str | None:
    return None if ATTENTION.name in subject.ops else f"it has no {ATTENTION.name}"


def _magnitudes(subject: Subject, quick: bool) -> Iterable[Case]:
    in_wide_and_narrow = dict.fromkeys([*one(subject), *narrow(subject)])
    large = [each for case in rows_of("magnitude", quick=quick) for each in (case, case.changed(head_dim=64))]
    yield from calls(
        subject, [*large, *rows_of("large_bias", quick=quick)], dtypes=[*in_wide_and_narrow], ops=[ATTENTION.name]
    )
    # Their gradients leave the range of float16 too.
    yield from calls(
        subject, rows_of("past_float16", quick=quick), dtypes=narrow(subject), gradients=False, ops=[ATTENTION.name]
    )


@holds(
    "magnitudes",
    "scores, biases and values of every magnitude give results within the budget",
    _magnitudes,
    unless=_of_attention,
)
def magnitudes(subject: Subject, case: Case) -> str | None:
    """In two of three draws.

    Where scores are large, gradients hang on the few rows in which two of them are nearly equal, and whether a backend or the
    naive computation rounds these better is luck.
    """
    faults = []
    for seed in range(case.seed, case.seed + 3):
        drawn = replace(case, seed=seed)
        faults.append(fault_of_outcome(subject.run(drawn, drawn.draw()), expected(drawn)))
        if faults.count(None) == 2:
            return None
    return next(fault for fault in faults if fault is not None)


def _no_narrow(subject: Subject) -> str | None:
    return None if narrow(subject) else "it takes no dtype of 16 bits"


@holds(
    "accumulation",
    "numbers of 16 bits are added up in float32",
    lambda subject, quick: sums_of_results(subject),
    unless=_no_narrow,
)
def accumulation(subject: Subject, case: Case) -> str | None:
    """Products over a head dim, and averages over a wide window."""
    return fault_of_results(subject, case)


@holds(
    "gradient_sums",
    "gradients of 16 bits are added up in float32: over rows, keys and heads",
    lambda subject, quick: sums_of_gradients(subject),
    unless=_no_narrow,
)
def gradient_sums(subject: Subject, case: Case) -> str | None:
    """Of a wide window, and of 64 query heads that read one key head."""
    return fault_of_gradients(subject, case)


def _no_own_attention(subject: Subject) -> str | None:
    if ATTENTION.name not in subject.ops:
        return f"it has no {ATTENTION.name}"
    return None if subject.backend.local_attention is not None else f"its {ATTENTION.name} is composed by attnreg"


# By how much of the cap a capped score may be off in 16 bits: a fraction of what rounding it to these would cost.
COARSE_TANH = 2.0**-14


@holds(
    "log_sum_exp",
    "the log-sum-exp is the natural one of each row's visible scores and its sink, before dropout",
    lambda subject, quick: calls(
        subject,
        rows_of(
            *("window", "scale", "lengths", "key_lengths", "bias", "everything", "magnitude", "large_bias"),
            *("sinks", "dropout", "combined"),
            *(() if quick else ("query_starts", "packed", "softcap")),
            quick=quick,
        ),
        dtypes=subject.dtypes,
        gradients=False,
        ops=[ATTENTION.name],
    ),
    unless=_no_own_attention,
)
def log_sum_exp(subject: Subject, case: Case) -> str | None:
    """It means the same everywhere: a compiled graph may run one backend forward and another one backward."""
    inputs = case.draw()
    with subject.watched() as seen:
        subject.run(case, inputs)
    if not seen:  # there is nothing to compute
        return None
    found = seen[-1].returned[1]
    true = truth_in(case, inputs, torch.float64).results["log_sum_exp"]
    hidden = true == -torch.inf
    if not bool((found == -torch.inf)[hidden].all()):
        return "log_sum_exp: not -inf for a row that sees no key"
    size = float(true[~hidden].abs().max()) if bool((~hidden).any()) else 0.0
    # The terms of a score may be as large as the largest score, and cancel.
    step = {torch.float64: 1e-12}.get(case.problem.dtype, TF32_ACCURATE if allow_tf32() else 1e-5)
    most = step * max(size, 1.0)
    if case.problem.dtype.itemsize == 2:
        most += COARSE_TANH * dict(case.values).get("softcap", 0.0)
    wrong = (found.double() - true).abs()[~hidden]
    if not bool((wrong <= most).all()):
        return (
            f"log_sum_exp: off by {float(wrong.nan_to_num(nan=float('inf')).max()):.1e} where the largest is {size:.3g}"
        )
    return None


@holds(
    "blind_rows",
    "rows that see nothing give 0, log-sum-exp -inf and gradients 0",
    lambda subject, quick: calls(subject, rows_of("hidden", quick=quick)),
)
def blind_rows(subject: Subject, case: Case) -> str | None:
    """Exactly; so do hidden slots: their scores are -inf, and gradients 0 go back through them."""
    inputs = case.draw()
    with subject.watched() as seen:
        outcome = subject.run(case, inputs)
    sight = visibility(case, inputs)
    device = outcome.output.device
    blind, unseen = (~each.to(device) for each in (sight.seeing, sight.seen))
    hidden = blind[..., None] if sight.slots is None else ~sight.slots.to(device)
    if case.problem.op == DOT_PRODUCT.name:
        if not torch.equal(outcome.output == -torch.inf, hidden):
            return "scores: not -inf in exactly the hidden slots"
    elif bool(outcome.output[blind].any()):
        return "output: not 0 in a row that sees no key"
    for call in seen:
        if call.op is ATTENTION and not call.is_backward and bool((call.returned[1][blind] != -torch.inf).any()):
            return "log_sum_exp: not -inf for a row that sees no key"
    zero = {"query": blind, "weights": hidden, "key": unseen, "value": unseen}
    bias = inputs.arguments.get("bias")
    if bias is not None and bias.shape == hidden.shape:
        zero["bias"] = hidden
    for name, gradient in outcome.gradients.items():
        if name in zero and bool((gradient[zero[name]] != 0).any()):
            return f"gradient of {name}: not 0 where nothing is seen"
    return None


@holds(
    "wanted_gradients",
    "gradients are right whichever of them are asked for",
    lambda subject, quick: calls(
        subject,
        cases_named(
            *("causal", "key_lengths_with_bias", "grouped_heads"),
            *([] if quick else ["everything", "bias_full", "packed_softmax"]),
        ),
        dtypes=one(subject),
        gradients=True,
    ),
)
def wanted_gradients(subject: Subject, case: Case) -> str | None:
    """Within the budget: another set of gradients may come from other kernels, which round otherwise."""
    inputs = case.draw()
    names = list(inputs.leaves)
    for wanted in [list(each) for size in range(1, len(names)) for each in combinations(names, size)]:
        leaves = {name: tensor.detach().requires_grad_(name in wanted) for name, tensor in inputs.leaves.items()}
        results = subject.results(case, with_leaves(inputs, leaves))
        outcome = outcome_of(results, {name: leaves[name] for name in wanted}, inputs)
        fault = fault_of_outcome(outcome, expected(case))
        if fault is not None:
            return f"{fault}, where gradients of {' and '.join(wanted)} alone are asked for"
    return None


@holds(
    "expanded_gradients",
    "an incoming gradient of stride 0, as .sum() and .mean() send it, is taken",
    lambda subject, quick: calls(
        subject, rows_of("window", quick=True)[: 1 if quick else 5], dtypes=one(subject), gradients=True
    ),
)
def expanded_gradients(subject: Subject, case: Case) -> str | None:
    """One number in every place, and one row for all rows."""
    drawn = case.draw()
    shape = drawn.upstream.shape
    for part in (torch.ones_like(drawn.upstream[:1, :1, :1, :1]), drawn.upstream[:1, :1, :1]):
        inputs = replace(drawn, upstream=part.expand(shape))
        fault = fault_of_outcome(subject.run(case, inputs), expected_of(case, inputs))
        if fault is not None:
            return f"{fault}, where the incoming gradient has strides {inputs.upstream.stride()}"
    return None


@holds(
    "sizes_of_gradients",
    "a tiny or a large incoming gradient gives gradients that are as much smaller or larger",
    lambda subject, quick: calls(
        subject,
        cases_named("causal", *([] if quick else ["everything", "bias_full", "packed_softmax"])),
        # In float16 a tiny number has few digits, and a large one none.
        dtypes=[dtype for dtype in two(subject) if dtype != torch.float16],
        gradients=True,
    ),
)
def sizes_of_gradients(subject: Subject, case: Case) -> str | None:
    """By powers of two, which round nothing."""
    drawn = case.draw()
    for factor in (2.0**-40, 2.0**40):
        incoming = {name: gradient * factor for name, gradient in drawn.incoming.items()}
        inputs = replace(drawn, upstream=drawn.upstream * factor, incoming=incoming)
        fault = fault_of_outcome(subject.run(case, inputs), expected_of(case, inputs))
        if fault is not None:
            return f"{fault}, where the incoming gradient is {factor:.0e} times a usual one"
    return None
