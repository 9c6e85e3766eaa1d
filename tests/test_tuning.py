"""Tuning: how candidates are measured, and what is measured on first use."""

from __future__ import annotations

import os
import threading
import time
from dataclasses import replace

import pytest
import torch
from tabled import CPU, SMALL, as_torch_block, broken_text, call, empty_tensors, here, problem, run, settles, table_of

import attnreg
from attnreg import Backend, Capability, Window
from attnreg.measured import Figure
from attnreg.measuring import steadiness
from attnreg.measuring.timing import cache_bytes
from attnreg.op import OPS
from attnreg.problem import Given
from attnreg.registry import registry
from attnreg.tables import store
from attnreg.testing import oracle
from attnreg.tuning import autotune, writing
from attnreg.tuning.candidate import Measurement
from attnreg.tuning.tune import grid
from attnreg.tuning.worker import Worker

# Measuring


def test_nothing_is_measured_where_it_cannot_be_written(folder):
    folder.write_text("a file where the folder should be")
    seen = []
    with pytest.raises(OSError, match=f"tables cannot be written: {folder} cannot be made: {folder} is no folder"):
        attnreg.tune(**SMALL, device=CPU, windows=[4], progress=seen.append)
    assert not seen


def test_tuning_measures_every_candidate_and_the_next_call_goes_by_it(folder):
    seen = []
    found = attnreg.tune(**SMALL, device=CPU, windows=[4], gradients=[False, True], seconds=0.01, progress=seen.append)
    assert {(step.backend, step.problem.needs_grad) for step in seen} == {
        (n, g) for n in ("torch", "torch_block") for g in (False, True)
    }
    assert [step.done for step in seen] == list(range(1, 5))
    assert all(step.figure.seconds > 0 for step in seen)
    assert found.path is not None
    assert store.load(found.path).rows == found.table.rows
    assert attnreg.explain(*empty_tensors(), Window.causal(4)).source == "tuned"


CLASSES = {
    "rows": ["key_lengths", "key_starts", "query_starts"],
    "packed": ["cu_seqlens_q"],
    "packed, other keys": ["cu_seqlens_k"],
    "softmax": ["softcap", "sinks"],
    "dropout": ["dropout_p"],
    "all results": ["grad_log_sum_exp", "sinks"],
    "bias": ["bias"],
}


@pytest.mark.parametrize("names", CLASSES.values(), ids=CLASSES)
def test_calls_with_all_that_may_be_given_are_measured_and_found_right(folder, names):
    options = {**SMALL, "device": CPU, "windows": [4], "given": [names], "backends": ["torch"], "lengths": [300]}
    found = attnreg.tune(**options, gradients=[False, True], seconds=0.001)
    assert [row.needs_grad for row in found.table.rows] == ([True] if "grad_log_sum_exp" in names else [False, True])
    for row, figures in found.table.rows.items():
        assert set(names) <= {name for name, _ in row.given}
        assert figures["torch"].seconds, figures["torch"].reason
    assert store.load(found.path).rows == found.table.rows


def _wrongly(spoil):
    """The attention of the reference with something else in its arguments."""

    def forward(query, key, value, window, **options):
        return registry.functions("torch")["local_attention"](
            query, key, value, window, **{**options, **spoil(options)}
        )

    return forward


@pytest.mark.parametrize(
    ("names", "spoil"),
    [
        (["sinks"], lambda options: {"sinks": None}),
        (["softcap"], lambda options: {"softcap": None}),
        (["dropout_p"], lambda options: {"seed": options["seed"] + 1}),
        (["key_starts"], lambda options: {"key_starts": None}),
        (["query_starts"], lambda options: {"query_starts": options["query_starts"] + 1}),
        (["cu_seqlens_q"], lambda options: {"cu_seqlens_q": options["cu_seqlens_q"][[0, -1]]}),
        (["cu_seqlens_k"], lambda options: {"cu_seqlens_k": None}),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_candidate_that_does_not_heed_what_is_given_is_found_wrong(folder, names, spoil):
    takes = next(each.backend.capability.takes for each in registry.entries if each.backend.name == "torch")
    capability = Capability(dtypes={torch.float32}, takes=takes)
    backend = Backend(name="bad", capability=capability, local_attention=_wrongly(spoil))
    options = {**SMALL, "device": CPU, "windows": [20], "lengths": [600], "given": [names], "gradients": [False]}
    with attnreg.register(backend):
        found = attnreg.tune(**options, backends=["bad", "torch"], seconds=0.001, keep=False)
    (figures,) = found.table.rows.values()
    assert figures["bad"].is_wrong, figures["bad"]
    assert figures["torch"].seconds


def test_the_gradient_of_the_log_sum_exp_is_compared_with_the_truth(folder):
    def backward(*inputs, grad_log_sum_exp, **options):
        return registry.functions("torch")["local_attention_backward"](*inputs, grad_log_sum_exp=None, **options)

    torch_backend = next(each.backend for each in registry.entries if each.backend.name == "torch")
    options = {**SMALL, "device": CPU, "windows": [4], "given": [["grad_log_sum_exp"]], "seconds": 0.001, "keep": False}
    bad = replace(torch_backend, name="bad", differentiable=False, local_attention_backward=backward,
                  local_dot_product=None, local_weighted_average=None)  # fmt: skip
    with attnreg.register(bad):
        found = attnreg.tune(**options, backends=["bad", "torch"])
    (figures,) = found.table.rows.values()
    assert figures["bad"].is_wrong, figures["bad"]
    assert figures["torch"].seconds


def test_a_grid_leaves_out_ops_that_lack_what_is_given_and_the_forward_of_what_comes_in():
    sizes = {**SMALL, "batch": 1, "windows": [4], "device": CPU, "gradients": [False, True], "ops": OPS}
    plain, softmax, rows = (grid(**sizes, given=[names]) for names in ([], ["sinks"], ["key_starts"]))
    assert [len(plain), len(softmax), len(rows)] == [6, 2, 6]
    (incoming,) = grid(**sizes, given=[["grad_log_sum_exp"]])
    assert incoming.needs_grad
    both = grid(**sizes, given=[[], ["dropout_p"]])
    assert set(both) == {*plain, *grid(**sizes, given=[["dropout_p", "seed"]])}
    (problem, *_) = grid(**{**sizes, "ops": ["local_attention"]}, given=[["bias", "sinks", "cu_seqlens_k"]])
    assert dict(problem.given) == {
        "bias": Given((1, 2, 1, 4), torch.float32),
        "cu_seqlens_q": Given((), torch.int64),
        "cu_seqlens_k": Given((), torch.int64),
        "sinks": Given((2,), torch.float32),
    }


def _raises(*arguments, **options):
    raise RuntimeError("boom")


def _wrong(query, key, value, window, **options):
    return torch.zeros_like(query), torch.zeros(query.shape[:3])


def _out_of_memory(*arguments, **options):
    return torch.empty(2**60)


@pytest.mark.parametrize(
    ("function", "reason"), [(_raises, "boom"), (_wrong, "wrong: output"), (_out_of_memory, "RuntimeError")]
)
def test_a_candidate_that_fails_is_recorded_with_its_reason_and_costs_only_itself(folder, function, reason):
    with attnreg.register(as_torch_block("bad", local_attention=function, rank=1)):
        found = attnreg.tune(**SMALL, device=CPU, windows=[4], gradients=[False], seconds=0.01)
        (figures,) = found.table.rows.values()
        assert reason in figures["bad"].reason
        assert figures["torch"].seconds
        assert figures["torch_block"].seconds
        assert attnreg.explain(*empty_tensors(), Window.causal(4)).backend != "bad"


PLUGIN = """
import os, time
from attnreg import Backend, Capability, hookimpl
import torch
def dies(*a, **k): os.kill(os.getpid(), 11)
def leaves(*a, **k): raise SystemExit(3)
def hangs(*a, **k): time.sleep(100)
def chats(query, key, value, window, **o):
    print("hello")
    raise ValueError("it talked")
def tells(*a, **k):
    cpu = torch.backends.mkldnn.matmul.fp32_precision
    raise ValueError(f"{torch.get_num_threads()} {torch.get_float32_matmul_precision()} {cpu}")
@hookimpl
def attnreg_backends():
    for each in (dies, leaves, hangs, chats, tells):
        yield Backend(name=each.__name__, capability=Capability(dtypes=(torch.float32,)), local_attention=each)
"""


@pytest.fixture
def bad_plugin(tmp_path, monkeypatch, folder):
    """A distribution whose backends do to their process what they like."""
    (tmp_path / "bad_plugin.py").write_text(PLUGIN)
    info = tmp_path / "bad_plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Name: bad-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[attnreg]\nbad = bad_plugin\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    attnreg.reset()


@pytest.mark.parametrize(
    ("name", "reason"),
    [("dies", "signal SIGSEGV"), ("leaves", "SystemExit: 3"), ("hangs", "given up after 5 s"), ("chats", "it talked")],
)
def test_a_candidate_that_dies_leaves_hangs_or_chats_takes_nothing_along(bad_plugin, name, reason):
    (call,) = grid(**{**SMALL, "batch": 1, "windows": [4], "device": CPU, "gradients": [False]})
    with Worker() as worker:
        assert worker.measure(call, "torch", 0.01).figure.seconds
        patient, worker.longest = worker.longest, 5  # now that the child has started
        assert reason in worker.measure(call, name, 0.01).figure.reason
        worker.longest = patient
        assert worker.measure(call, "torch_block", 0.01).figure.seconds


def test_a_child_measures_under_the_settings_that_the_table_says(bad_plugin, as_set):
    (call,) = grid(**{**SMALL, "batch": 1, "windows": [4], "device": CPU, "gradients": [False]})
    with Worker() as worker:
        for threads, precision in ((1, "highest"), (2, "high"), (1, "medium"), (2, "highest")):
            torch.set_num_threads(threads)
            torch.set_float32_matmul_precision(precision)
            found = worker.measure(call, "tells", 0.01).figure.reason
            assert found == f"ValueError: {threads} {precision} {torch.backends.mkldnn.matmul.fp32_precision}"


@pytest.mark.parametrize(
    "around",
    [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)],
    ids=["no_grad", "inference_mode", "autocast"],
)
def test_what_stands_around_a_tuning_has_no_part_in_it(folder, around):
    seen = []

    def forward(query, key, value, window, **options):
        seen.append((torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu"), query.dtype))
        return registry.functions("torch")["local_attention"](query, key, value, window, **options)

    with attnreg.register(as_torch_block("local", local_attention=forward)), around():
        found = attnreg.tune(**SMALL, device=CPU, windows=[4], gradients=[True], backends=["local"], seconds=0.01)
    (figures,) = found.table.rows.values()
    assert figures["local"].reason is None
    assert set(seen) == {(False, False, torch.float32)}


@pytest.fixture
def copies(monkeypatch):
    """What the copies take that tell whether something else uses the device, one for each measurement in turn."""
    times = []

    def measure(self, problem, backend, seconds):
        copying = times.pop(0)
        # A figure tells which copy it came with.
        return Measurement(Figure(seconds=copying, reason=None if copying else "boom"), copying)

    monkeypatch.setattr(Worker, "measure", measure)
    return times


@pytest.mark.parametrize(
    ("times", "kept", "disturbed"),
    [
        ([1.0, 1.1, 1.4, 1.0], [1.0, 1.1, 1.4, 1.0], []),
        ([1.0, 2.0, 1.1, 1.0, 1.0], [1.0, 1.1, 1.0, 1.0], []),  # the second, measured again, was not disturbed
        (
            [1.0, 2.0, 3.0, 1.0, 1.0],
            [1.0, 2.0, 1.0, 1.0],
            [(4, "torch_block")],
        ),  # it was; the less disturbed figure stays
        ([1.0, 2.0, None, 1.0, 1.0], [1.0, 2.0, 1.0, 1.0], [(4, "torch_block")]),  # the second measurement of it failed
        # Only a later one shows that the first two were disturbed.
        ([2.0, 2.0, 1.0, 1.0], [2.0, 2.0, 1.0, 1.0], [(4, "torch"), (4, "torch_block")]),
        ([None, 1.0, None, 1.0], [None, 1.0, None, 1.0], []),  # what has no time has no copy
    ],
)
def test_what_was_measured_beside_something_else_is_measured_again_and_named(folder, copies, times, kept, disturbed):
    copies += times
    options = {**SMALL, "windows": [4, 8], "gradients": [False], "backends": ["torch", "torch_block"]}
    found = attnreg.tune(**options, device=CPU)
    assert not copies
    assert [figure.seconds for row in found.table.rows.values() for figure in row.values()] == kept
    assert [(call.window.size, name) for call, name in found.disturbed] == disturbed


def test_the_command_says_that_something_else_used_the_device(folder, copies):
    copies += [1.0, 3.0, 3.0]
    sizes = ("--op", "local_attention", "--dtype", "float32", "--head-dim", "8", "--length", "64", "--heads", "2,1")
    result = run(
        *sizes, "--window", "4", "--no-grad", "--backend", "torch", "--backend", "torch_block", "--device", "cpu"
    )
    assert result.exit_code == 0, result.output
    assert "measured while something else used the device" in result.output
    assert "  torch_block: local_attention, forward; float32 E=8 D=8 Lq=64 Lk=64 N*H=2 H/Hkv=2 W=4\n" in result.output


def test_the_time_of_a_copy_is_that_of_one_copy_of_more_than_the_cache(monkeypatch):
    copied = []

    def slow_copy(target, source):
        copied.append(source.nbytes)
        time.sleep(0.004)

    monkeypatch.setattr(torch.Tensor, "copy_", slow_copy)
    assert 0.004 <= steadiness.copy_seconds(CPU) < 0.04
    assert min(copied) > cache_bytes(CPU)


def test_without_room_for_a_copy_nothing_is_known(monkeypatch):
    def no_room(*sizes, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(steadiness.torch, "zeros", no_room)
    assert steadiness.copy_seconds(CPU) is None


def test_an_interrupted_tuning_keeps_what_was_measured(folder):
    def interrupt(step):
        if step.done == 3:
            raise KeyboardInterrupt

    found = attnreg.tune(**SMALL, device=CPU, windows=[4, 8], gradients=[False], seconds=0.01, progress=interrupt)
    assert found.interrupted
    assert sum(map(len, store.load(found.path).rows.values())) == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ops": ["attention"]}, "ops must be of local_dot_product"),
        ({"windows": [0]}, r"windows must be whole numbers of at least 1; got \[0\]"),
        ({"heads": [(3, 2)]}, r"H a multiple of Hkv; got \(3, 2\)"),
        ({"backends": ["nobody"]}, "no backend is called 'nobody'; registered:"),
        ({"dtypes": []}, "dtypes is empty"),
        ({"dtypes": [torch.int8]}, "dtypes must be floating-point dtypes of torch; got torch.int8"),
        ({"gradients": []}, r"gradients must be one or both of False and True; got \[\]"),
        ({"device": "nowhere"}, "device 'nowhere' is not to be had"),
        ({"given": []}, "given is empty"),
        ({"given": ["sinks"]}, "given must be sequences of arguments' names; got 'sinks'"),
        ({"given": [["sink"]]}, "none of local_attention has sink; their arguments are bias, "),
        ({"given": [["sinks"]], "ops": ["local_dot_product"]}, "none of local_dot_product has sinks"),
        ({"given": [["cu_seqlens_q", "key_starts"]]}, "cu_seqlens_q and key_starts cannot be given together"),
        ({"given": [["cu_seqlens_q"]], "batch": 2}, "with cu_seqlens_q, the batch size is 1; got 2"),
    ],
)
def test_bad_arguments_are_named(folder, changes, message):
    with pytest.raises(ValueError, match=message):
        attnreg.tune(**{**SMALL, "device": CPU, "windows": [4], **changes})


# On first use


def test_autotune_measures_a_class_once_and_remembers(folder):
    attnreg.autotune(True)
    call(window=8)
    (path,) = folder.glob("*.json")
    assert len(store.load(path).rows) == 1
    call(window=8)
    call(window=9)
    assert len(store.load(path).rows) == 1
    call(window=32)
    assert len(store.load(path).rows) == 2
    attnreg.autotune(False)
    call(window=2)
    assert len(store.load(path).rows) == 2


def test_autotune_measures_calls_with_a_bias_of_fewer_queries_and_other_values_apart(folder):
    attnreg.autotune(True)
    query, key, value = torch.randn(1, 2, 3, 8), torch.randn(1, 1, 64, 8), torch.randn(1, 1, 64, 5)
    options = {"bias": torch.randn(2, 1, 8), "key_lengths": torch.tensor([40])}
    for _ in range(2):
        attnreg.local_attention(query, key, value, Window.causal(8), **options)
        attnreg.local_attention(query, key, value, Window.causal(8), scale=0.1)
    (path,) = folder.glob("*.json")
    calls = list(store.load(path).rows)
    assert [[name for name, _ in call.given] for call in calls] == [[], ["bias", "key_lengths"]]
    assert {(call.query_length, call.key_length, call.head_dim, call.value_dim) for call in calls} == {(3, 64, 8, 5)}
    assert all(figure.seconds for row in store.load(path).rows.values() for figure in row.values())


def test_autotune_measures_calls_with_what_else_may_be_given_apart(folder):
    attnreg.autotune(True)
    query, key = torch.randn(1, 2, 64, 8), torch.randn(1, 1, 64, 8)
    # Two that can be chosen from, whatever is given.
    torch_backend = next(each.backend for each in registry.entries if each.backend.name == "torch")
    calls = [
        {},
        {"sinks": torch.randn(2)},
        {"softcap": 2.0},
        {"dropout_p": 0.1},
        {"cu_seqlens_q": torch.tensor([0, 9, 64])},
        {"query_starts": torch.tensor([3])},
    ]
    with attnreg.register(replace(torch_backend, name="second", rank=99)):
        for given in [*calls, *calls]:
            attnreg.local_attention(query, key, key, Window.causal(8), **given)
        attnreg.local_attention(query, key, key, Window.causal(8), cu_seqlens_q=torch.tensor([0, 64]))
        leaf = query.clone().requires_grad_()
        attnreg.local_attention_with_lse(leaf, key, key, Window.causal(8))
    rows = [row for path in folder.glob("*.json") for row in store.load(path).rows.items()]
    assert {tuple(name for name, _ in call.given) for call, _ in rows} == {
        (), ("sinks",), ("softcap",), ("dropout_p", "seed"), ("cu_seqlens_q",), ("query_starts",), ("grad_log_sum_exp",)
    }  # fmt: skip
    assert len(rows) == 7
    assert all(figures["torch"].seconds and figures["second"].seconds for _, figures in rows)


@pytest.mark.parametrize("window", [Window(2**60, 0), Window(2**62 - 1, 2**62 - 1)], ids=str)
@pytest.mark.parametrize("given", [{}, {"query_starts": torch.tensor([3])}], ids=["plain", "query_starts"])
def test_autotune_measures_a_call_of_the_widest_window(folder, window, given):
    attnreg.autotune(True)
    tensor = torch.randn(1, 2, 64, 8)
    torch_backend = next(each.backend for each in registry.entries if each.backend.name == "torch")
    with attnreg.register(replace(torch_backend, name="second", rank=99)):
        attnreg.local_attention(tensor, tensor, tensor, window, **given)
    (path,) = folder.glob("*.json")
    ((row, figures),) = store.load(path).rows.items()
    assert row.window.size <= 127
    assert all(figure.seconds for figure in figures.values()), figures


def test_a_broken_table_breaks_no_tuning_on_first_use(folder):
    folder.mkdir()
    (folder / here().file_name).write_text(broken_text("bad_time"))
    attnreg.autotune(True)
    call()
    assert len(list(folder.glob("*.json"))) == 2
    assert attnreg.explain(*empty_tensors(), Window.causal(8)).source == "tuned"


def test_autotune_leaves_alone_what_it_cannot_judge(folder, monkeypatch):
    monkeypatch.setattr(oracle, "KNOWN", ("key_lengths", "scale"))
    attnreg.autotune(True)
    call(bias=torch.ones(8))
    assert not folder.exists()
    call()
    assert folder.exists()


def test_autotune_by_the_environment_leaves_forced_and_deterministic_calls_alone(folder, monkeypatch):
    monkeypatch.setenv("ATTNREG_AUTOTUNE", "1")
    call(backend="torch")
    with attnreg.use_backend("torch"):
        call()
    torch.use_deterministic_algorithms(True)
    try:
        call()
    finally:
        torch.use_deterministic_algorithms(False)
    assert not folder.exists()
    call()
    assert len(list(folder.glob("*.json"))) == 1


def test_a_child_that_was_forked_while_a_thread_was_measuring_does_not_wait_for_it(folder):
    writing.save(table_of({"torch": 1.0, "torch_block": 2.0}))
    with autotune._one_at_a_time:  # nobody is there in the child to let go of it
        assert _forked(lambda: autotune.tune_on_first_use(problem())) == 0


def _forked(function):
    """The exit code of a child in which a thread other than that which forked it runs ``function``; 1 where it hangs."""
    child = os.fork()
    if child == 0:
        try:
            thread = threading.Thread(target=function, daemon=True)
            thread.start()
            thread.join(20)
            os._exit(int(thread.is_alive()))
        finally:
            os._exit(2)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_backend_that_calls_attnreg_itself_is_measured_on_first_use(folder):
    def forward(query, key, value, window, **options):
        attnreg.local_dot_product(query, key, window)
        return registry.functions("torch")["local_attention"](query, key, value, window, **options)

    attnreg.autotune(True)
    with attnreg.register(as_torch_block("calls", local_attention=forward)):
        thread = threading.Thread(target=call, daemon=True)
        thread.start()
        thread.join(60)
        assert not thread.is_alive()
    assert {row.op for path in folder.glob("*.json") for row in store.load(path).rows} == {
        "local_attention",
        "local_dot_product",
    }


def test_float32_calls_are_measured_anew_where_products_may_be_less(folder, as_set):
    attnreg.autotune(True)
    for precision in ("highest", "high", "high", "highest"):
        torch.set_float32_matmul_precision(precision)
        settles()
        call()
    tables = [store.load(path) for path in folder.glob("*.json")]
    assert sorted(str(table.environment.float32) for table in tables) == ["None", "tf32"]
    assert [len(table.rows) for table in tables] == [1, 1]


def test_autotune_takes_only_true_false_and_none():
    with pytest.raises(TypeError, match="on must be True, False or None, got 1"):
        attnreg.autotune(1)
