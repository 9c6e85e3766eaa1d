"""Building a backend's library: where builds are found, and a compiler that fails is quoted in the refusal."""

from __future__ import annotations

import dataclasses

import pytest
from attnreg_cublas import build

from attnreg import extension

TARGET = build.target(["90"])


@pytest.fixture
def compiler(tmp_path):
    """Writes an nvcc that says its version and otherwise runs some shell commands."""

    def write(commands):
        path = tmp_path / "nvcc"
        path.write_text(
            '#!/bin/sh\nif [ "$1" = --version ]; then echo "release 13.0, V13.0.0"; exit 0; fi\n' + commands
        )
        path.chmod(0o755)
        return dataclasses.replace(build.LIBRARY, find_compiler=lambda: str(path))

    return write


def test_a_failed_build_quotes_the_compilers_last_lines_and_leaves_nothing_to_load(tmp_path, compiler):
    library = compiler(
        'for i in $(seq 1 30); do echo "line $i of the log"; done\necho "library.cu(1): error: broken" >&2\nexit 2\n'
    )
    with pytest.raises(extension.BuildError) as refusal:
        library.build(TARGET, tmp_path / "cache")
    shown = str(refusal.value).splitlines()
    assert shown[-1] == "library.cu(1): error: broken"
    assert shown[1:-1] == [f"line {i} of the log" for i in range(12, 31)]
    assert not list((tmp_path / "cache").rglob("*.so"))


def test_a_build_is_made_once_for_each_target_and_found_again(tmp_path, compiler, monkeypatch, capsys):
    monkeypatch.setenv("ATTNREG_CACHE_DIR", str(tmp_path / "cache"))
    log = tmp_path / "log"
    library = compiler(f'echo "$@" >> {log}\nfor last; do :; done\ntouch "$last"\n')
    assert library.find((TARGET,)) is None
    built = library.build(TARGET)
    assert library.build(TARGET) == library.find((TARGET,)) == built
    assert built.is_relative_to(tmp_path / "cache" / "cublas_block")
    (command,) = log.read_text().splitlines()
    assert "-gencode=arch=compute_90,code=sm_90" in command
    assert str(library.sources() / "library.cu") in command
    assert "building cublas_block for sm_90" in capsys.readouterr().err
    assert library.build(build.target(build.PORTABLE_ARCHS)) != built
    assert len(log.read_text().splitlines()) == 2
    other = dataclasses.replace(library, flags=(*library.flags, "-lineinfo"))
    assert other.find((TARGET,)) is None


def test_the_build_that_a_wheel_carries_is_found_where_there_is_no_other(tmp_path, compiler, monkeypatch):
    monkeypatch.setenv("ATTNREG_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "wheel" / "csrc").mkdir(parents=True)
    (tmp_path / "wheel" / "csrc" / "library.cu").touch()
    here = dataclasses.replace(compiler('for last; do :; done\ntouch "$last"\n'), package=tmp_path / "wheel")
    there = dataclasses.replace(here, find_compiler=lambda: None)
    assert there.sources() == tmp_path / "wheel" / "csrc"
    assert there.find((TARGET,)) is None
    assert there.unavailable() == f"{there.no_compiler}, and there is no build in {tmp_path / 'cache'}"
    carried = here.build(build.target(build.PORTABLE_ARCHS), tmp_path / "wheel" / "lib")
    assert there.find((TARGET,)) == there.packaged() == carried
    assert there.unavailable() is None
    own = here.build(TARGET)
    assert there.find((TARGET,)) == here.find((TARGET,)) == own


def test_the_backend_says_what_is_missing(monkeypatch, tmp_path):
    monkeypatch.setenv("ATTNREG_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(build, "_loaded", None)
    monkeypatch.setattr(build, "LIBRARY", dataclasses.replace(build.LIBRARY, find_compiler=lambda: None))
    assert build.unavailable() is not None
    assert build.prepare() == build.unavailable()


def test_a_file_that_is_no_library_is_refused_in_words(tmp_path):
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"no library")
    with pytest.raises(extension.BuildError, match=r"broken\.so could not be loaded: .*file too short"):
        extension.load(broken)


def test_the_version_of_a_compiler_is_what_it_says(tmp_path):
    tool = tmp_path / "g++"
    for said, version in {
        "g++ (Debian 12.2.0-14) 12.2.0": "12.2.0",
        "Cuda compilation tools, release 13.0, V13.0.48": "13.0.48",
    }.items():
        tool.write_text(f"#!/bin/sh\necho '{said}'\n")
        tool.chmod(0o755)
        extension._version.cache_clear()
        assert extension._version(str(tool)) == version
    tool.write_text("#!/bin/sh\necho nothing\n")
    extension._version.cache_clear()
    with pytest.raises(extension.BuildError, match="names no version"):
        extension._version(str(tool))
    tool.write_text("#!/bin/sh\necho 'no such thing' >&2; exit 3\n")
    extension._version.cache_clear()
    with pytest.raises(extension.BuildError, match="with exit status 3, names no version of a compiler: no such thing"):
        extension._version(str(tool))
