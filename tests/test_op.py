"""An op is a row of data: an argument that is added to a row is checked, filtered, traced and differentiated."""

from __future__ import annotations

import inspect
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import torch

import attnreg
from attnreg.op import ROWS

# What an argument takes, file by file: all places of one are listed here, with how often each is there.
ADDED = {
    "op.py": [
        (1, 'SINKS = Argument("sinks", dims="H", differentiable=True)\n', 'GAINS = Argument("gains", dims="H", differentiable=True)\nLIMIT = Argument("limit", admits=("at least 1", lambda number: number >= 1))\n'),
        (1, 'arguments=(BIAS, *ROWS_OF_CALL, SCALE, SOFTCAP, SINKS, *DROPOUT', ', LIMIT, GAINS'),
    ],
    "functional.py": [
        (2, "    seed: Tensor | None = None,\n", "    limit: float | None = None,\n    gains: Tensor | None = None,\n"),
        (2, "arguments = (bias, *rows, scale, softcap, sinks, dropout_p, seed", ", limit, gains"),
    ],
}  # fmt: skip

CHECKS = """
import torch, attnreg
from attnreg import Backend, BackendError, Capability, Window, local_attention

def attention(query, key, value, window, *, scale, gains, limit):
    scores = scale * query @ key.mT
    if limit is not None:
        scores = scores.clamp(-limit, limit)
    if gains is not None:
        scores = scores * gains[:, None, None]
    return scores.softmax(-1) @ value, scores.logsumexp(-1)

mine = Backend(name="mine", capability=Capability(dtypes={torch.float32}), local_attention=attention,
               differentiable=True)
query, key, value = torch.randn(3, 1, 2, 5, 4)
wide, gains = Window(9, 9), torch.randn(2, requires_grad=True)

def refused(kind, message, **given):
    try:
        local_attention(query, key, value, wide, **given)
    except kind as error:
        assert message in str(error), error
    else:
        raise AssertionError(message)

with attnreg.register(mine):
    assert mine.taken["local_attention"] == {"gains", "limit"}
    plain = local_attention(query, key, value, wide, backend="mine")
    assert torch.allclose(plain, local_attention(query, key, value, wide, backend="torch"), atol=1e-6)
    expected, _ = attention(query, key, value, wide, scale=0.5, gains=gains, limit=2.0)
    true = torch.autograd.grad(expected.square().sum(), gains)[0]

    def run(gains):
        return local_attention(query, key, value, wide, limit=2.0, gains=gains, backend="mine")

    for function in (run, torch.compile(run, backend="aot_eager", fullgraph=True)):
        output = function(gains)
        assert torch.allclose(output, expected)
        assert torch.allclose(torch.autograd.grad(output.square().sum(), gains)[0], true)
    # Without being asked for, what takes it is chosen, and the others say why they are not.
    decision = attnreg.explain(query, key, value, wide, gains=gains)
    assert decision.backend == "mine" and "gains is given; it takes bias," in str(decision)
    refused(TypeError, "gains must be a torch.Tensor or None, got float", gains=1.0)
    refused(ValueError, "gains must have shape (H,) = (2,), got (3,)", gains=torch.randn(3))
    refused(TypeError, "limit must be a float, got True", limit=True)
    refused(ValueError, "limit must be at least 1, got 0.5", limit=0.5)
    refused(BackendError, "limit is given; it takes bias,", limit=2.0, backend="torch")
refused(BackendError, "gains is given", gains=gains)
"""


def test_an_argument_added_to_a_row_works_everywhere(tmp_path):
    package = tmp_path / "attnreg"
    shutil.copytree(Path(attnreg.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    for name, edits in ADDED.items():
        source = (package / name).read_text()
        for count, known, added in edits:
            assert source.count(known) == count, (name, known)
            source = source.replace(known, known + added)
        (package / name).write_text(source)
    (tmp_path / "checks.py").write_text(textwrap.dedent(CHECKS))
    folders = [str(tmp_path), *(path for path in sys.path if path)]
    done = subprocess.run(
        [sys.executable, str(tmp_path / "checks.py")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(folders), "ATTNREG_CACHE_DIR": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_each_row_agrees_with_its_function_and_its_schema():
    for name, op in ROWS.items():
        keywords = [argument.name for argument in op.arguments]
        parameters = list(inspect.signature(getattr(attnreg, name)).parameters)
        assert parameters == [*op.tensors, "window", *keywords, "backend"]
        schema = getattr(torch.ops.attnreg, name).default._schema
        assert [argument.name for argument in schema.arguments] == [
            *op.tensors, *keywords, "left", "right", "backend", "needs_grad", "all_results",
        ]  # fmt: skip
        for argument, row in zip(schema.arguments[len(op.tensors) :], op.arguments):
            assert str(argument.type) == ("Optional[Tensor]" if row.dims is not None else "Optional[float]")


def test_a_backward_gets_an_incoming_gradient_for_each_result():
    for name, op in ROWS.items():
        schema = getattr(torch.ops.attnreg, op.backward).default._schema
        _, *others = op.results
        names = [argument.name for argument in schema.arguments]
        assert names[: len(op.results)] == [f"grad_{each}" for each in op.results], name
        types = [str(argument.type) for argument in schema.arguments[: len(op.results)]]
        assert types == ["Tensor", *["Optional[Tensor]"] * len(others)]
        assert [row.name for row in op.incoming] == [f"grad_{each}" for each in others]


def test_the_function_of_all_results_takes_what_the_op_takes():
    parameters = [
        list(inspect.signature(each).parameters) for each in (attnreg.local_attention, attnreg.local_attention_with_lse)
    ]
    assert parameters[0] == parameters[1]
