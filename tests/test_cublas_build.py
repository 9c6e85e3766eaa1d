"""Building cublas_block: a compiler that fails is quoted in the refusal."""

from __future__ import annotations

import pytest
from attnreg_cublas import build


def test_a_failed_build_quotes_the_compilers_last_lines_and_leaves_nothing_to_load(tmp_path, monkeypatch):
    compiler = tmp_path / "nvcc"
    compiler.write_text(
        "#!/bin/sh\n"
        'if [ "$1" = --version ]; then echo "release 13.0, V13.0.0"; exit 0; fi\n'
        'for i in $(seq 1 30); do echo "line $i of the log"; done\n'
        'echo "library.cu(1): error: broken" >&2\n'
        "exit 2\n"
    )
    compiler.chmod(0o755)
    monkeypatch.setattr(build, "find_nvcc", lambda: str(compiler))
    with pytest.raises(build.BuildError) as refusal:
        build.build(["90"], tmp_path / "cache")
    shown = str(refusal.value).splitlines()
    assert shown[-1] == "library.cu(1): error: broken"
    assert shown[1:-1] == [f"line {i} of the log" for i in range(12, 31)]
    assert not list((tmp_path / "cache").rglob("*.so"))


def test_the_build_that_a_wheel_carries_is_found_where_there_is_no_other(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "PACKAGED", tmp_path / "wheel")
    monkeypatch.setenv("ATTNREG_CACHE_DIR", str(tmp_path / "cache"))
    assert build._cached(["90"], None) is None
    carried = build._library(build.PORTABLE_ARCHS, None, build.PACKAGED)
    carried = carried.with_name(carried.name.replace("*", "13.0.0"))
    carried.parent.mkdir(parents=True)
    carried.touch()
    assert build._cached(["90"], None) == carried
    own = build._library(["90"], None, build.cache_dir())
    own = own.with_name(own.name.replace("*", "13.0.0"))
    own.parent.mkdir(parents=True)
    own.touch()
    assert build._cached(["90"], None) == own
