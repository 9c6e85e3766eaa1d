"""A script, not a test: what a built wheel must hold, and that it works from an empty folder. ``check_wheel.py WHEEL``."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import attnreg

try:
    import tomllib
except ImportError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
# Every file of these kinds belongs into the wheel, wherever it lies under one of these folders.
SUFFIXES = frozenset((".py", ".json", ".cpp", ".cu", ".cuh", ".h"))
FOLDERS = ("attnreg", "backends", "csrc", "benchmarks/attnreg_benchmarks")
MUST_RUN = """
import importlib.util, torch, attnreg
assert attnreg.__file__.startswith({folder!r}), attnreg.__file__
assert importlib.util.find_spec("backends") is None, "the wheel has a package called backends"
names = [status.name for status in attnreg.backends()]
assert sorted(names) == {backends!r}, names
assert all(status.backend is not None for status in attnreg.backends())
query = torch.randn(1, 4, 256, 64)
assert attnreg.local_attention(query, query, query, attnreg.Window.causal(3)).shape == query.shape
decision = attnreg.explain(query, query, query, attnreg.Window.causal(3))
assert decision.source == "shipped", decision
from attnreg_benchmarks.workloads import select
assert select("cpu")
from attnreg_cublas import build
sources = build.LIBRARY.sources()
assert (sources / "library.cu").is_file() and str(sources).startswith({folder!r}), sources
library = build.LIBRARY.packaged()
assert (library is None) == (build.LIBRARY.find_compiler() is None), (library, build.LIBRARY.find_compiler())
if library is not None:
    build.load(library)
    packed = torch.empty(4, 1, 8)
    torch.ops.attnreg_cublas.pack(torch.ones(1, 1, 4, 8), packed, [], 4, False, 4, 0, 0, True, 0, 1)
    assert (packed == 1).all()
from attnreg_cpu import build
sources = build.LIBRARY.sources()
assert (sources / "library.cpp").is_file() and str(sources).startswith({folder!r}), sources
library = build.LIBRARY.packaged()
assert (library is None) == (build.LIBRARY.find_compiler() is None), (library, build.LIBRARY.find_compiler())
if library is not None:
    build.load(library)
    out = attnreg.local_attention(query, query, query, attnreg.Window.causal(1), backend="attnreg_cpu")
    assert torch.allclose(out, query)
"""


def needed() -> set[str]:
    """Where in the wheel each file of the tree belongs, by pyproject.toml's folders of packages."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    packages = {
        folder: package.replace(".", "/") for package, folder in settings["tool"]["setuptools"]["package-dir"].items()
    }
    found = set()
    for top in FOLDERS:
        for path in (ROOT / top).rglob("*"):
            if not path.is_file() or not (path.suffix in SUFFIXES or path.name == "py.typed"):
                continue
            folders = [str(parent.relative_to(ROOT)) for parent in path.parents if parent.is_relative_to(ROOT)]
            folder = next((folder for folder in folders if folder in packages), None)
            assert folder is not None, f"{path} lies in no folder that pyproject.toml's package-dir names"
            found.add(f"{packages[folder]}/{path.relative_to(ROOT / folder)}")
    return found


def main(wheel: str) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    missing = sorted(needed() - names)
    assert not missing, f"{wheel} lacks {missing}"
    # What is built for this platform has no counterpart in the tree.
    unwanted = sorted(name for name in names - needed() if ".dist-info/" not in name and not name.endswith(".so"))
    assert not unwanted, f"{wheel} holds {unwanted}"
    backends = sorted(status.name for status in attnreg.backends())
    with tempfile.TemporaryDirectory() as folder:
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", f"{folder}/site", wheel]
        subprocess.run(install, check=True)
        code = f"import sys; sys.path.insert(0, {folder + '/site'!r})\n" + MUST_RUN.format(
            folder=folder, backends=backends
        )
        # -I keeps the checkout and its editable install's folder off the path; the installed wheel goes before both.
        environment = {**os.environ, "ATTNREG_CACHE_DIR": folder}
        subprocess.run([sys.executable, "-I", "-c", code], check=True, cwd=folder, env=environment)
    print(f"{wheel}: {len(names)} files, all that is needed and nothing else")


if __name__ == "__main__":
    main(sys.argv[1])
