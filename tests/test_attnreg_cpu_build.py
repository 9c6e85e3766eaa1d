"""The library of ``attnreg_cpu``: how it is built and found, what is said where it cannot be, and which kernels of it run."""

from __future__ import annotations

import dataclasses
import math
import os
import subprocess
import sys

import pytest
import torch
from attnreg_cpu import __main__, build

import attnreg
from attnreg import Window, extension


@pytest.fixture
def no_compiler(monkeypatch, tmp_path):
    """A machine without a compiler and without a build."""
    monkeypatch.setenv("ATTNREG_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(build, "_loaded", None)
    monkeypatch.setattr(
        build, "LIBRARY", dataclasses.replace(build.LIBRARY, package=tmp_path, find_compiler=lambda: None)
    )
    attnreg.reset()
    yield tmp_path / "cache"
    attnreg.reset()


def test_without_a_compiler_or_a_build_the_backend_says_so(no_compiler):
    reason = f"{extension.NO_CXX}, and there is no build in {no_compiler}"
    assert build.unavailable() == build.prepare() == reason
    query = torch.randn(1, 1, 8, 4)
    with pytest.raises(attnreg.BackendError, match="no C\\+\\+ compiler found"):
        attnreg.local_attention(query, query, query, Window.causal(2), backend="attnreg_cpu")
    # Any other call goes on, by another backend.
    assert attnreg.explain(query, query, query, Window.causal(2)).backend != "attnreg_cpu"
    assert attnreg.local_attention(query, query, query, Window.causal(2)).shape == query.shape


def test_a_compiler_that_fails_is_quoted_in_the_refusal(no_compiler, tmp_path, monkeypatch):
    compiler = tmp_path / "g++"
    compiler.write_text('#!/bin/sh\n[ "$1" = --version ] && echo 1.2.3 || { echo "error: no such thing"; exit 1; }\n')
    compiler.chmod(0o755)
    monkeypatch.setattr(
        build,
        "LIBRARY",
        dataclasses.replace(build.LIBRARY, find_compiler=lambda: str(compiler)),
    )
    query = torch.randn(1, 1, 8, 4)
    # Where nobody asked for the backend, another one runs, and a warning says why.
    with pytest.warns(
        RuntimeWarning, match=r"attnreg_cpu would have been chosen, and cannot be prepared: (.|\n)*no such thing"
    ):
        assert attnreg.local_attention(query, query, query, Window.causal(2)).shape == query.shape
    assert any(
        "error: no such thing" in str(each)
        for each in attnreg.explain(query, query, query, Window.causal(2)).candidates
    )
    with pytest.raises(attnreg.BackendError, match="error: no such thing"):
        attnreg.local_attention(query, query, query, Window.causal(2), backend="attnreg_cpu")


def test_the_command_builds_where_it_is_told_to_and_says_why_not(no_compiler, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(__main__, "LIBRARY", build.LIBRARY)
    monkeypatch.setattr(sys, "argv", ["attnreg_cpu", "--output", str(tmp_path / "out")])
    assert __main__.main() == 1
    assert capsys.readouterr().err.strip() == extension.NO_CXX
    compiler = tmp_path / "g++"
    compiler.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && echo 1.2.3\nwhile [ $# -gt 0 ]; do [ "$1" = -o ] && touch "$2"; shift; done\n'
    )
    compiler.chmod(0o755)
    made = dataclasses.replace(build.LIBRARY, find_compiler=lambda: str(compiler))
    monkeypatch.setattr(__main__, "LIBRARY", made)
    assert __main__.main() == 0
    said = capsys.readouterr()
    assert said.out.strip() == str(next((tmp_path / "out").rglob("*.so")))
    assert f"building attnreg_cpu for {build.TARGET.title} with {compiler}" in said.err
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(sys, "argv", ["attnreg_cpu", "--output", str(tmp_path / "file" / "out")])
    assert __main__.main() == 1
    assert str(tmp_path / "file") in capsys.readouterr().err


def test_the_best_instruction_set_runs_unless_another_one_is_chosen(library_for_cpus):
    names = build.isas()
    assert names[-1] == "baseline"
    assert build.choose_isa("") == names[0]
    for name in names:
        assert build.choose_isa(name) == name
    with pytest.raises(
        extension.BuildError, match=r"ATTNREG_CPU_ISA='sse9': it must be one of .*baseline on this machine"
    ):
        build.choose_isa("sse9")


def test_the_environment_chooses_the_instruction_set(library_for_cpus):
    script = (
        "import torch, attnreg; torch.manual_seed(0); query = torch.randn(1, 2, 64, 32)\n"
        "out = attnreg.local_attention(query, query, query, attnreg.Window.causal(9), backend='attnreg_cpu')\n"
        "print(out.double().sum().item().hex(), out.double().square().sum().item().hex())"
    )

    def run(isa):
        environment = {**os.environ, "ATTNREG_CPU_ISA": isa}
        return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)

    torch.manual_seed(0)
    query = torch.randn(1, 2, 64, 32)
    for isa in {build.isas()[0], "baseline"}:
        build.choose_isa(isa)
        out = attnreg.local_attention(query, query, query, Window.causal(9), backend="attnreg_cpu").double()
        assert run(isa).stdout.split() == [out.sum().item().hex(), out.square().sum().item().hex()]
    assert "ATTNREG_CPU_ISA='sse9': it must be one of" in run("sse9").stderr


def test_an_op_refuses_tensors_that_do_not_fit_before_it_touches_memory(library_for_cpus):
    ops = build.ops()
    query, rows = torch.randn(1, 2, 8, 4), (None,) * 5
    for key, scores in (
        (torch.randn(1, 2, 8, 5), torch.empty(1, 2, 8, 3)),
        (torch.randn(1, 3, 8, 4), torch.empty(1, 2, 8, 3)),
        (torch.randn(2, 2, 8, 4), torch.empty(1, 2, 8, 3)),
        (torch.randn(1, 2, 8, 4, dtype=torch.float64), torch.empty(1, 2, 8, 3)),
        (torch.randn(1, 2, 4, 8).mT, torch.empty(1, 2, 8, 3)),
        (torch.randn(1, 2, 8, 4), torch.empty(1, 2, 8, 4)),
        (torch.randn(1, 2, 8, 4), torch.empty(1, 2, 7, 3)),
    ):
        with pytest.raises(RuntimeError, match="that do not fit"):
            ops.dot_product(query, key, scores, None, *rows, 2, 0, 1.0)
    lengths = torch.tensor([8, 8])
    with pytest.raises(RuntimeError, match="integers that do not fit"):
        ops.dot_product(query, query, torch.empty(1, 2, 8, 3), None, lengths, *rows[1:], 2, 0, 1.0)
    with pytest.raises(RuntimeError, match="tensors that do not fit"):
        ops.dot_product(query[..., :0], query[..., :0], torch.empty(1, 2, 8, 3), None, *rows, 2, 0, 1.0)
    with pytest.raises(RuntimeError, match="window that does not fit"):
        ops.dot_product(query, query, torch.empty(1, 2, 8, 0), None, *rows, -1, 0, 1.0)
    with pytest.raises(RuntimeError, match="without sequences"):
        ops.dot_product(query[:0], query[:0], torch.empty(0, 2, 8, 3), None, *rows, 2, 0, 1.0)


def test_a_row_may_see_more_keys_than_an_int32_can_count(library_for_cpus):
    # Keys that all lie in the same place: no memory holds them.
    length = 2**31 + 100
    key, value = torch.zeros(1, 1, 1, 1).expand(1, 1, length, 1), torch.ones(1, 1, 1, 1).expand(1, 1, length, 1)
    query = torch.zeros(1, 1, 1, 1)
    output, log_sum_exp = attnreg.local_attention_with_lse(query, key, value, Window(2**32, 0), backend="attnreg_cpu")
    assert output.item() == pytest.approx(1.0)
    # A sum of so many terms in fp32 is off by a share of it; a key that is not counted at all would make it -inf.
    assert log_sum_exp.item() == pytest.approx(math.log(length), rel=0.01)


def test_a_single_query_over_many_keys_goes_to_torch_by_itself(library_for_cpus):
    def chosen(queries, keys, window, **given):
        query, key = torch.randn(1, 2, queries, 16), torch.randn(1, 1, keys, 16)
        return attnreg.explain(query, key, key, window, **given).backend

    assert chosen(1, 2048, Window.causal(1024)) == "torch_block"
    for call in ((2, 2048, Window.causal(1024)), (1, 300, Window.causal(1024)), (1, 2048, Window.causal(64))):
        assert chosen(*call) == "attnreg_cpu"
    assert chosen(1, 2048, Window.causal(1024), key_lengths=torch.tensor([2000])) == "attnreg_cpu"


def test_a_row_without_keys_has_zeros_beside_rows_that_see_nan(library_for_cpus):
    """The rows of a tile share its keys."""
    for spoilt in ("key", "value"):
        tensors = {name: torch.randn(1, 2, 40, 16) for name in ("query", "key", "value")}
        tensors[spoilt][:, :, 30] = math.nan
        tensors = {name: each.requires_grad_() for name, each in tensors.items()}
        output = attnreg.local_attention(
            **tensors, window=Window(7, 4), cu_seqlens_q=torch.tensor([0, 35]), backend="attnreg_cpu"
        )
        output.backward(torch.ones_like(output))
        assert output[:, :, 30].isnan().all()
        assert not output[:, :, 35:].any()
        assert not tensors["query"].grad[:, :, 35:].any()
