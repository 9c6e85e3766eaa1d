"""What .ci/run checks of a wheel, on wheels that hold no more than names."""

from __future__ import annotations

import zipfile

import check_wheel
import pytest


def wheel_of(names, path):
    with zipfile.ZipFile(path, "w") as wheel:
        for name in names:
            wheel.writestr(name, "")
    return str(path)


def test_every_module_source_and_table_of_the_tree_belongs_into_the_wheel():
    assert {
        "attnreg/py.typed",
        "attnreg/measuring/timing.py",
        "attnreg/tables/shipped/cpu.json",
        "attnreg_triton/hopper/attention.py",
        "attnreg_cublas/csrc/library.cu",
        "attnreg_cublas/csrc/unpack.cuh",
        "attnreg_cpu/csrc/library.cpp",
        "attnreg_cpu/csrc/kernels.h",
        "attnreg_cpu/py.typed",
        "attnreg_benchmarks/peers/flash2.py",
    } <= check_wheel.needed()


@pytest.mark.parametrize("name", ["attnreg/measuring/timing.py", "attnreg_cublas/csrc/band.cuh"])
def test_a_wheel_that_lacks_a_file_of_the_tree_is_told(tmp_path, name):
    with pytest.raises(AssertionError, match=f"lacks {[name]}".replace("[", r"\[").replace("]", r"\]")):
        check_wheel.main(wheel_of(check_wheel.needed() - {name}, tmp_path / "x.whl"))


def test_a_wheel_that_holds_what_is_no_part_of_it_is_told(tmp_path):
    names = {*check_wheel.needed(), "attnreg-0.1.0.dist-info/RECORD", "attnreg_cublas/lib/x.so", "tests/cases.py"}
    with pytest.raises(AssertionError, match=r"holds \['tests/cases.py'\]"):
        check_wheel.main(wheel_of(names, tmp_path / "x.whl"))


def test_a_source_folder_that_is_no_package_is_told(tmp_path, monkeypatch):
    (tmp_path / "backends" / "attnreg_new").mkdir(parents=True)
    (tmp_path / "backends" / "attnreg_new" / "plugin.py").write_text("")
    (tmp_path / "pyproject.toml").write_text((check_wheel.ROOT / "pyproject.toml").read_text())
    monkeypatch.setattr(check_wheel, "ROOT", tmp_path)
    with pytest.raises(AssertionError, match=r"plugin.py lies in no folder that pyproject.toml's package-dir names"):
        check_wheel.needed()
