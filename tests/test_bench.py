"""The benchmark: its floor, its table of workloads, its checks, and ``attnreg bench`` from end to end."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
import torch
from attnreg_benchmarks import results as stored
from attnreg_benchmarks import run as running
from attnreg_benchmarks.backends import backends
from attnreg_benchmarks.contender import Contender
from attnreg_benchmarks.floor import Ceilings, floor_seconds, flops, visible_pairs
from attnreg_benchmarks.peers import PEERS
from attnreg_benchmarks.plot import plot_results
from attnreg_benchmarks.run import merge, run, verify
from attnreg_benchmarks.workloads import AVERAGE, DIRECTIONS, DOT, FUSED, ON_REQUEST, WORKLOADS, select, series_of
from reference import brute_force_visible
from typer.testing import CliRunner

from attnreg import Problem, Window
from attnreg.cli import app
from attnreg.device import why_unusable
from attnreg.measuring.sizes import bytes_moved, square_problem, tensor_shapes
from attnreg.measuring.timing import measure, measuring_stream, sets_for_cold_cache
from attnreg.op import OPS
from attnreg.problem import Given
from attnreg.testing.inputs import Calls
from attnreg.testing.stage import set_stage

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
RECORDED = sorted(
    path
    for path in (Path(__file__).parents[1] / "benchmarks" / "results").glob("*/*.json")
    if "workloads" in json.loads(path.read_text())
)
H200 = Ceilings(4.26e12, {"bf16": 790e12, "tf32": 355e12, "fp32": 51e12})

# Measured figures are compared with these: forward and backward floor in ms on an H200.
FUSED_FLOORS = {16: (0.063, 0.126), 64: (0.063, 0.126), 128: (0.063, 0.126), 256: (0.063, 0.126), 512: (0.084, 0.211),
                1024: (0.163, 0.408)}  # fmt: skip
WIDE_FLOORS = {16: (0.126, 0.252), 64: (0.126, 0.252), 128: (0.126, 0.252), 256: (0.126, 0.252), 512: (0.169, 0.421),
               1024: (0.326, 0.816)}  # fmt: skip
DOT_FLOORS = {8: (0.031, 0.060), 32: (0.037, 0.066), 64: (0.044, 0.073), 128: (0.059, 0.088), 256: (0.088, 0.117),
              512: (0.146, 0.176)}  # fmt: skip
AVERAGE_FLOORS = {8: (0.031, 0.048), 32: (0.037, 0.059), 64: (0.044, 0.073), 128: (0.059, 0.102), 256: (0.088, 0.161),
                  512: (0.146, 0.278)}  # fmt: skip


SMALL = Window(5, 3)


def small(op: str, length=300, device=CPU, window=SMALL, dtype=torch.float32, width=8, **changes) -> Problem:
    return replace(square_problem(op, device, dtype, (2, 4, 2, length, width), window), **changes)


def contender(name: str) -> Contender:
    return backends([name])[0]


def bench(*arguments: str):
    return CliRunner().invoke(app, ["bench", *arguments], env={"COLUMNS": "80"})


# The floor


@pytest.mark.parametrize(
    ("group", "floors"),
    [
        ("fused-e64", FUSED_FLOORS),
        ("fused-e128", WIDE_FLOORS),
        ("dot-fp32", DOT_FLOORS),
        ("average-fp32", AVERAGE_FLOORS),
        ("gpt-oss", {128: (0.071, 0.142)}),
        ("modernbert", {129: (0.095, 0.189)}),
    ],
)
def test_the_floor_is_that_of_the_published_tables(group, floors):
    for size, expected in floors.items():
        found = [1e3 * floor_seconds(WORKLOADS[f"{group}/w{size}"], way, H200) for way in DIRECTIONS]
        assert found == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("window", [Window(0, 0), Window(3, 0), Window(2, 5), Window(0, 40), Window(99, 99)])
@pytest.mark.parametrize("length", [1, 2, 9, 20])
def test_visible_pairs_are_counted_at_the_borders_too(length, window):
    for keys in (length, 1, length + 7):
        seen = brute_force_visible(length, keys, window.left, window.right)
        assert visible_pairs(length, keys, window) == len(seen)


def test_grouped_heads_read_their_keys_once():
    assert bytes_moved(small(FUSED), "forward") == 4 * 2 * 300 * 8 * (4 + 2 + 2 + 4)
    assert bytes_moved(small(FUSED), "backward") == 4 * 2 * 300 * 8 * 2 * (4 + 2 + 2 + 4)


def test_what_a_call_gives_is_moved_too_and_a_gradient_of_what_has_one():
    given = (
        ("bias", Given((1, 4, 1, 9), torch.float32)),
        ("key_lengths", Given((2,), torch.int64)),
        ("scale", Given()),
    )
    plain, call = small(FUSED), small(FUSED, given=given)
    assert bytes_moved(call, "forward") - bytes_moved(plain, "forward") == 4 * 4 * 9 + 8 * 2
    assert bytes_moved(call, "backward") - bytes_moved(plain, "backward") == 2 * 4 * 4 * 9 + 8 * 2


def test_the_operations_of_values_of_another_width_and_of_fewer_queries():
    wide = small(FUSED, value_dim=24)
    assert flops(wide, "forward") == 2 * flops(small(FUSED), "forward")
    assert flops(wide, "backward") == flops(small(DOT), "backward") + flops(small(AVERAGE), "backward") * 3 + flops(
        small(DOT), "forward"
    )
    assert flops(small(DOT, query_length=1), "forward") == 2 * 8 * 2 * 4 * 6


# The table of workloads


def test_every_workload_is_a_valid_problem_named_by_what_differs_in_its_series():
    for name, workload in WORKLOADS.items():
        assert workload.op in OPS
        assert workload.heads % workload.kv_heads == 0
        assert workload.device.type in ("cpu", "cuda")
        assert name.split("/")[1] in (f"w{workload.window.size}", f"l{workload.key_length}")
    assert set(ON_REQUEST) < set(map(series_of, WORKLOADS))
    for device_type in ("cpu", "cuda"):
        assert {workload.op for workload in select(device_type).values()} == set(OPS)


def test_workloads_are_selected_by_name_group_pattern_and_op():
    assert list(select("cuda", ["gpt-oss", "*-e64/w64"])) == ["fused-e64/w64", "gpt-oss/w128"]
    assert {series_of(name) for name in select("cuda", op=DOT)} == {"dot-fp32", "dot-bf16"}
    assert not any(series_of(name) == "long" for name in select("cuda"))
    assert list(select("cuda", ["long"]).values())[-1].key_length == 2**20
    with pytest.raises(ValueError, match=r"no workload here fits 'gpt-oss'; the groups are cpu-fused"):
        select("cpu", ["gpt-oss"])


# Timing


def test_a_call_is_timed_on_the_cpu():
    timing = measure([lambda: time.sleep(0.002)] * 3, CPU, seconds=0.05)
    assert timing.method == "clock"
    assert timing.calls >= 5
    assert 0.002 <= timing.median < 0.02
    assert timing.spread >= 0
    with pytest.raises(ValueError, match="calls is empty"):
        measure([], CPU)


def test_the_cache_is_cold_when_a_sets_turn_comes():
    assert sets_for_cold_cache(2**40, CPU) == 2
    assert sets_for_cold_cache(1, CPU) == 64
    assert sets_for_cold_cache(2**23, CPU) * 2**23 > 4 * 2**23


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_is_timed_by_graph_replay_and_by_events_where_that_fails():
    with measuring_stream(CUDA):
        tensors = [torch.randn(2**24, device="cuda") for _ in range(4)]
        timing = measure([tensor.exp for tensor in tensors], CUDA)
        assert timing.method == "graph"
        assert 1e-6 < timing.median < 1e-2
        waits = measure([lambda tensor=tensor: tensor.sum().item() for tensor in tensors], CUDA)
        assert waits.method == "events"
        # The capture that failed leaves nothing behind.
        assert measure([tensor.exp for tensor in tensors], CUDA).method == "graph"
        assert torch.randn(3, device="cuda").isfinite().all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("window", [Window(63, 0), Window(20, 20)])
@pytest.mark.parametrize("name", ["triton", "cublas_block", *(peer.name for peer in PEERS)])
def test_everybody_is_right_and_timed_on_a_gpu(name, window, direction):
    changes = {"width": 64, "length": 1000, "dtype": torch.bfloat16, "device": CUDA}
    workload = small(FUSED, window=window, **changes)
    everybody = [*backends(["triton", "cublas_block"]), *PEERS]
    (chosen,) = (each for each in everybody if each.name == name)
    reason = chosen.refuse(replace(workload, needs_grad=direction == "backward"))
    if reason is not None:
        pytest.skip(f"{name}: {reason}")
    (record,) = run({"small": workload}, [chosen], [direction], CUDA, H200)
    assert record.reason is None
    assert record.method == "graph"
    assert 0 < record.fraction < 1


# Checks


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"window": Window(64, 0)},
        {"window": Window(0, 1), "length": 37},
        {"window": Window(500, 400)},
        {"length": 1500, "window": Window(30, 7)},
        {"dtype": torch.bfloat16},
    ],
    ids=str,
)
def test_the_definition_passes_the_check(op, changes):
    stage = set_stage(small(op, **changes))
    for direction in DIRECTIONS:
        verdict = verify(stage, contender("torch"), direction)
        assert verdict.fault is None
        names = {"output"} if direction == "forward" else set(tensor_shapes(stage.problem))
        assert set(verdict.errors) == names


ONE_KEY = {"window": Window(0, 0)}


def altered(change) -> Contender:
    """The definition with ``change(tensor)`` made to its output, and to each gradient."""
    right = contender("torch")

    def prepare(problem, inputs):
        calls = right.prepare(problem, inputs)

        def make_backward():
            backward = calls.make_backward()
            return lambda: tuple(map(change, backward()))

        return Calls(lambda: change(calls.forward()), make_backward)

    return replace(right, name="altered", prepare=prepare)


@pytest.mark.parametrize(
    "right",
    [contender("torch"), contender("torch_block"), altered(lambda tensor: tensor + 1e-7)],
    ids=["torch", "torch_block", "steps_left"],
)
def test_gradients_that_vanish_may_keep_a_few_rounding_steps_of_the_others(right):
    """With one key a row, the weights are 1 whatever query and key are."""
    stage = set_stage(small(FUSED, **ONE_KEY))
    verdict = verify(stage, right, "backward")
    assert verdict.fault is None
    assert verdict.errors["query"] < 1e-6


@pytest.mark.parametrize("left_over", [1e-4, torch.inf])
def test_more_than_that_is_wrong(left_over):
    stage = set_stage(small(FUSED, **ONE_KEY))
    verdict = verify(stage, altered(lambda tensor: tensor + left_over), "backward")
    assert verdict.fault.startswith("query: relative error")


def last_row_lost(tensor):
    tensor = tensor.clone()
    tensor[-1, -1, -1] = 0
    return tensor


def not_a_number(tensor):
    tensor = tensor.clone()
    tensor[0, 1, 150, 0] = torch.nan
    return tensor


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(
    ("op", "change", "fault"),
    [
        (FUSED, lambda tensor: 1.00001 * tensor, "relative error 1.0e-05 exceeds"),
        (FUSED, last_row_lost, "relative error"),
        (AVERAGE, last_row_lost, "relative error"),
        (DOT, not_a_number, "holds NaN"),
        (DOT, lambda tensor: tensor.mT, "has shape"),
        (DOT, lambda tensor: tensor.flip(-1), "relative error"),
    ],
    ids=["scaled", "row_lost", "row_lost_average", "nan", "shape", "flipped"],
)
def test_a_wrong_result_is_not_timed(op, change, fault, direction):
    (record,) = run({"small": small(op)}, [altered(change)], [direction], CPU, H200)
    assert record.seconds is None
    assert record.fraction is None
    assert record.reason.startswith("wrong: ")
    assert fault in record.reason


def test_a_failure_costs_only_itself():
    def fail(problem, inputs):
        raise RuntimeError("no such kernel\nand much more")

    broken = replace(contender("torch"), name="broken", prepare=fail)
    workloads = {"small": small(DOT)}
    records = merge(run(workloads, [broken, contender("torch_block")], DIRECTIONS, CPU, H200, repeat=3))
    assert [record.reason for record in records] == ["RuntimeError: no such kernel and much more"] * 2 + [None] * 2
    for record in records[2:]:
        assert len(record.runs) == 3
        assert record.seconds == sorted(record.runs)[1]
        assert record.fraction == record.floor / record.seconds


def test_what_follows_a_contender_that_spoils_its_device_is_not_run(monkeypatch):
    def fail(problem, inputs):
        raise RuntimeError("CUDA error: illegal access")

    broken = replace(contender("torch"), name="broken", prepare=fail)
    monkeypatch.setattr(running, "why_unusable", lambda device: "CUDA error: illegal access")
    records = [*run({"a": small(DOT), "b": small(DOT)}, [broken, contender("torch_block")], ["forward"], CPU, H200)]
    spoilt = "not run: broken left the device unusable (CUDA error: illegal access)"
    assert [record.reason for record in records] == ["RuntimeError: CUDA error: illegal access", *[spoilt] * 3]


def test_a_device_is_unusable_where_no_tensor_can_be_made_on_it(monkeypatch):
    assert why_unusable("cpu") is why_unusable(CPU) is None
    assert "nowhere" in why_unusable("nowhere")
    monkeypatch.setattr(
        torch, "zeros", lambda *sizes, **options: (_ for _ in ()).throw(RuntimeError("spoilt\nand more"))
    )
    assert why_unusable(CPU) == "spoilt"


# The peers


def test_no_peer_has_the_name_of_a_backend_by_which_results_are_kept_apart():
    assert not {peer.name for peer in PEERS} & {backend.name for backend in backends()}


def test_peers_refuse_with_a_reason_what_they_cannot_run():
    assert {peer.name for peer in PEERS} == {
        *("flash2-torch", "cudnn", "sdpa-dense", "sdpa-blocks", "flex-attention", "seed-design"),
    }
    half, single = WORKLOADS["fused-e64/w64"], small(FUSED, needs_grad=True)
    for peer in PEERS:
        if peer.name == "seed-design":
            assert peer.ops == (DOT, AVERAGE)
            assert "grouped heads" in peer.refuse(small(DOT, heads=4, kv_heads=2))
            continue
        assert peer.ops == (FUSED,)
        if peer.name == "sdpa-dense":
            assert "a dense mask is tried up to" in peer.refuse(half)
            assert peer.refuse(single) is None
        elif peer.name in ("sdpa-blocks", "flex-attention"):
            assert "the device is cuda" in peer.refuse(half)
            assert peer.refuse(replace(single, needs_grad=False, query_length=128, key_length=128)) is None
        else:
            reason = peer.refuse(replace(half, device=CPU))
            assert "the device is cpu" in reason or "not installed" in reason


@pytest.mark.parametrize("window", [Window(5, 3), Window(64, 0), Window(0, 2)])
@pytest.mark.parametrize("name", ["sdpa-dense", "sdpa-blocks"])
def test_what_users_write_with_torchs_attention_is_right(name, window):
    (peer,) = (peer for peer in PEERS if peer.name == name)
    for length in (100, 300):
        stage = set_stage(small(FUSED, window=window, length=length))
        for direction in DIRECTIONS:
            assert verify(stage, peer, direction).fault is None


def test_flex_attention_on_a_cpu_is_right_and_has_no_backward():
    (peer,) = (peer for peer in PEERS if peer.name == "flex-attention")
    problem = small(FUSED, window=Window(5, 3), length=300)
    assert verify(set_stage(problem), peer, "forward").fault is None
    assert "no backward" in peer.refuse(replace(problem, needs_grad=True))


@pytest.mark.parametrize("op", [DOT, AVERAGE])
@pytest.mark.parametrize("window", [Window(5, 3), Window(64, 0), Window(0, 2), Window(0, 0)])
def test_the_seeds_design_is_right(op, window):
    stage = set_stage(small(op, window=window, length=150, kv_heads=4))
    (seed,) = (peer for peer in PEERS if peer.name == "seed-design")
    for direction in DIRECTIONS:
        assert verify(stage, seed, direction).fault is None


# The command


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A run of the command, the file that it wrote and the plot."""
    folder = tmp_path_factory.mktemp("bench")
    path, plot = folder / "new" / "results.json", folder / "plot.png"
    result = bench(
        *("--device", "cpu", "--workload", "cpu-dot/w8", "--workload", "cpu-fused/w*"),
        *("--backend", "torch_block", "--backend", "cublas_block", "--direction", "forward"),
        *("--json", str(path), "--plot", str(plot)),
    )
    return result, path, plot


def test_bench_prints_a_table_and_the_reasons(measured):
    result, path, _ = measured
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    (row,) = (line.split() for line in lines if line.strip().startswith("cpu-fused/w8"))
    (heading,) = (line.split() for line in lines if "sdpa-dense" in line and "floor" in line)
    assert heading == ["workload", "floor", "torch_block", "sdpa-dense", "sdpa-blocks", "flex-attention"]
    assert len(row) == 10
    assert "cublas_block: the device is cpu; it takes cuda" in result.output
    assert f"results: {path}" in result.output


def test_results_survive_the_file(measured, tmp_path):
    _, path, _ = measured
    content = json.loads(path.read_text())
    found = stored.load(path)
    assert list(found.workloads) == [each["name"] for each in content["workloads"]]
    timed = [record for record in found.records if record.seconds is not None]
    assert {record.contender for record in timed} == {
        *("torch_block", "sdpa-dense", "sdpa-blocks", "flex-attention", "seed-design"),
    }
    assert all(record.errors and record.method == "clock" for record in timed)
    assert found.environment.packages["torch"] == torch.__version__
    assert "fp32" in found.ceilings.flops_per_second
    stored.save(found, tmp_path / "again.json")
    assert stored.load(tmp_path / "again.json") == found
    assert (tmp_path / "again.json").read_text() == path.read_text()


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.stem)
def test_earlier_results_are_read(path, tmp_path):
    found = stored.load(path)
    assert {record.workload for record in found.records} <= found.workloads.keys()
    assert all(WORKLOADS[name] == problem for name, problem in found.workloads.items() if name in WORKLOADS)
    stored.save(found, tmp_path / "again.json")
    assert stored.load(tmp_path / "again.json") == found


def test_the_file_says_nothing_of_whose_machine_it_is(measured):
    import getpass
    import platform

    text = measured[1].read_text()
    for private in (platform.node(), str(Path.home()), str(Path(__file__).parents[1])):
        assert f'"{private}' not in text
    assert getpass.getuser() not in json.loads(text)["environment"].values()


def test_a_plot_is_drawn_from_a_run_and_from_its_file(measured, tmp_path):
    _, path, plot = measured
    assert plot.read_bytes().startswith(b"\x89PNG")
    result = bench("--from", str(path), "--workload", "cpu-fused", "--plot", str(tmp_path / "again.svg"))
    assert result.exit_code == 0, result.output
    assert "cpu-dot" not in result.output
    drawn = (tmp_path / "again.svg").read_text()
    assert drawn.startswith("<?xml")
    nothing = stored.narrow(stored.load(path), directions=["backward"])
    with pytest.raises(ValueError, match="nothing to plot"):
        plot_results(nothing, tmp_path / "empty.png")


def test_without_matplotlib_the_plot_is_refused_before_anything_is_measured(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.backend_bases", None)
    result = bench("--device", "cpu", "--plot", str(tmp_path / "plot.png"))
    assert result.exit_code == 1
    assert "pip install 'attnreg[plot]'" in result.output


def test_bench_lists_the_workloads():
    result = bench("--list", "--device", "cpu")
    assert [line.split()[0] for line in result.output.splitlines() if line[0] != " "][2:] == list(select("cpu"))


@pytest.mark.parametrize("columns", [40, 80, 500])
@pytest.mark.parametrize("listed", [True, False], ids=["list", "report"])
def test_what_bench_prints_fits_the_width_and_breaks_no_word(measured, monkeypatch, listed, columns):
    def shown(columns: int) -> str:
        options = ["--list", "--device", "cpu"] if listed else ["--from", str(measured[1])]
        out, result = StringIO(), None
        monkeypatch.setattr(out, "isatty", lambda: True, raising=False)
        monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.setattr(sys, "stdout", out)
        result = app(["bench", *options], standalone_mode=False)
        monkeypatch.undo()
        assert result is None
        return out.getvalue()

    output = shown(columns)
    assert max(map(len, output.splitlines())) <= columns
    known = {word.strip(":,;") for word in shown(1000).split() if word[0].isalpha()}
    assert {word.strip(":,;") for word in output.split() if word[0].isalpha()} == known


def test_the_example_in_the_help_fits_a_workload_on_every_device():
    help_text = " ".join(bench("--help").output.split())
    (pattern,) = re.findall(r"such as '(.*?)' or", help_text)
    for device_type in ("cpu", "cuda"):
        assert select(device_type, [pattern])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--workload", "nothing"), "no workload here fits 'nothing'; the groups are cpu-fused"),
        (("--op", "softmax"), "'softmax' is not one of local_dot_product"),
        (("--backend", "nobody"), "no backend is called 'nobody'; registered: attnreg_cpu, cublas_block"),
        (("--direction", "up"), "'up' is neither forward nor backward"),
        (("--repeat", "0"), "expected an integer of at least 1; got '0'"),
        (("--backend", "torhc"), "no backend is called 'torhc'"),
        (("--plot", "plot.doc"), "the suffix says the format"),
        (("--from", "/nowhere.json"), "--from: /nowhere.json: No such file or directory"),
        (("--from", __file__), "holds no results of attnreg bench"),
    ],
)
def test_a_bad_option_is_told_with_what_was_expected(arguments, message):
    result = bench("--device", "cpu", *arguments)
    assert result.exit_code == 2
    assert arguments[0] in result.output
    assert message in result.output


def test_importing_the_command_imports_no_benchmark():
    script = "import sys, attnreg.cli; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert not {"attnreg_benchmarks", "attnreg.measuring.timing", "matplotlib"} & set(done.stdout.split())
