"""Libraries of several files: each is compiled on its own, at the same time as the others, with its own flags, and then linked."""

from __future__ import annotations

import dataclasses
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from attnreg_cpu import build

import attnreg
from attnreg import extension
from attnreg.extension import BuildError, Unit

# Writes what it was called with into a log, makes what -o names, and answers --version.
COMPILER = """#!/bin/sh
case "$*" in *--version) echo "g++ (made up) 12.3.4"; exit 0;; esac
echo "$@" >> {folder}/log
{commands}
while [ $# -gt 0 ]; do if [ "$1" = -o ]; then touch "$2"; fi; shift; done
"""


@pytest.fixture
def library(tmp_path, monkeypatch):
    """The library of the CPU, to be built by a compiler that also runs some shell commands."""
    monkeypatch.setenv("ATTNREG_CACHE_DIR", str(tmp_path / "cache"))

    def of(commands="", units=None):
        path = tmp_path / "g++"
        path.write_text(COMPILER.format(folder=tmp_path, commands=commands))
        path.chmod(0o755)
        units = build.LIBRARY.units if units is None else units
        # Beside its own package there may be a build.
        return dataclasses.replace(build.LIBRARY, package=tmp_path, units=units, find_compiler=lambda: str(path))

    return of


def calls(tmp_path):
    return (tmp_path / "log").read_text().splitlines()


def test_every_unit_is_compiled_with_its_flags_and_all_are_linked(library, tmp_path):
    units = (Unit("isa_avx2.cpp", ("-mavx2", "-mfma")), Unit("isa_baseline.cpp"), Unit("library.cpp"))
    built = library(units=units).build(build.TARGET)
    *compiled, linked = calls(tmp_path)
    assert len(compiled) == 3
    for unit in units:
        (command,) = (each for each in compiled if f"/{unit.file} " in each)
        assert " -c " in command
        assert ("-mavx2 -mfma" in command) == bool(unit.flags)
        assert f"{unit.file}.o" in linked
    assert " -c " not in linked
    assert "-mavx2" not in linked
    assert "-ltorch" in linked
    assert [path.name for path in built.parent.iterdir() if not path.name.endswith(".lock")] == [built.name]


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two processors")
def test_units_are_compiled_at_the_same_time(library, tmp_path):
    wait = f'case "$*" in *" -c "*) n=0; until [ "$(wc -l < {tmp_path}/log)" -ge 2 ]; do sleep 0.1; n=$((n+1)); [ $n -lt 100 ] || exit 9; done;; esac'
    library(wait, (Unit("isa_baseline.cpp"), Unit("library.cpp"))).build(build.TARGET)


def test_the_unit_that_fails_is_quoted_and_leaves_nothing_to_load(library, tmp_path):
    fail = 'case "$*" in *"/library.cpp "*) echo "library.cpp:1: error: broken"; exit 1;; esac'
    broken = library(fail)
    with pytest.raises(BuildError) as refusal:
        broken.build(build.TARGET)
    shown = str(refusal.value).splitlines()
    assert shown[0].startswith("building attnreg_cpu failed: ")
    assert shown[-1] == "library.cpp:1: error: broken"
    assert not list((tmp_path / "cache").rglob("*.so"))
    assert broken.find((build.TARGET,)) is None


def test_a_compiler_that_makes_no_file_is_named_as_such(library, tmp_path):
    idle = tmp_path / "idle"
    idle.write_text("#!/bin/sh\necho g++ 12.3.4\n")
    idle.chmod(0o755)
    made = dataclasses.replace(library(), find_compiler=lambda: str(idle))
    with pytest.raises(
        BuildError, match=r"building attnreg_cpu failed: .*idle ended without an error and made no file"
    ):
        made.build(build.TARGET)
    assert not list((tmp_path / "cache").rglob("*.so"))


@pytest.mark.parametrize("package", ["attnreg_cpu", "attnreg_cublas"])
def test_nothing_is_built_into_a_folder_without_a_name(package, tmp_path):
    command = [sys.executable, "-m", package, "--output", ""]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert "argument --output: invalid folder value: ''" in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_folder_is_named_whole(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert extension.folder("out") == tmp_path / "out"


def test_a_build_with_other_flags_of_a_unit_is_another_one(library):
    one = library(units=(Unit("isa_baseline.cpp"), Unit("library.cpp")))
    built = one.build(build.TARGET)
    assert one.find((build.TARGET,)) == built
    for units in (
        (Unit("isa_baseline.cpp", ("-mavx",)), Unit("library.cpp")),
        (Unit("isa_baseline.cpp"), Unit("library.cpp", ("-mavx",))),
        (Unit("library.cpp"),),
    ):
        assert dataclasses.replace(one, units=units).find((build.TARGET,)) is None


@pytest.mark.parametrize(("find", "variable"), [(extension.find_cxx, "CXX"), (extension.find_nvcc, "CUDACXX")])
def test_a_compiler_is_named_by_a_program_or_by_a_command_with_arguments(find, variable, tmp_path, monkeypatch):
    folder = tmp_path / "my tools"
    folder.mkdir()
    program = folder / "cc 1"
    program.write_text(COMPILER.format(folder=tmp_path, commands=""))
    program.chmod(0o755)
    quoted = shlex.quote(str(program))
    for given, found in {
        str(program): quoted,
        f"{quoted} -m64 '-D A'": f"{quoted} -m64 '-D A'",
        str(folder / "none"): None,
        f"{folder / 'none'} g++": None,
        "'no end": None,
        " ": None,
    }.items():
        monkeypatch.setenv(variable, given)
        attnreg.reset()
        assert find() == found, given
    attnreg.reset()


def test_what_a_command_with_arguments_builds_is_named_after_all_of_it(library, tmp_path, monkeypatch):
    made = library()
    wrapper = tmp_path / "ccache"
    wrapper.write_text('#!/bin/sh\nexec "$@"\n')
    wrapper.chmod(0o755)
    wrapped = dataclasses.replace(made, find_compiler=lambda: f"{wrapper} {made.find_compiler()} -m64")
    built = wrapped.build(build.TARGET)
    assert built.name == f"ccache-g++--m64-12.3.4-{build.TARGET.name}.so"
    assert all(command.startswith("-m64 ") for command in calls(tmp_path))
    assert wrapped.find((build.TARGET,)) == built
    assert made.find((build.TARGET,)) is None


REFUSES = """
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

void refuse(torch::stable::Tensor given) { STD_TORCH_CHECK(given.dim() == 4, "four dimensions, got ", given.dim()); }

STABLE_TORCH_LIBRARY(a_library_that_refuses, library) { library.def("refuse(Tensor given) -> ()"); }
STABLE_TORCH_LIBRARY_IMPL(a_library_that_refuses, CPU, library) { library.impl("refuse", TORCH_BOX(&refuse)); }
"""
REFUSED = """
import sys, torch
torch.ops.load_library(sys.argv[1])
try:
    torch.ops.a_library_that_refuses.refuse(torch.zeros(2))
except RuntimeError as error:
    print(error)
"""


@pytest.mark.parametrize("option", ["", " -static-libstdc++"], ids=["shared", "static"])
def test_a_refusal_arrives_whole_whichever_way_the_compiler_links_its_own_library(option, tmp_path):
    compiler = extension.find_cxx()
    if compiler is None:
        pytest.skip(extension.NO_CXX)
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "refuses.cpp").write_text(REFUSES)
    made = dataclasses.replace(
        build.LIBRARY, package=tmp_path, units=(Unit("refuses.cpp"),), find_compiler=lambda: compiler + option
    )
    try:
        library = made.build(build.TARGET, tmp_path / "out")
    except BuildError as error:
        if not option:
            raise
        pytest.skip(f"this compiler has no static library of its own: {error}")
    # In a process of its own, which a fault may kill.
    done = subprocess.run([sys.executable, "-c", REFUSED, str(library)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "four dimensions, got 1" in done.stdout


# What is loaded, and what is not


def test_a_library_that_is_cut_short_is_refused_rather_than_loaded(library_for_cpus, tmp_path):
    (whole,) = {build.LIBRARY.find((build.TARGET,))}
    content = whole.read_bytes()
    for length in (20, 64, 1000, len(content) // 3):
        path = tmp_path / f"{length}.so"
        path.write_bytes(content[:length])
        path.chmod(0o700)
        with pytest.raises(BuildError, match="is not loaded: it is cut short; without it, it is built anew"):
            extension.load(path)
    path = tmp_path / "text.so"
    path.write_bytes(b"no library")
    path.chmod(0o700)
    with pytest.raises(BuildError, match=r"could not be loaded: .*; without it, it is built anew"):
        extension.load(path)


def test_another_library_in_the_place_of_a_build_is_refused(tmp_path):
    path = tmp_path / "other.so"
    path.write_bytes((Path(torch.__file__).parent / "lib" / "libtorch_global_deps.so").read_bytes())
    path.chmod(0o700)
    script = f"from pathlib import Path; from attnreg_cpu import build; build.load(Path({str(path)!r}))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert f"BuildError: {path} is no build of attnreg_cpu" in done.stderr


def test_a_compiler_that_cannot_say_its_version_hides_no_build(library, tmp_path):
    made = library()
    built = made.build(build.TARGET)
    silent = dataclasses.replace(made, find_compiler=lambda: "/bin/false")
    assert silent.find((build.TARGET,)) == built
    built.unlink()
    assert silent.find((build.TARGET,)) is None
    carried = silent._folder(tmp_path / "lib") / "g++-1.2.3-x86_64.so"
    carried.parent.mkdir(parents=True)
    carried.write_bytes(b"")
    assert silent.find((build.TARGET,)) == carried


def test_what_is_no_file_in_the_place_of_a_build_is_passed_over(library):
    made = library()
    built = made.build(build.TARGET)
    built.unlink()
    os.mkfifo(built, 0o700)
    assert made.find((build.TARGET,)) is None


def test_nothing_is_built_where_it_would_not_be_loaded(library, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(0o777)
    with pytest.raises(BuildError, match=r"is not built in .*, where it would not be loaded: others may write to"):
        library().build(build.TARGET)
    assert not (tmp_path / "log").exists()


def test_what_is_built_into_a_folder_is_for_whoever_may_read_it(library, tmp_path):
    before = os.umask(0o002)
    try:
        built = library().build(build.TARGET, tmp_path / "out")
    finally:
        os.umask(before)
    assert [each.stat().st_mode & 0o777 for each in (built, built.parent, tmp_path / "out")] == [0o755] * 3
    private = library().build(build.TARGET)
    assert [each.stat().st_mode & 0o777 for each in (private, private.parent)] == [0o700] * 2
