"""Each mutant is found by the property that it names, made of a right backend however that declares what it takes."""

from __future__ import annotations

import functools
import inspect
import os
import threading
import warnings
from dataclasses import replace

import pytest
import torch

from attnreg import Window
from attnreg.op import ATTENTION, ROWS
from attnreg.testing import conform, make_case, shrinking
from attnreg.testing.case import LAYOUTS
from attnreg.testing.conformance import chosen_properties
from attnreg.testing.mutants import MUTANTS
from attnreg.testing.property import PROPERTIES, select
from attnreg.testing.subject import find, under_test
from attnreg.testing.sums import OF_KEYS, of_one_sign
from attnreg.testing.surroundings import as_at_first, left_as_found, state

CPU = torch.device("cpu")
# What a mutant raises that did not get what it should have.
OF_ITS_MAKING = ("raised TypeError", *(f"raised KeyError: {name!r}" for op in ROWS.values() for name in op.optional))


def right_that_takes_what_it_names():
    """As CONTRIBUTING shows it: its functions name what they take, and its capability does not."""
    (backend, _) = find("torch_block")
    functions = {}
    for op in ROWS.values():
        arguments = [argument.name for argument in op.arguments]
        functions[op.name] = naming(getattr(backend, op.name), arguments)
        of_backward = [*arguments, *(argument.name for argument in op.incoming), "needs_grad"]
        functions[op.backward] = naming(getattr(backend, op.backward), of_backward)
    return replace(backend, name="named", capability=replace(backend.capability, takes=None), **functions)


def naming(function, names):
    """The function with a signature that names its arguments."""

    @functools.wraps(function)
    def call(*inputs, **given):
        return function(*inputs, **given)

    keywords = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in names]
    inputs = inspect.Parameter("inputs", inspect.Parameter.VAR_POSITIONAL)
    call.__signature__ = inspect.Signature([inputs, *keywords])
    return call


def test_a_right_backend_that_names_what_it_takes_breaks_nothing():
    few = ["values", "gradients", "bias", "key_lengths", "packed", "sinks", "dropout", "other_numbers", "interleaved"]
    assert conform(right_that_takes_what_it_names(), quick=True, properties=few).broken == ()


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_of_a_backend_that_names_what_it_takes_is_killed_by_its_property_for_its_own_fault(name):
    right = right_that_takes_what_it_names()
    mutant = MUTANTS[name].of(right)
    assert ATTENTION.optional <= set(mutant.capability.takes)
    report = conform(mutant, quick=True, properties=[MUTANTS[name].property], shrink=False)
    assert report.broken == (MUTANTS[name].property,) or report.untried is not None
    faults = [failure.fault for finding in report.findings for failure in finding.failures]
    assert [fault for fault in faults if fault.startswith(OF_ITS_MAKING)] == []


def test_a_mutant_that_changes_the_capability_keeps_its_change():
    mutant = MUTANTS["float64_in_float32"].of(right_that_takes_what_it_names())
    assert mutant.capability.dtypes == {torch.float64}
    assert mutant.capability.takes == ATTENTION.optional


def test_every_kind_that_a_fuzzer_found_has_a_property_and_a_mutant():
    kinds = {
        *("interleaved", "other_numbers", "inference_mode", "threads", "lets_go", "quiet", "other_settings"),
        *("sizes", "wide_bias", "gradient_sums", "sizes_of_gradients", "visible_nan"),
    }
    assert kinds <= PROPERTIES.keys()
    assert kinds <= {mutant.property for mutant in MUTANTS.values()}


def test_names_of_properties_fit_the_table_of_the_command():
    assert max(map(len, PROPERTIES)) <= len("expanded_gradients")


@pytest.mark.parametrize("quick", [True, False])
@pytest.mark.parametrize(
    "name", ["values", "gradients", "hidden", "log_sum_exp", "repeatable", "uninitialised", "inputs_unchanged"]
)
def test_every_declared_dtype_is_tried(name, quick):
    with under_test("torch_block") as subject:
        tried = {case.problem.dtype for case in select(PROPERTIES[name], subject, quick=quick).cases}
    dtypes = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
    assert tried == dtypes


def test_both_dtypes_of_16_bits_are_tried_at_every_magnitude():
    with under_test("torch_block") as subject:
        cases = select(PROPERTIES["magnitudes"], subject, quick=True).cases
    assert {case.problem.dtype for case in cases} == {torch.float16, torch.bfloat16, torch.float32}


# Cases


def drawn(**facts):
    return make_case(query_length=9, window=Window(3, 1), **facts).draw()


def test_the_lowest_number_hides_nothing():
    bias = drawn(bias="NHLW", hidden=0.5, lowest=True).arguments["bias"]
    assert bias.isfinite().all()
    assert (bias == torch.finfo(torch.float32).min).any()


def test_a_bias_is_shifted_and_values_are_scaled():
    assert (drawn(bias="H1W", shift=100.0).arguments["bias"] > 80).all()
    large = drawn(dtype=torch.float16, value_magnitude=1e4, needs_grad=False).tensors["value"]
    assert large.isfinite().all()
    assert large.abs().max() > 1e4


def test_what_is_given_of_rows_is_drawn_as_it_is_written():
    given = drawn(
        key_starts=(3,), query_starts=(-5, 2**40), query_starts_dtype=torch.int64, key_lengths=(99, 4)
    ).arguments
    assert {name: each.tolist() for name, each in given.items()} == {
        "key_lengths": [9, 4],
        "key_starts": [3, 3],
        "query_starts": [-5, 2**40],
    }
    packed = make_case(query_length=9, cu_seqlens_q=(0, 4, 20), cu_seqlens_q_dtype=torch.int32, cu_seqlens_k=())
    assert packed.problem.batch == 1
    offsets = packed.draw().arguments
    assert offsets["cu_seqlens_q"].tolist() == [0, 4, 9]
    assert offsets["cu_seqlens_q"].dtype == torch.int32
    assert (offsets["cu_seqlens_k"].diff() >= 0).all()


def test_sinks_are_drawn_as_they_are_written_and_dropout_brings_its_seed():
    first, second = drawn(sinks=(1.0, -torch.inf), dropout_p=0.1), drawn(sinks=(), dropout_p=0.1, seed=1)
    assert first.arguments["sinks"].tolist() == [1.0, -torch.inf]
    assert second.arguments["sinks"].shape == first.arguments["sinks"].shape
    assert first.arguments["seed"].dtype == torch.int64
    assert int(first.arguments["seed"]) != int(second.arguments["seed"])
    assert max(abs(int(each.arguments["seed"])) for each in (first, second)) >= 2**32
    strided = drawn(sinks=(1.0, 2.0), layout="strided").arguments["sinks"]
    assert (strided.tolist(), strided.stride()) == ([1.0, 2.0], (2,))


def test_an_incoming_gradient_of_the_log_sum_exp_is_there_where_gradients_are():
    case = make_case(query_length=9, grad_log_sum_exp=True, dtype=torch.bfloat16)
    (gradient,) = case.draw().incoming.values()
    assert (gradient.shape, gradient.dtype) == ((2, 2, 9), torch.float32)
    assert case.changed(needs_grad=False).draw().incoming == {}
    of_products = case.of("local_dot_product", torch.bfloat16, CPU)
    assert of_products.problem.given == ()
    assert of_products.draw().incoming == {}


def test_smaller_packs_are_packs():
    case = make_case(
        query_length=9, cu_seqlens_q=(0, 4, 4, 7), cu_seqlens_k=(0, 2, 9, 9), sinks=(1.0, 2.0), dropout_p=0.5
    )
    smaller = list(shrinking._smaller(case))
    assert len(smaller) > 20
    for each in smaller:
        given = each.draw().arguments
        assert ("dropout_p" in given) == ("seed" in given)
        for name in ("cu_seqlens_q", "cu_seqlens_k"):
            if name in given:
                assert given[name][0] == 0
                assert (given[name].diff() >= 0).all()
                assert len(given[name]) == len(given["cu_seqlens_q"])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_changes_no_shape_and_no_dtype(layout):
    plain, laid = drawn(bias="NHLW"), drawn(bias="NHLW", layout=layout)
    for name, tensor in laid.leaves.items():
        assert (tensor.shape, tensor.dtype) == (plain.leaves[name].shape, plain.leaves[name].dtype)


def test_layouts_in_which_tensors_differ():
    mixed = drawn(layout="mixed").tensors
    assert len({tensor.stride() for tensor in mixed.values()}) == 3
    assert drawn(layout="one_key").tensors["key"].stride(2) == 0
    assert drawn(layout="misaligned").tensors["key"].data_ptr() % 8 == 4


def test_all_terms_of_a_sum_have_one_sign():
    case = OF_KEYS.of("local_attention", torch.bfloat16, CPU)
    inputs = of_one_sign(case)
    assert (inputs.tensors["query"] >= 0).all()
    assert (inputs.upstream >= 0).all()
    assert (inputs.tensors["key"][:, :, 1:] <= 0).all()
    assert (inputs.tensors["value"][:, :, 1:] == 0).all()


# Surroundings


def test_settings_are_put_back():
    before = state(CPU)
    with left_as_found():
        torch.set_default_dtype(torch.float64)
        torch.set_flush_denormal(True)
        torch.autograd.set_detect_anomaly(True)
        os.environ["ATTNREG_LEFT"] = "here"
        warnings.simplefilter("ignore")
    after = state(CPU)
    assert [
        name for name, value in before.items() if not isinstance(value, torch.Tensor) and value != after[name]
    ] == []


def test_what_was_left_behind_before_does_not_hide_that_it_is_left_again(monkeypatch):
    monkeypatch.setenv("ATTNREG_LEFT", "here")
    with as_at_first():
        assert "ATTNREG_LEFT" not in os.environ
    assert os.environ["ATTNREG_LEFT"] == "here"


def test_a_run_leaves_no_thread_and_no_setting():
    threads, before = threading.active_count(), state(CPU)
    names = ["threads", "quiet", "settings", "other_settings", "inference_mode", "lets_go"]
    assert conform("torch_block", quick=True, properties=names).broken == ()
    after = state(CPU)
    assert threading.active_count() == threads
    assert [
        name for name, value in before.items() if not isinstance(value, torch.Tensor) and value != after[name]
    ] == []


def test_every_property_is_in_the_order_of_a_module():
    assert {each.name for each in chosen_properties(None)} == PROPERTIES.keys()


def test_a_backend_that_differentiates_some_head_dims_or_dtypes_is_tried_in_these():
    """By a rule of its own, of which its capability says nothing."""

    def refuse(problem):
        if problem.needs_grad and problem.head_dim % 32:
            return "no gradients at such a head dim"
        return "no gradients in float32" if problem.needs_grad and problem.dtype == torch.float32 else None

    picky = replace(right_that_takes_what_it_names(), name="picky", refuse=refuse)
    report = conform(picky, quick=True, properties=["gradients", "wanted_gradients", "value_dim"])
    states = {finding.tested.name: (finding.state, finding.cases) for finding in report.findings}
    assert states["gradients"][0] == states["wanted_gradients"][0] == "held"
    assert states["wanted_gradients"][1] > 3


def test_two_head_dims_are_not_made_one():
    def refuse(problem):
        return "E and D differ" if problem.value_dim and problem.head_dim not in (0, problem.value_dim) else None

    equal = replace(right_that_takes_what_it_names(), name="equal", refuse=refuse)
    (finding,) = conform(equal, quick=True, properties=["value_dim"]).findings
    assert finding.state == "does not apply"
