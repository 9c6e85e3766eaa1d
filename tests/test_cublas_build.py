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
