"""``attnreg tune``, and what it draws, exports and imports."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tabled import CPU, here, problem, run, table_of

from attnreg.measured import Figure
from attnreg.tables import store
from attnreg.tables.call import as_measured
from attnreg.tables.environment import Device
from attnreg.tables.table import Table
from attnreg.tuning import plot as plotting
from attnreg.tuning import writing


def test_the_command_tunes_exports_imports_and_plots(folder, tmp_path):
    sizes = ("--op", "local_dot_product", "--dtype", "float32", "--head-dim", "8", "--length", "64", "--heads", "2,1")
    result = run(*sizes, "--window", "4", "--window", "8", "--seconds", "0.01", "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert "torch_block" in result.output
    exported = tmp_path / "exported.json"
    assert run("--export", str(exported), "--device", "cpu").exit_code == 0
    (path,) = folder.glob("*.json")
    before = store.load(path).rows
    path.unlink()
    assert run("--import", str(exported)).exit_code == 0
    assert store.load(path).rows == before
    assert run("--plot", str(tmp_path / "p.png"), "--device", "cpu").exit_code == 0
    assert (tmp_path / "p.png").stat().st_size > 1000


def test_the_command_tunes_calls_that_give_more_and_draws_them(folder, tmp_path, monkeypatch):
    sizes = ("--op", "local_attention", "--dtype", "float32", "--head-dim", "8", "--length", "64", "--heads", "2,1")
    asked = ("--with", "none", "--with", "sinks,softcap", "--with", "dropout_p,grad_log_sum_exp")
    options = (*sizes, "--window", "4", "--seconds", "0.001", "--backend", "torch", "--device", "cpu")
    result = run(*options, *asked)
    assert result.exit_code == 0, result.output
    assert "H/Hkv=2; softcap; sinks (2,) float32\n" in result.output
    assert (
        "forward and backward; float32 E=8 D=8 Lq=64 Lk=64 N*H=2 H/Hkv=2; dropout_p; seed; grad_log_sum_exp\n"
        in result.output
    )
    (path,) = folder.glob("*.json")
    assert len(store.load(path).rows) == 5
    drawn = {}
    monkeypatch.setattr(plotting, "plot", lambda table, *_: drawn.update(table.rows))
    for given, count in ((("--with", "none"), 2), (("--with", "dropout_p,grad_log_sum_exp"), 1), (asked, 5), ((), 5)):
        drawn.clear()
        assert run("--plot", str(tmp_path / "p.png"), "--device", "cpu", *given).exit_code == 0
        assert len(drawn) == count


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--with", "sink"), "'sink' is not one of bias, key_lengths, "),
        (("--with", "sinks", "--op", "local_dot_product"), "none of local_dot_product has sinks"),
        (("--with", "cu_seqlens_q,key_lengths"), "cu_seqlens_q and key_lengths cannot be given together"),
        (("--with", "cu_seqlens_q", "--batch", "2"), "with cu_seqlens_q, the batch size is 1; got 2"),
        (("--with", "sinks", "--export", "x.json"), "take whole tables"),
    ],
)
def test_calls_that_there_cannot_be_are_named(folder, options, message):
    result = run("--device", "cpu", *options)
    assert result.exit_code == 2
    assert message in result.output


def test_an_imported_table_of_another_device_is_kept_and_said_not_to_count_here(folder, tmp_path):
    table = table_of({"torch": 1.0, "torch_block": 2.0})
    foreign = Table(replace(table.environment, device=Device("cpu", "Another CPU", "AVX9")), table.rows)
    writing.write(foreign, tmp_path / "foreign.json")
    result = run("--import", str(tmp_path / "foreign.json"))
    assert result.exit_code == 0, result.output
    assert "calls on this machine do not go by it: it was measured on Another CPU (AVX9)" in result.output
    assert store.load(folder / foreign.environment.file_name) == foreign


def test_the_plot_marks_what_is_chosen_a_tie_by_rank(folder, tmp_path, monkeypatch):
    marked = {}
    monkeypatch.setattr(plotting, "plot", lambda table, chosen, *_: marked.update(chosen))
    near = {"torch": Figure(seconds=1.0, spread=0.1), "torch_block": Figure(seconds=1.02, spread=0.1)}
    far = {"torch": Figure(seconds=1.0, spread=0.1), "torch_block": Figure(seconds=1.2, spread=0.1)}
    keys = as_measured(problem(4)), as_measured(problem(8))
    writing.save(Table(here(), dict(zip(keys, (near, far)))))
    plotting.plot_table(CPU, tmp_path / "p.png")
    assert marked == dict(zip(keys, ("torch_block", "torch")))


@pytest.mark.parametrize(
    ("asked", "drawn"),
    [
        ({}, {4, 8, 16}),
        ({"windows": [4, 8]}, {4, 8}),
        ({"gradients": [True]}, {16}),
        ({"ops": ["local_attention"], "dtypes": [torch.float32], "head_dims": [8], "lengths": [64]}, {4, 8, 16}),
        ({"heads": [(2, 1)]}, {4, 8}),
        ({"batch": 2, "heads": [(2, 2)]}, {16}),
    ],
)
def test_the_plot_shows_the_calls_that_are_asked_for(folder, tmp_path, monkeypatch, asked, drawn):
    shown = []
    monkeypatch.setattr(plotting, "plot", lambda table, *_: shown.extend(call.window.size for call in table.rows))
    figures = {"torch": Figure(seconds=1.0), "torch_block": Figure(seconds=2.0)}
    problems = (problem(4), problem(8), problem(16, heads=4, kv_heads=4, grad=True))
    writing.save(Table(here(), {as_measured(each): figures for each in problems}))
    plotting.plot_table(CPU, tmp_path / "p.png", **asked)
    assert set(shown) == drawn
    with pytest.raises(ValueError, match="the table has none of these calls"):
        plotting.plot_table(CPU, tmp_path / "p.png", windows=[5])


def test_whole_tables_are_exported_and_imported(folder, tmp_path):
    writing.save(table_of({"torch": 1.0, "torch_block": 2.0}))
    result = run("--export", str(tmp_path / "x.json"), "--device", "cpu", "--window", "4")
    assert result.exit_code == 2
    assert "--export and --import take whole tables" in result.output


def test_the_command_refuses_what_is_no_table(folder, tmp_path):
    (tmp_path / "x.json").write_text("{}")
    result = run("--import", str(tmp_path / "x.json"))
    assert result.exit_code == 2
    assert 'it has no "format"' in result.output
    assert not folder.exists()
    result = run("--export", str(tmp_path / "y.json"), "--device", "cpu")
    assert "there is no table for" in result.output
    assert not (tmp_path / "y.json").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ("--backend", "torhc"),
            "--backend: no backend is called 'torhc' (did you mean 'torch'?); registered: cublas_block, ",
        ),
        (("--heads", "3,2"), "--heads: expected at least one head, and H a multiple of HKV; got '3,2'"),
        (("--heads", "0"), "--heads: expected at least one head, and H a multiple of HKV; got '0'"),
        (("--heads", "two"), "--heads: expected H, 1 integers of at least 0; got 'two'"),
        (("--op", "softmax"), "--op: 'softmax' is not one of local_dot_product"),
        (("--window", "0"), "'--window': expected an integer of at least 1; got '0'"),
        (("--length", "1.5"), "'--length': expected an integer of at least 1; got '1.5'"),
        (("--seconds", "0"), "'--seconds': expected a number of at least 0.001; got '0'"),
        (("--seconds", "nan"), "'--seconds': expected a number of at least 0.001; got 'nan'"),
        (("--import", "/nowhere.json"), "--import: /nowhere.json"),
    ],
)
def test_a_bad_option_is_named_with_what_was_given_and_what_was_expected(folder, options, message):
    result = run("--device", "cpu", *options)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stdout == ""
