"""``attnreg new-backend``: the files of a plug-in with one backend, to begin with."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from string import Template
from typing import Annotated

import typer

from attnreg.cli.shared import fail, say, whole
from attnreg.inspection import backends

PYPROJECT = """\
[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"

[project]
name = "$distribution"
version = "0.1.0"
description = "A backend for attnreg"
requires-python = ">=3.10"
dependencies = ["attnreg"]

[project.optional-dependencies]
test = ["pytest>=8"]

# By this attnreg finds the backend.
[project.entry-points.attnreg]
$name = "$module"

[tool.setuptools]
py-modules = ["$module"]
"""

BACKEND = '''\
"""A backend for attnreg, to begin with: both products, key by key. Right, and slow.

attnreg composes attention of the two products, and autograd differentiates them.
Replace the functions by faster ones: the tests say whether they are still right.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from attnreg import Backend, Capability, Window, empty_like, hookimpl
from torch import Tensor


def local_dot_product(
    query: Tensor,
    key: Tensor,
    window: Window,
    *,
    bias: Tensor | None,
    key_lengths: Tensor | None,
    scale: float,
) -> Tensor:
    """Scores (N, H, Lq, W) of query (N, H, Lq, E) and key (N, Hkv, Lk, E).

    A slot without a visible key is -inf.
    """
    keys, visible = slots(key, query.shape[1:3], window, key_lengths)
    if bias is not None:
        visible = visible & (bias != -torch.inf)
    keys = keys.where(visible.unsqueeze(-1), 0.0)
    scores = scale * (accumulated(query).unsqueeze(-2) * keys).sum(-1)
    if bias is not None:
        scores = scores + accumulated(bias)
    scores = scores.where(visible, -torch.inf)
    return empty_like(query, window.size).copy_(scores)  # in memory as the query


def local_weighted_average(
    weights: Tensor, value: Tensor, window: Window, *, key_lengths: Tensor | None
) -> Tensor:
    """Averages (N, H, Lq, D) of value (N, Hkv, Lk, D) by weights (N, H, Lq, W).

    What lies in a slot without a visible key is never used: it may be NaN.
    """
    values, visible = slots(value, weights.shape[1:3], window, key_lengths)
    values = values.where(visible.unsqueeze(-1), 0.0)
    visible_weights = accumulated(weights).where(visible, 0.0)
    output = (visible_weights.unsqueeze(-1) * values).sum(-2)
    return empty_like(weights, value.shape[-1]).copy_(output)


def slots(
    tensor: Tensor, of: torch.Size, window: Window, key_lengths: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Gather each row's keys or values (N, Hkv, Lk, X), and which are visible.

    ``of`` is (H, Lq). The first is (N, H, Lq, W, X), arbitrary where nothing is
    visible; the second broadcasts to (N, H, Lq, W).
    """
    heads, query_length = of
    kv_heads, key_length = tensor.shape[1:3]
    first = key_length - query_length - window.left
    rows = torch.arange(query_length, device=tensor.device).unsqueeze(1)
    keys = first + rows + torch.arange(window.size, device=tensor.device)
    visible = ((keys >= 0) & (keys < key_length))[None, None]
    if key_lengths is not None:
        visible = visible & (keys < key_lengths[:, None, None, None])
    of_heads = accumulated(tensor).repeat_interleave(heads // kv_heads, dim=1)
    return of_heads[:, :, keys.clamp(0, key_length - 1)], visible


def accumulated(tensor: Tensor) -> Tensor:
    """In the dtype of sums: float64 as it is, anything else in float32."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


@hookimpl
def attnreg_backends() -> Iterable[Backend]:
    """Offer the backends of this plug-in."""
    yield Backend(
        name="$name",
        summary="both products, key by key",
        capability=Capability(
            dtypes={torch.float16, torch.bfloat16, torch.float32, torch.float64}
        ),
        local_dot_product=local_dot_product,
        local_weighted_average=local_weighted_average,
        differentiable=True,
        # Where nothing was measured, the lowest is chosen; the slow reference has 100.
        rank=110,
    )
'''

TEST = '''\
"""What the backend says that it can do, it does right; the rest it refuses."""

from __future__ import annotations

from attnreg.testing import conformance_tests

test_conformance = conformance_tests("$name")
'''

README = """\
# $distribution

The backend `$name` for attnreg.

```sh
pip install --editable '.[test]'
attnreg backends                 # lists it
attnreg conform $name --quick    # tries the properties of the contract, in seconds
python -m pytest                 # tries all of them
attnreg tune --backend $name     # measures it
```

Then `attnreg.local_attention(query, key, value, window, backend="$name")` runs on it.
"""


def new_backend(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A new or empty folder.")],
    name: Annotated[
        str | None,
        typer.Option(
            "--name",
            metavar="NAME",
            help="The backend's: lower-case letters and digits, with '-' or '_' between. Default: DIR's, without 'attnreg-'.",
        ),
    ] = None,
) -> None:
    """Write a plug-in with a backend to start from.

    It is a package with one file of PyTorch, and its tests, and runs as it is. Nothing is installed, and no file is replaced.
    """
    chosen = re.sub(r"^attnreg[-_]", "", folder.resolve().name) if name is None else name
    if not re.fullmatch(r"[a-z][a-z0-9]*([-_][a-z0-9]+)*", chosen):
        raise typer.BadParameter(
            f"a backend's name here is of lower-case letters and digits, with '-' or '_' between; got {chosen!r}",
            param_hint="--name",
        )
    module = f"attnreg_{chosen.replace('-', '_')}"
    taken = next((each for each in backends() if each.name == chosen), None)
    if taken is not None:
        raise typer.BadParameter(f"the name {chosen!r} is taken by {taken.distribution}", param_hint="--name")
    if importlib.util.find_spec(module) is not None:
        raise typer.BadParameter(f"there is a module {module!r} already", param_hint="--name")
    names = {"name": chosen, "module": module, "distribution": f"attnreg-{chosen.replace('_', '-')}"}
    files = {
        "pyproject.toml": PYPROJECT,
        f"{module}.py": BACKEND,
        f"tests/test_{module}.py": TEST,
        "README.md": README,
    }
    try:
        if folder.exists() and any(folder.iterdir()):
            raise typer.BadParameter(f"{folder} is not empty", param_hint="DIR")
        for path, text in files.items():
            file = folder / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(Template(text).substitute(names), encoding="utf-8")
            say(whole(str(file)))
    except OSError as error:
        fail(f"{error.filename or folder} cannot be written: {error.strerror or error}")
    say(f"\nnext: cd {whole(str(folder))}; pip install --editable '.[test]'; python -m pytest")
