"""What stands around: other files in the folder, other processes, users, disks and settings, and how a program was started."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from attnreg_cublas import build
from filelock import FileLock
from tabled import CPU, SMALL, as_torch_block, call, empty_tensors, here, problem, run, table_of

import attnreg
from attnreg import Window, environ, extension, paths
from attnreg.measured import Figure
from attnreg.measuring import steadiness
from attnreg.op import OPS
from attnreg.registry import registry
from attnreg.tables import store
from attnreg.tables.call import as_measured
from attnreg.tables.table import Table, from_json
from attnreg.tuning import autotune, writing
from attnreg.tuning import tune as tune_module
from attnreg.tuning import worker as worker_module
from attnreg.tuning.candidate import Measurement
from attnreg.tuning.tune import grid
from attnreg.tuning.worker import NoPython, Worker


def run_python(source, *arguments, check=True, flags=(), **options):
    """A Python of its own, whose path of imports is this one's without the current folder."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **options.pop("env", {})}
    environment = {name: value for name, value in environment.items() if value is not None}
    done = subprocess.run(
        [sys.executable, *flags, "-c", textwrap.dedent(source), *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=180,
        **options,
    )
    assert not check or done.returncode == 0, done.stderr
    return done


def small_call():
    (call,) = grid(**{**SMALL, "batch": 1, "windows": [4], "device": CPU, "gradients": [False]})
    return call


PLUGIN = """
import os, sys, time
from attnreg import Backend, Capability, hookimpl
import torch
def forks(*a, **k):
    if os.fork() == 0:
        os.setpgid(0, 0)
        time.sleep(60)
    raise ValueError("it forked")
def forks_and_ends(*a, **k):
    if os.fork() == 0:
        time.sleep(60)
    os._exit(3)
def forks_and_hangs(*a, **k):
    os.fork()
    time.sleep(60)
def forks_and_goes_on(*a, **k):
    os.fork()
    raise ValueError("both go on")
def writes_half(*a, **k):
    for number in range(3, 20):
        try: os.write(number, b'{"figure": ')
        except OSError: pass
    time.sleep(60)
def writes_nonsense(*a, **k):
    for number in range(3, 20):
        try: os.write(number, b'null\\n[]\\n' + b'{"number": 7}\\n' + b'[' * 9000 + b'\\n')
        except OSError: pass
    raise ValueError("it wrote")
def detaches(*a, **k):
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            with open(os.environ["ATTNREG_LEFT"], "w") as file: file.write(str(os.getpid()))
            time.sleep(60)
        os._exit(0)
    while not os.path.exists(os.environ["ATTNREG_LEFT"]) or not os.path.getsize(os.environ["ATTNREG_LEFT"]): time.sleep(0.01)
    if "HANGS" in os.environ["ATTNREG_LEFT"]: time.sleep(60)
    raise ValueError("it detached")
def reads(*a, **k): raise ValueError(repr(sys.stdin.read()))
def no_memory(*a, **k): torch.empty(2**60)
def killed(*a, **k): os.kill(os.getpid(), 9)
def counts(*a, **k): raise ValueError(",".join(map(str, os.listdir("/proc/self/fd"))))
@hookimpl
def attnreg_backends():
    for each in (
        forks, forks_and_ends, forks_and_hangs, forks_and_goes_on, writes_half, writes_nonsense, reads, no_memory, killed,
        detaches,
    ):
        yield Backend(name=each.__name__, capability=Capability(dtypes=(torch.float32,)), local_attention=each)
"""


@pytest.fixture(scope="module")
def plugin_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    (folder / "worst_plugin.py").write_text(PLUGIN)
    info = folder / "worst_plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: worst-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[attnreg]\nworst = worst_plugin\n")
    return folder


@pytest.fixture(scope="module")
def shared_worker():
    """One for all tests: each leaves it as it was."""
    with Worker() as worker:
        yield worker


@pytest.fixture
def worker(shared_worker, plugin_folder, monkeypatch):
    """What it starts finds the plug-in; nobody else does."""
    monkeypatch.syspath_prepend(str(plugin_folder))
    return shared_worker


# A process that measures


@pytest.mark.parametrize(
    ("name", "reason", "passing"),
    [
        ("forks", "it forked", False),
        ("forks_and_ends", "exit code 3", False),
        ("forks_and_hangs", "given up after 3 s", True),
        ("forks_and_goes_on", "both go on", False),
        ("writes_half", "given up after 3 s", True),
        ("writes_nonsense", "it wrote", False),
        ("reads", "ValueError: ''", False),
        ("no_memory", "can't allocate memory", True),
        ("killed", "signal SIGKILL", True),
    ],
)
def test_a_candidate_costs_no_more_than_its_time_and_nothing_of_the_next(worker, name, reason, passing):
    assert worker.measure(small_call(), "torch", 0.01).figure.seconds
    group, worker.longest = worker._process.pid, 3
    start = time.monotonic()
    figure = worker.measure(small_call(), name, 0.01).figure
    assert reason in figure.reason
    assert figure.passing is passing
    assert time.monotonic() - start < 8
    worker.longest = worker_module.LONGEST_SECONDS
    assert worker.measure(small_call(), "torch", 0.01).figure.seconds
    if "exit" in reason or "given up" in reason or "SIGKILL" in reason:
        assert not members(group)


def members(group):
    """The processes of a group that have not ended."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/stat") as file:
                state, _, of = file.read().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        if int(of) == group and state != "Z":
            found.append(int(name))
    return found


def has_ended(process):
    """Whether a process is no more, or only waits to be asked how it ended."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def gone(process):
    """Whether a process ends within some seconds."""
    until = time.monotonic() + 10
    while not has_ended(process) and time.monotonic() < until:
        time.sleep(0.02)
    return has_ended(process)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nobody tells who has detached themselves")
@pytest.mark.parametrize("name", ["left", "HANGS"])
def test_what_a_candidate_detached_ends_with_the_process_that_measured_it(plugin_folder, monkeypatch, tmp_path, name):
    monkeypatch.syspath_prepend(str(plugin_folder))
    monkeypatch.setenv("ATTNREG_LEFT", str(tmp_path / name))
    with Worker() as worker:
        assert worker.measure(small_call(), "torch", 0.01).figure.seconds
        worker.longest = 5 if name == "HANGS" else worker.longest
        reason = worker.measure(small_call(), "detaches", 0.01).figure.reason
        assert ("given up after 5 s" if name == "HANGS" else "it detached") in reason
    assert gone(int((tmp_path / name).read_text()))


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nobody tells who has detached themselves")
def test_what_a_candidate_detached_ends_with_the_program(plugin_folder, tmp_path):
    source = """
        import os, sys
        sys.path[:0] = sys.argv[1:]
        from test_surroundings import small_call
        from attnreg.tuning.worker import Worker
        worker = Worker()
        worker.measure(small_call(), "detaches", 0.01)
        os.kill(os.getpid(), 9)
    """
    left = tmp_path / "left"
    run_python(source, plugin_folder, os.path.dirname(__file__), env={"ATTNREG_LEFT": str(left)}, check=False)
    assert gone(int(left.read_text()))


def test_a_process_that_was_killed_while_nothing_was_measured_is_started_again(worker):
    assert worker.measure(small_call(), "torch", 0.01).figure.seconds
    os.killpg(worker._process.pid, signal.SIGKILL)
    time.sleep(0.2)
    assert worker.measure(small_call(), "torch_block", 0.01).figure.seconds


def test_a_process_that_cannot_begin_is_not_started_for_ever(monkeypatch):
    monkeypatch.setattr(worker_module, "_PROGRAM", "import sys; sys.exit('it does not start')")
    with Worker() as worker:
        for _ in range(3):
            figure = worker.measure(small_call(), "torch", 0.01).figure
            assert figure.reason == "no process that measures could be started: exit code 1: it does not start"
            assert figure.passing
        assert worker._orders == worker_module.ATTEMPTS


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL], ids=["SIGTERM", "SIGKILL"])
def test_a_process_that_measures_ends_with_its_parent(plugin_folder, how):
    source = """
        import sys, threading
        sys.path.insert(0, sys.argv[1])
        sys.path.insert(0, sys.argv[2])
        from test_surroundings import small_call
        from attnreg.tuning.worker import Worker
        worker = Worker()
        worker.measure(small_call(), "torch", 0.01)
        print(worker._process.pid, flush=True)
        worker.measure(small_call(), "forks_and_hangs", 0.01)
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", textwrap.dedent(source), str(plugin_folder), os.path.dirname(__file__)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as parent:
        group = int(parent.stdout.readline())
        assert members(group)
        time.sleep(1)
        parent.send_signal(how)
        # It is not waited for yet: where nobody does, it stays, as a zombie, for as long.
        gone_by = time.monotonic() + 10
        while members(group) and time.monotonic() < gone_by:
            time.sleep(0.05)
        assert not members(group)


# What is found in the current folder


def test_code_in_the_current_folder_is_not_run_by_a_process_that_measures(tmp_path):
    planted = tmp_path / "current"
    planted.mkdir()
    for name in ("platform", "json", "torch", "attnreg", "readline", "sitecustomize", "site", "attnreg_torch"):
        (planted / f"{name}.py").write_text("open('ran', 'a').write(__name__)\n")
    source = """
        import os, sys
        sys.path.insert(0, sys.argv[1])
        from test_surroundings import small_call
        from attnreg.tuning.worker import Worker
        os.chdir(sys.argv[2])
        sys.path.insert(0, "")  # as in an interactive session
        with Worker() as worker:
            print(worker.measure(small_call(), "torch", 0.01).figure.reason)
    """
    assert run_python(source, os.path.dirname(__file__), planted, env={"PYTHONINSPECT": None}).stdout == "None\n"
    assert not (planted / "ran").exists()


# How a program was started


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"executable": "/opt/program/program"}, "sys.executable is '/opt/program/program', which is no Python"),
        ({"executable": ""}, "sys.executable is ''"),
        ({"executable": None}, "sys.executable is ''"),
        ({"executable": 5}, "sys.executable is 5, which is no Python"),
        ({"executable": "/opt/python-app"}, "sys.executable is '/opt/python-app', which is no Python"),
        ({"executable": "/opt/pythonic"}, "which is no Python"),
        ({"frozen": True}, "this program is frozen"),
    ],
)
def test_a_program_that_is_no_python_is_not_started_again(monkeypatch, changes, reason):
    for name, value in changes.items():
        monkeypatch.setattr(sys, name, value, raising=False)
    with Worker() as worker, pytest.raises(NoPython, match=reason):
        worker.measure(small_call(), "torch", 0.01)


def test_a_program_without_a_main_module_is_not_started_again(monkeypatch):
    monkeypatch.delitem(sys.modules, "__main__")
    with pytest.raises(NoPython, match="no module __main__: it is no Python that could measure"):
        worker_module.python()


@pytest.mark.parametrize(
    "name", ["python", "python3", "python3.11", "python3.13t", "python3.14td", "pythonw", "pythonw.exe", "Python3.exe"]
)
def test_python_is_known_by_its_name(monkeypatch, name):
    monkeypatch.setattr(sys, "executable", f"/opt/{name}")
    assert worker_module.python() == f"/opt/{name}"


def test_a_process_that_measures_starts_none(monkeypatch):
    monkeypatch.setenv("ATTNREG_WORKER", "1")
    with Worker() as worker, pytest.raises(NoPython, match="this process was itself started to measure"):
        worker.measure(small_call(), "torch", 0.01)


def test_a_program_that_is_no_python_tunes_nothing_and_calls_go_on(folder, monkeypatch, caplog):
    monkeypatch.setattr(sys, "executable", "/opt/program/program")
    with pytest.raises(NoPython):
        attnreg.tune(**SMALL, device=CPU, windows=[4])
    attnreg.autotune(True)
    for window in (4, 8, 16):
        assert call(window=window).shape == (1, 2, 64, 8)
    (record,) = caplog.records
    assert "nothing is measured on first use: sys.executable is '/opt/program/program'" in record.getMessage()
    result = run("--op", "local_attention", "--window", "4", "--length", "64", "--device", "cpu")
    assert result.exit_code == 1
    assert "which is no Python that could measure" in result.output


@pytest.mark.parametrize("archived", [False, True], ids=["copied", "archive"])
def test_the_backends_that_lie_beside_attnreg_are_found_without_metadata(tmp_path, archived):
    root = Path(attnreg.__file__).parents[1]
    ignored = shutil.ignore_patterns("__pycache__")
    for source in (root / "attnreg", root / "backends" / "attnreg_torch", root / "benchmarks" / "attnreg_benchmarks"):
        shutil.copytree(source, tmp_path / "copy" / source.name, ignore=ignored)
    where = tmp_path / "copy"
    if archived:
        where = Path(shutil.make_archive(str(tmp_path / "archive"), "zip", where))
    source = """
        import importlib.metadata, sys
        sys.path.insert(0, sys.argv[1])
        found = importlib.metadata.entry_points
        importlib.metadata.entry_points = lambda **group: [
            each for each in found(**group) if not (each.dist and each.dist.name == "attnreg")
        ]
        import attnreg, torch
        from attnreg import packages
        assert attnreg.__file__.startswith(sys.argv[1])
        packages.package_version = lambda package: None
        assert attnreg.__version__ == "0+unknown"
        for status in attnreg.backends():
            print(status.name, status.distribution, status.reason, sep=": ")
        query = torch.ones(1, 1, 8, 4)
        attnreg.local_attention(query, query, query, attnreg.Window.causal(2))
    """
    lines = run_python(source, where).stdout.splitlines()
    assert lines[:2] == ["torch: attnreg, not installed: None", "torch_block: attnreg, not installed: None"]


# Where it is kept


def test_without_a_home_calls_go_on_and_it_is_said_once():
    source = """
        import logging, pwd, torch
        def nobody(uid): raise KeyError(f"getpwuid(): uid not found: {uid}")
        pwd.getpwuid = nobody
        logging.basicConfig(format="%(message)s")
        import attnreg
        query = torch.ones(1, 1, 8, 4)
        for size in (2, 3, 4):
            attnreg.local_attention(query, query, query, attnreg.Window.causal(size))
        print(attnreg.explain(query, query, query, attnreg.Window.causal(2)))
        from attnreg_cublas.build import LIBRARY
        print(LIBRARY.unavailable())
        try:
            attnreg.tune(device="cpu", lengths=[8], windows=[2])
        except OSError as error:
            print(error)
    """
    environment = dict.fromkeys(("HOME", "XDG_CACHE_HOME", "ATTNREG_CACHE_DIR"))
    for absent in ({}, {"XDG_CACHE_HOME": "relative"}):
        done = run_python(source, env={**environment, **absent})
        assert done.stderr.count("there are no tables of the user's: there is no home directory") == 1
        assert done.stdout.count("set ATTNREG_CACHE_DIR to a folder") == 3
        assert "\ntables cannot be written: there is no home directory" in done.stdout
    assert not os.path.exists("~")


def test_a_cache_directory_that_is_relative_is_none(monkeypatch):
    import platformdirs

    monkeypatch.delenv("ATTNREG_CACHE_DIR", raising=False)
    monkeypatch.setattr(platformdirs, "user_cache_path", lambda *_, **__: Path("~/.cache/attnreg"))
    with pytest.raises(paths.NoCacheDir, match=r"would be '~/\.cache/attnreg', which is relative"):
        paths.cache_dir()


def test_the_home_in_what_variables_name_is_found(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("ATTNREG_CACHE_DIR", "~/cache")
    monkeypatch.setenv("ATTNREG_TABLE", "~/table.json")
    assert paths.cache_dir() == tmp_path / "cache"
    assert store.pinned() == tmp_path / "table.json"
    monkeypatch.setenv("ATTNREG_CACHE_DIR", "~nobody-of-that-name/cache")
    with pytest.raises(paths.NoCacheDir, match="ATTNREG_CACHE_DIR is '~nobody-of-that-name/cache'"):
        paths.cache_dir()
    monkeypatch.setenv("ATTNREG_TABLE", "~nobody-of-that-name/t.json")
    assert "t.json is not used: it cannot be read" in str(attnreg.explain(*empty_tensors(), Window.causal(8)))


def test_a_pinned_table_that_cannot_be_read_is_named_whole_with_what_to_do(folder, tmp_path, monkeypatch):
    def remarks(pin):
        monkeypatch.setenv("ATTNREG_TABLE", str(pin))
        return attnreg.explain(*empty_tensors(), Window.causal(8)).remarks

    missing = tmp_path / "missing.json"
    assert remarks(missing) == (
        f"ATTNREG_TABLE={missing} is not used: it cannot be read: No such file or directory; unset it, or write one with "
        f"`attnreg tune --export {missing}`",
    )
    assert remarks("/dev/null") == ("ATTNREG_TABLE=/dev/null is not used: it is no regular file; unset it",)
    assert remarks("/" + "x" * 300)[0].startswith("ATTNREG_TABLE=/xxx")
    writing.write(replace(table_of({"torch": 1.0}), environment=replace(here(), attnreg="99.0")), missing)
    (remark,) = remarks(missing)
    assert remark.startswith(f"ATTNREG_TABLE={missing} is not used: it was measured with attnreg 99.0")


def test_folders_are_made_for_this_user_alone(folder, tmp_path):
    writing.save(table_of({"torch": 1.0}))
    paths.make_private(tmp_path / "a" / "b")
    paths.make_private(tmp_path / "a" / "b")
    for each in (folder, tmp_path / "a", tmp_path / "a" / "b"):
        assert each.stat().st_mode & 0o777 == 0o700


def long(folder):
    return folder / ("x" * 300)


def in_a_file(folder):
    (folder / "file").touch()
    return folder / "file" / "cache"


def dangling(folder):
    (folder / "link").symlink_to(folder / "nowhere")
    return folder / "link" / "cache"


def looping(folder):
    (folder / "link").symlink_to(folder / "link")
    return folder / "link"


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (long, "xxx: File name too long"),
        (dangling, "link is a symbolic link to {}/nowhere, which is not there"),
        (looping, "link: Too many levels of symbolic links"),
        (in_a_file, "file is no folder"),
    ],
)
def test_where_there_can_be_no_folder_the_reason_is_said_and_calls_go_on(tmp_path, monkeypatch, make, reason):
    path, reason = make(tmp_path), reason.format(tmp_path)
    with pytest.raises(paths.NoCacheDir, match="cannot be made: ") as refusal:
        paths.make_private(path)
    assert reason.rpartition(": ")[2] in str(refusal.value)
    monkeypatch.setattr(store, "table_dir", lambda: paths.cache_dir() / "tables")
    monkeypatch.setenv("ATTNREG_CACHE_DIR", str(path))
    registry.tables.forget()
    with pytest.raises(OSError, match="tables cannot be written: ") as refusal:
        writing.check_writable(here())
    assert reason in str(refusal.value)
    decision = attnreg.explain(*empty_tensors(), Window.causal(8))
    if make is in_a_file:  # only whoever writes is told
        assert paths.cache_dir() == path
    else:
        assert f"ATTNREG_CACHE_DIR={paths.shown(path)}: " in str(decision)
        assert reason in str(decision)
        assert reason in build.LIBRARY.unavailable()
    # It is found at once that nothing is in the way any more.
    monkeypatch.setenv("ATTNREG_CACHE_DIR", str(tmp_path / "cache"))
    writing.check_writable(here())


def test_a_cache_directory_does_not_follow_the_program_around(monkeypatch):
    monkeypatch.setenv("ATTNREG_CACHE_DIR", "cache")
    with pytest.raises(paths.NoCacheDir, match="ATTNREG_CACHE_DIR=cache: a relative path; set it to the whole path"):
        paths.cache_dir()
    assert "a relative path" in replace(build.LIBRARY, find_compiler=lambda: None).unavailable()


def test_a_switch_is_read_whatever_stands_around_it(monkeypatch):
    for text, on in {"1": True, " On\n": True, "TRUE ": True, "": False, "  ": False, " 0": False, "No": False}.items():
        monkeypatch.setenv("ATTNREG_AUTOTUNE", text)
        assert environ.switch(b"ATTNREG_AUTOTUNE") is on
    monkeypatch.delenv("ATTNREG_AUTOTUNE")
    assert environ.switch(b"ATTNREG_AUTOTUNE") is False
    monkeypatch.setenv("ATTNREG_AUTOTUNE", "maybe")
    told = r"ATTNREG_AUTOTUNE must be 1 or 0 \(or true, yes, on; false, no, off\), got 'maybe'"
    with pytest.raises(ValueError, match=told):
        environ.switch(b"ATTNREG_AUTOTUNE")


# What a library may be loaded from


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A library without a compiler, and where its build lies."""
    monkeypatch.setenv("ATTNREG_CACHE_DIR", str(tmp_path / "cache"))
    without = replace(build.LIBRARY, find_compiler=lambda: None)
    path = without._folder(tmp_path / "cache") / "nvcc-13.0.0-90.so"
    paths.make_private(path.parent)
    path.write_bytes(b"no library")
    path.chmod(0o700)
    return without, path


def _foreign(path):
    if os.geteuid():
        pytest.skip("only root can give a file away")
    os.chown(path, 65534, 65534)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda path: path.chmod(0o702), "others may write to"),
        (lambda path: path.chmod(0o720), "others may write to"),
        (lambda path: path.parent.chmod(0o770), "others may write to"),
        (lambda path: path.parent.chmod(0o1777), None),  # others' files beside it do not replace it
        (lambda path: path.parents[1].chmod(0o777), "others may write to"),
        (lambda path: path.parents[1].chmod(0o1777), None),
        (_foreign, "belongs to another user"),
        (lambda path: _foreign(path.parent), "belongs to another user"),
        (lambda path: None, None),
    ],
)
def test_a_library_is_loaded_only_where_nobody_else_can_have_put_it(library, spoil, reason):
    extension_of, path = library
    spoil(path)
    loaded = pytest.raises(extension.BuildError, match="could not be loaded" if reason is None else reason)
    if reason is None:
        assert extension_of.find([build.target(["90"])]) == path
        assert extension_of.unavailable() is None
    else:
        assert extension_of.find([build.target(["90"])]) is None
        assert "the builds there are not used: " in extension_of.unavailable()
        assert reason in extension_of.unavailable()
    with loaded:
        extension.load(path)


def reached_by(link, target, mode):
    """A link in a folder of that mode."""
    link.parent.mkdir()
    link.symlink_to(target)
    link.parent.chmod(mode)
    return link


@pytest.mark.parametrize(
    ("mode", "foreign", "reason"),
    [
        (0o777, False, "others may write to"),
        (0o770, False, "others may write to"),
        (0o1777, False, None),
        (0o700, True, "belongs to another user"),
        (0o1777, True, "belongs to another user"),
        (0o700, False, None),
    ],
)
def test_a_link_to_a_library_is_trusted_only_where_nobody_else_can_have_put_it(
    library, tmp_path, mode, foreign, reason
):
    _, path = library
    link = reached_by(tmp_path / "open" / "l.so", path, mode)
    by_folder = tmp_path / "open" / "folder"
    by_folder.symlink_to(os.path.relpath(path.parent, by_folder.parent))
    if foreign:
        if os.geteuid():
            pytest.skip("only root can give a file away")
        for each in (link, by_folder):
            os.lchown(each, 65534, 65534)
    for each in (link, by_folder / path.name, by_folder / ".." / path.parent.name / path.name):
        told = paths.why_not_trusted(each)
        # A folder above may be a group's.
        if reason is None or (mode == 0o770 and each != link):
            assert told is None
        else:
            assert reason in told
    assert paths.why_not_trusted(path) is None


def test_a_folder_on_the_way_back_is_looked_at_as_any_other(library):
    _, path = library
    (path.parent / "below").mkdir()
    path.parent.chmod(0o770)
    assert "others may write to" in paths.why_not_trusted(path.parent / "below" / ".." / path.name)
    path.parent.chmod(0o700)
    loop = path.parent / "loop.so"
    loop.symlink_to(loop)
    assert "Too many levels of symbolic links" in paths.why_not_trusted(loop)


def test_what_is_loaded_is_what_was_looked_at(library, tmp_path, monkeypatch):
    _, path = library
    link = reached_by(tmp_path / "links" / "l.so", path, 0o700)
    loaded = []
    monkeypatch.setattr(torch.ops, "load_library", loaded.append)
    extension.load(link)
    assert loaded == [str(path)]
    link.parent.chmod(0o777)
    with pytest.raises(extension.BuildError, match=r"l\.so is not loaded: others may write to"):
        extension.load(link)
    assert loaded == [str(path)]


def test_what_a_killed_build_left_is_removed_by_the_next_one(tmp_path):
    for name, age in (("unfinished-old", 2 * 86400), ("unfinished-new", 10), ("other", 2 * 86400)):
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    extension._sweep(tmp_path)
    assert {each.name for each in tmp_path.iterdir()} == {"unfinished-new", "other"}


# Who else writes there


def as_another_user(function):
    """What a function returns in a child that is another user, as JSON."""
    if os.geteuid():
        pytest.skip("only root can become another user")
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            os.write(write, json.dumps(function()).encode())
        except BaseException as error:
            os.write(write, json.dumps(f"{type(error).__name__}: {error}").encode())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as file:
        said = json.loads(file.read())
    os.waitpid(child, 0)
    return said


@pytest.fixture
def shared_folder(folder):
    """The folder of tables, reached by anybody.

    Torch has one thread: others would not be there in a forked child, and torch would wait for them for ever.
    """
    folder.mkdir()
    for each in list(folder.parents)[:-2]:
        each.chmod(each.stat().st_mode | 0o055)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield folder
    torch.set_num_threads(threads)


@pytest.mark.parametrize("mode", [0o777, 0o1777], ids=["shared", "sticky"])
def test_a_second_user_of_a_shared_folder_saves_too(shared_folder, mode):
    shared_folder.chmod(mode)
    first = writing.save(table_of({"torch": 1.0, "torch_block": 2.0}))

    def save():
        writing.check_writable(here())
        return str(writing.save(table_of({"torch": 3.0}, window=32)))

    second = Path(as_another_user(save))
    assert (second == first) == (mode == 0o777)
    assert len(store.load(first).rows) == 1 + (mode == 0o777)
    assert len(store.load(second).rows) == 1 + (mode == 0o777)
    assert attnreg.explain(*empty_tensors(), Window.causal(8)).source == "tuned"


@pytest.mark.parametrize("spoil", ["lock", "folder"])
def test_a_user_who_cannot_save_learns_it_before_anything_is_measured(shared_folder, spoil):
    writing.save(table_of({"torch": 1.0}))
    if spoil == "lock":  # as an older attnreg made it
        shared_folder.chmod(0o777)
        (lock,) = shared_folder.glob(".*.lock")
        lock.chmod(0o644)
    else:
        shared_folder.chmod(0o755)
    seen = []

    def tune():
        attnreg.tune(**SMALL, device=CPU, windows=[4], progress=seen.append)

    said = as_another_user(tune)
    assert said.startswith(f"OSError: tables cannot be written to {shared_folder}: ")
    assert "Permission denied" in said
    assert not seen


def test_what_a_killed_process_left_is_removed(folder):
    writing.save(table_of({"torch": 1.0}))
    old, new = (folder / f".x.json.unfinished-{name}" for name in ("old", "new"))
    for each, age in ((old, 7200), (new, 10)):
        each.touch()
        os.utime(each, (time.time() - age,) * 2)
    writing.check_writable(here())
    assert not old.exists()
    assert new.exists()
    assert len([*folder.glob("*.json")]) == 1


# What is in the way at the end


SMALL_TUNING = {**SMALL, "windows": [4], "gradients": [False], "seconds": 0.01, "device": CPU}


def full_disk(table, path, first=()):
    raise OSError(errno.ENOSPC, "No space left on device", str(path))


def test_what_was_measured_before_the_disk_was_full_is_not_lost(folder, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(writing, "write", full_disk)
    found = attnreg.tune(**SMALL_TUNING)
    assert (found.path, found.fault) == (None, "No space left on device")
    decision = attnreg.explain(*empty_tensors(), Window.causal(4))
    assert decision.source == "tuned"
    assert "(in this process)" in decision.reason
    assert store.load(found.rescued).rows == found.table.rows
    monkeypatch.undo()


def test_the_file_of_a_table_that_could_not_be_saved_has_a_name_that_nobody_foresees(folder, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(tune_module, "save", lambda table: full_disk(table, folder))
    found = [tune_module._keep(table_of({"torch": 1.0}))[2] for _ in range(2)]
    assert len(set(found)) == 2
    assert {each.parent for each in found} == {tmp_path}
    monkeypatch.setattr(tune_module, "write", full_disk)
    assert tune_module._keep(table_of({"torch": 1.0}))[2] is None
    assert set(tmp_path.glob("attnreg-*")) == set(found)


# Where a table is exported to


def test_what_a_link_leads_to_is_written_and_the_link_stays(tmp_path):
    target, table = tmp_path / "there" / "table.json", table_of({"torch": 1.0})
    target.parent.mkdir()
    (tmp_path / "link.json").symlink_to(target)
    for _ in range(2):  # one that is not there yet, and one that is
        writing.write(table, tmp_path / "link.json")
        assert (tmp_path / "link.json").is_symlink()
        assert store.load(target) == table
    assert [*target.parent.iterdir()] == [target]
    (tmp_path / "loop.json").symlink_to(tmp_path / "loop.json")
    with pytest.raises(OSError, match="cannot be written: Too many levels of symbolic links"):
        writing.write(table, tmp_path / "loop.json")
    assert (tmp_path / "loop.json").is_symlink()


def test_what_is_no_file_is_written_into_and_never_replaced(tmp_path):
    table, pipe = table_of({"torch": 1.0}), tmp_path / "pipe.json"
    os.mkfifo(pipe)
    reading = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    writing.write(table, pipe)
    with open(reading) as file:
        assert from_json(file.read()) == table
    assert pipe.is_fifo()
    with pytest.raises(OSError, match="cannot be written: Is a directory"):
        writing.write(table, tmp_path)
    source = """
        from pathlib import Path
        from attnreg.tables import store
        from attnreg.tuning import writing
        import sys
        writing.write(store.load(Path(sys.argv[1])), Path("/dev/stdout"))
    """
    writing.write(table, tmp_path / "t.json")
    assert from_json(run_python(source, tmp_path / "t.json").stdout) == table
    assert os.path.lexists("/dev/stdout")


def test_a_link_to_a_table_of_ones_own_is_saved_into_and_one_of_another_user_is_not(folder, tmp_path):
    path = writing.save(table_of({"torch": 1.0}))
    elsewhere = path.rename(tmp_path / "mine.json")
    path.symlink_to(elsewhere)
    assert writing.save(table_of({"torch": 2.0}, window=16)) == path
    assert path.is_symlink()
    assert len(store.load(elsewhere).rows) == 2
    if os.geteuid():
        pytest.skip("only root can give a link away")
    os.lchown(path, 65534, 65534)
    assert writing.save(table_of({"torch": 3.0}, window=32)) != path
    assert len(store.load(elsewhere).rows) == 2


def test_the_command_says_where_the_table_is_that_could_not_be_written(folder, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(writing, "write", full_disk)
    sizes = ("--op", "local_attention", "--dtype", "float32", "--head-dim", "8", "--length", "64", "--heads", "2,1")
    result = run(*sizes, "--window", "4", "--no-grad", "--seconds", "0.01", "--device", "cpu")
    assert result.exit_code == 1
    assert "the table could not be written: No space left on device" in result.output
    monkeypatch.setattr(tune_module, "write", full_disk)
    assert attnreg.tune(**SMALL_TUNING).rescued is None


def test_a_lock_that_is_held_loses_nothing_and_is_not_waited_for_in_between(folder, monkeypatch):
    monkeypatch.setattr(tune_module, "SAVING_SECONDS", 0.0)
    monkeypatch.setattr(tune_module, "save", lambda table, seconds=0.2: writing.save(table, min(seconds, 0.2)))
    lock = FileLock(folder / f".{here().file_name}.lock")

    def hold(step):
        if not lock.is_locked:
            lock.acquire()

    found = attnreg.tune(**SMALL_TUNING, progress=hold)
    lock.release()
    assert f"another process holds {lock.lock_file} for 0.2 s already" in found.fault
    assert attnreg.explain(*empty_tensors(), Window.causal(4)).source == "tuned"
    assert store.load(found.rescued).rows == found.table.rows
    found.rescued.unlink()


def test_a_call_waits_for_no_lock_but_a_little(folder, monkeypatch, caplog):
    monkeypatch.setattr(autotune, "CALL_SECONDS", 0.1)
    monkeypatch.setattr(writing, "CALL_SECONDS", 0.1)
    attnreg.autotune(True)
    folder.mkdir()
    with FileLock(folder / f".{here().file_name}.lock"):
        call()
    assert attnreg.explain(*empty_tensors(), Window.causal(8)).source == "tuned"
    assert "kept in this process only" in caplog.text


# What may be otherwise the next time


def test_what_ran_out_of_memory_or_time_is_no_fact(folder):
    def forward(*arguments, **options):
        torch.empty(2**60)

    with attnreg.register(as_torch_block("greedy", local_attention=forward, rank=1)):
        found = attnreg.tune(**SMALL_TUNING)
        (figures,) = found.table.rows.values()
        assert figures["greedy"].passing
        (saved,) = store.load(found.path).rows.values()
        assert set(saved) == {"torch", "torch_block"}
        attnreg.autotune(True)
        registry.tables.forget()
        call(window=4)
        call(window=4)
        (saved,) = store.load(found.path).rows.values()
        assert set(saved) == {"torch", "torch_block"}
        # In this process it is known, and not measured at every call.
        assert autotune.tune_on_first_use(problem(4))
        assert "greedy" in {
            name for table in registry.tables._unwritten.values() for row in table.rows.values() for name in row
        }


# A load that is always there


@pytest.mark.parametrize(
    ("table", "expected"), [({"copy_seconds": 1.0}, True), ({"copy_seconds": 1.9}, False), ({}, False)]
)
def test_a_load_that_never_ends_shows_against_what_is_known_of_the_machine(folder, monkeypatch, table, expected):
    writing.save(replace(table_of({"torch": 1.0}, window=64), **table))
    monkeypatch.setattr(Worker, "measure", lambda *_: Measurement(Figure(seconds=1.0, measured="2026-02-01"), 2.0, 0.0))
    found = attnreg.tune(**SMALL_TUNING)
    assert bool(found.disturbed) == expected
    saved = store.load(found.path)
    assert saved.copy_seconds == (1.9 if table.get("copy_seconds") == 1.9 else table.get("copy_seconds", 2.0))
    decision = attnreg.explain(*empty_tensors(), Window.causal(4))
    assert ("something else used the device while this was measured" in str(decision)) == expected


def test_threads_that_had_to_wait_for_a_core_were_disturbed(folder, monkeypatch):
    waited = [0.5, 0.0, 0.5, 0.4]
    monkeypatch.setattr(
        Worker, "measure", lambda *_: Measurement(Figure(seconds=waited[0], measured="2026-02-01"), 1.0, waited.pop(0))
    )
    found = attnreg.tune(**SMALL_TUNING)
    (figures,) = found.table.rows.values()
    assert [(figure.seconds, figure.disturbed) for figure in figures.values()] == [(0.0, False), (0.4, True)]


def test_the_time_that_threads_wait_for_a_core_is_counted():
    if steadiness.waited_seconds() is None:
        pytest.skip("this kernel does not say")
    source = """
        import os, time
        from attnreg.measuring.steadiness import waited_seconds
        os.sched_setaffinity(0, list(os.sched_getaffinity(0))[:1])
        child = os.fork()
        while child == 0:
            pass
        before, end = waited_seconds(), time.monotonic() + 1
        while time.monotonic() < end:
            pass
        os.kill(child, 9)
        print(waited_seconds() - before)
    """
    assert 0.1 < float(run_python(source).stdout) < 1.1


def test_a_figure_that_was_disturbed_gives_way_to_one_that_was_not():
    key = as_measured(problem())
    old, new = Figure(seconds=1.0, measured="2026-01-01"), Figure(seconds=2.0, measured="2026-02-01", disturbed=True)
    tables = [Table(here(), {key: {"x": figure}}) for figure in (old, new)]
    for first, second in (tables, tables[::-1]):
        assert first.merged(second).rows[key]["x"] is old
    marked = replace(old, disturbed=True)  # the same measurement, found out later
    assert tables[0].merged(Table(here(), {key: {"x": marked}})).rows[key]["x"] is marked


# How the command ends


TUNE = ("tune", "--op", "local_attention", "--dtype", "float32", "--head-dim", "8", "--heads", "2,1", "--device", "cpu")


def test_a_tuning_that_is_terminated_keeps_what_was_measured(tmp_path):
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "ATTNREG_CACHE_DIR": str(tmp_path),
        "ATTNREG_AUTOTUNE": "0",
    }
    source = "import attnreg.cli.tune as t; t.TELLING_SECONDS = 0; from attnreg.cli import app; app()"
    command = [sys.executable, "-c", source, *TUNE, "--length", "64", "--seconds", "0.05"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=tmp_path
    ) as tuning:
        for line in tuning.stderr:
            if line.startswith("measured 2 of "):
                break
        tuning.send_signal(signal.SIGTERM)
        said, _ = tuning.communicate(timeout=60)
    assert tuning.returncode == 128 + signal.SIGTERM
    assert "interrupted; what was measured until here is kept" in said
    (path,) = (tmp_path / "tables").glob("*.json")
    assert sum(map(len, store.load(path).rows.values())) >= 2


def test_the_command_says_why_nothing_could_be_measured(folder):
    def wrong(query, *arguments, **options):
        return torch.zeros_like(query), torch.zeros(query.shape[:3])

    def raises(*arguments, **options):
        raise RuntimeError("\x1b[31mboom[/red]")

    with (
        attnreg.register(as_torch_block("bad", local_attention=wrong)),
        attnreg.register(as_torch_block("worse", local_attention=raises)),
    ):
        sizes = (*TUNE[1:], "--length", "64", "--no-grad", "--window", "4", "--window", "8", "--seconds", "0.01")
        result = run(*sizes, "--backend", "bad", "--backend", "worse")
        assert result.exit_code == 1
        assert "not timed: bad, W=4" in result.output
        assert "wrong: output: relative error" in result.output
        assert "not timed: worse, W=4, 8: RuntimeError: \\x1b[31mboom[/red]" in result.output
        assert "\x1b" not in result.output
        result = run(*sizes, "--backend", "bad", "--backend", "torch")
        assert result.exit_code == 0
        assert "not timed: bad" in result.output
        result = run(*sizes, "--backend", "torch_block")
        assert "measured alone for some calls, which go by no time of one candidate" in result.output


def test_the_reference_is_right_in_float64(folder):
    found = attnreg.tune(**{**SMALL, "dtypes": [torch.float64], "ops": OPS}, device=CPU, windows=[4, 64], seconds=0.001)
    assert all(figure.reason is None for row in found.table.rows.values() for figure in row.values())


# How Python is started


CALLS = """
    import threading, torch, attnreg
    def call(size):
        query = torch.randn(1, 2, 16, 4, requires_grad=True)
        attnreg.local_attention(query, query, query, attnreg.Window.causal(size)).sum().backward()
    threads = [threading.Thread(target=call, args=(size,)) for size in (2, 3, 4) for _ in range(3)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    print(attnreg.explain(*torch.ones(3, 1, 1, 8, 4), attnreg.Window.causal(2)).backend)
"""


@pytest.mark.parametrize(
    ("flags", "env"),
    [
        (["-O"], {}),
        (["-OO"], {}),
        ([], {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}),
        (["-W", "error"], {}),
        (["-I"], None),
    ],
    ids=["O", "OO", "C locale", "warnings", "isolated"],
)
def test_calls_run_however_python_was_started(tmp_path, flags, env):
    if env is None:
        source, env = f"import sys; sys.path[:] = {[*filter(None, sys.path)]!r}\n{textwrap.dedent(CALLS)}", {}
    else:
        source = CALLS
    env = {**env, "ATTNREG_CACHE_DIR": str(tmp_path)}
    # The first where there is a compiler.
    assert run_python(source, flags=flags, env=env).stdout in ("attnreg_cpu\n", "torch_block\n")


@pytest.mark.parametrize("flags", [["-O"], []], ids=["O", "C locale"])
def test_the_command_tunes_however_python_was_started(tmp_path, flags):
    env = {"ATTNREG_CACHE_DIR": str(tmp_path / "ünïcode"), "TRITON_INTERPRET": None, "COLUMNS": "80"}
    if not flags:
        env |= {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    source = "from attnreg.cli import app; app()"
    done = run_python(
        source, *TUNE, "--length", "64", "--window", "4", "--no-grad", "--seconds", "0.01", flags=flags, env=env
    )
    assert "torch_block" in done.stdout
    assert len([*(tmp_path / "ünïcode" / "tables").glob("*.json")]) == 1


def test_spawned_processes_tune_and_call(tmp_path):
    (tmp_path / "program.py").write_text(
        textwrap.dedent(
            """
            import multiprocessing, torch, attnreg
            def work(size):
                attnreg.autotune(True)
                query = torch.randn(1, 1, 16, 4)
                attnreg.local_attention(query, query, query, attnreg.Window.causal(size))
                return attnreg.explain(query, query, query, attnreg.Window.causal(size)).source
            if __name__ == "__main__":
                with multiprocessing.get_context("spawn").Pool(2) as pool:
                    print(*pool.map(work, [2, 12]))
            """
        )
    )
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "ATTNREG_CACHE_DIR": str(tmp_path / "cache"),
    }
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, str(tmp_path / "program.py")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=180)
    assert done.stdout == "tuned tuned\n", done.stderr


def test_a_forked_child_tunes_at_its_first_call(tmp_path):
    source = """
        import os, torch, attnreg
        attnreg.autotune(True)
        def call(size):
            query = torch.randn(1, 1, 16, 4)
            attnreg.local_attention(query, query, query, attnreg.Window.causal(size))
        call(2)
        child = os.fork()
        if child == 0:
            call(12)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    """
    # More threads of torch's than one would not be there in the child, and torch itself would wait for them for ever.
    run_python(source, env={"ATTNREG_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": None, "OMP_NUM_THREADS": "1"})
    (path,) = (tmp_path / "tables").glob("*.json")
    assert len(store.load(path).rows) == 2


def test_a_forked_child_measures_nothing_in_itself(folder):
    """Torch's threads are not there in the child: whatever waits for them waits for ever."""

    def forward(*arguments, **options):
        raise AssertionError("it was measured")

    attnreg.autotune(True)
    with attnreg.register(as_torch_block("local", local_attention=forward)):
        child = os.fork()
        if child == 0:
            try:
                os._exit(0 if autotune.tune_on_first_use(problem(16)) else 1)
            finally:
                os._exit(2)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert not folder.exists()


def test_folders_that_cannot_be_written_break_no_call(shared_folder, monkeypatch):
    monkeypatch.setattr(Worker, "measure", lambda *_: Measurement(Figure(seconds=1.0, measured="2026-02-01"), 1.0))
    shared_folder.chmod(0o555)
    assert isinstance(as_another_user(lambda: [*call().shape]), list)

    def tuned():
        attnreg.autotune(True)
        registry.tables.forget()
        call(window=16)
        return attnreg.explain(*empty_tensors(), Window.causal(16)).source

    assert as_another_user(tuned) == "tuned"
