"""An op is a row of data: an argument that is added to a row is checked, filtered, traced and differentiated."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import attnreg
from attnreg.op import ROWS

# What an argument takes, file by file: all places of one are listed here.
ADDED = {
    "op.py": [
        ('SCALE = Argument("scale", for_all=True, default=_softmax_scale)', 'SINKS = Argument("sinks", dims="H", differentiable=True)\nSOFTCAP = Argument("softcap")'),
        ('arguments=(BIAS, KEY_LENGTHS, SCALE),\n    keeps_results=True', 'arguments=(BIAS, KEY_LENGTHS, SCALE, SOFTCAP, SINKS),\n    keeps_results=True'),
    ],
    "functional.py": [
        ("    scale: float | None = None,\n", "    softcap: float | None = None,\n    sinks: Tensor | None = None,\n"),
        ("(ATTENTION, (query, key, value), window, (bias, key_lengths, scale), backend)", "(ATTENTION, (query, key, value), window, (bias, key_lengths, scale, softcap, sinks), backend)"),
    ],
}  # fmt: skip

CHECKS = """
import torch, attnreg
from attnreg import Backend, BackendError, Capability, Window, local_attention

def attention(query, key, value, window, *, scale, sinks, softcap):
    scores = scale * query @ key.mT
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if sinks is not None:
        scores = torch.cat([scores, sinks[:, None, None].expand(*scores.shape[:3], 1)], -1)
    weights = scores.softmax(-1)[..., : key.shape[2]]
    return weights @ value, scores.logsumexp(-1)

mine = Backend(name="mine", capability=Capability(dtypes={torch.float32}), local_attention=attention,
               differentiable=True)
query, key, value = torch.randn(3, 1, 2, 5, 4)
wide, sinks = Window(9, 9), torch.randn(2, requires_grad=True)

def refused(kind, message, **given):
    try:
        local_attention(query, key, value, wide, **given)
    except kind as error:
        assert message in str(error), error
    else:
        raise AssertionError(message)

with attnreg.register(mine):
    assert mine.taken["local_attention"] == {"sinks", "softcap"}
    plain = local_attention(query, key, value, wide, backend="mine")
    assert torch.allclose(plain, local_attention(query, key, value, wide, backend="torch"), atol=1e-6)
    expected, _ = attention(query, key, value, wide, scale=0.5, sinks=sinks, softcap=2.0)
    true = torch.autograd.grad(expected.square().sum(), sinks)[0]

    def run(sinks):
        return local_attention(query, key, value, wide, softcap=2.0, sinks=sinks, backend="mine")

    for function in (run, torch.compile(run, backend="aot_eager", fullgraph=True)):
        output = function(sinks)
        assert torch.allclose(output, expected)
        assert torch.allclose(torch.autograd.grad(output.square().sum(), sinks)[0], true)
    # Without being asked for, what takes it is chosen, and the others say why they are not.
    decision = attnreg.explain(query, key, value, wide, sinks=sinks)
    assert decision.backend == "mine" and "sinks is given; it takes bias, key_lengths" in str(decision)
    refused(TypeError, "sinks must be a torch.Tensor or None, got float", sinks=1.0)
    refused(ValueError, "sinks must have shape (H,) = (2,), got (3,)", sinks=torch.randn(3))
    refused(TypeError, "softcap must be a float, got True", softcap=True)
    refused(BackendError, "softcap is given; it takes bias, key_lengths", softcap=2.0, backend="torch")
refused(BackendError, "sinks is given", sinks=sinks)
"""


def test_an_argument_added_to_a_row_works_everywhere(tmp_path):
    package = tmp_path / "attnreg"
    shutil.copytree(Path(attnreg.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    for name, edits in ADDED.items():
        source = (package / name).read_text()
        for known, added in edits:
            assert source.count(known) == 1, (name, known)
            source = source.replace(known, added if "(BIAS" in known or "(ATTENTION" in known else f"{known}\n{added}")
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
    import inspect

    import torch

    for name, op in ROWS.items():
        keywords = [argument.name for argument in op.arguments]
        parameters = list(inspect.signature(getattr(attnreg, name)).parameters)
        assert parameters == [*op.tensors, "window", *keywords, "backend"]
        schema = getattr(torch.ops.attnreg, name).default._schema
        assert [argument.name for argument in schema.arguments] == [
            *op.tensors, *keywords, "left", "right", "backend", "needs_grad",
        ]  # fmt: skip
        for argument, row in zip(schema.arguments[len(op.tensors) :], op.arguments):
            assert str(argument.type) == ("Optional[Tensor]" if row.dims is not None else "Optional[float]")
