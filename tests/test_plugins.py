"""The door: a stranger's backend comes in as the built-in ones do, and a broken one costs only itself."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import attnreg
from attnreg import Window

EXAMPLE = Path(__file__).parent / "example_plugin"


@pytest.fixture(scope="session")
def example_site(tmp_path_factory):
    """The example plug-in, built and installed for real, in a folder of its own."""
    site = tmp_path_factory.mktemp("site")
    source = tmp_path_factory.mktemp("source")
    for file in EXAMPLE.glob("*.*"):
        (source / file.name).write_bytes(file.read_bytes())
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*install, "--target", str(site), str(source)], check=True, capture_output=True, text=True)
    return site


@pytest.fixture
def discovered(monkeypatch):
    """Put folders on the path as if installed, and let plug-ins be discovered anew."""
    imported = set(sys.modules)

    def discover(*folders: Path) -> None:
        for folder in folders:
            monkeypatch.syspath_prepend(str(folder))
        attnreg.reset()

    yield discover
    monkeypatch.undo()
    for name in set(sys.modules) - imported:
        if name.startswith("plugged_") or name == "attnreg_example":
            del sys.modules[name]
    attnreg.reset()


@pytest.fixture
def distribution(tmp_path):
    """Write a distribution called ``plugged-NAME`` with one module and one entry point."""

    def write(name: str, source: str) -> Path:
        folder = tmp_path / name
        info = folder / f"plugged_{name}-9.1.dist-info"
        info.mkdir(parents=True)
        (folder / f"plugged_{name}.py").write_text(source)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: plugged-{name}\nVersion: 9.1\n")
        (info / "entry_points.txt").write_text(f"[attnreg]\n{name} = plugged_{name}\n")
        return folder

    return write


HEADER = """
import torch
from attnreg import Backend, Capability, hookimpl

def dot(query, key, window, *, bias, key_lengths, scale):
    return query.new_full((*query.shape[:3], window.size), 5.0)

def backend(name):
    return Backend(name=name, capability=Capability(dtypes={torch.float32}), local_dot_product=dot)
"""

BROKEN = {
    "import": (
        "import a_module_that_is_not_there",
        "ModuleNotFoundError: No module named 'a_module_that_is_not_there'",
    ),
    "syntax": ("def broken(:", "SyntaxError"),
    "exits": ("raise SystemExit('this plug-in gives up')", "SystemExit: this plug-in gives up"),
    "raises": (HEADER + "@hookimpl\ndef attnreg_backends():\n    raise OSError('no licence')", "OSError: no licence"),
    "late": (
        HEADER + "@hookimpl\ndef attnreg_backends():\n    yield backend('early')\n    raise OSError('too late')",
        "OSError: too late",
    ),
    "type": (
        HEADER + "@hookimpl\ndef attnreg_backends():\n    yield 'backend'",
        "must be an attnreg.Backend, got 'backend'",
    ),
    "returns": (
        HEADER + "@hookimpl\ndef attnreg_backends():\n    return backend('x')",
        "must yield backends, it returned Backend",
    ),
    "number": (HEADER + "@hookimpl\ndef attnreg_backends():\n    return 3", "must yield backends, it returned int"),
    "nothing": (HEADER + "@hookimpl\ndef attnreg_backends():\n    return []", "yielded no backend"),
    "none": (HEADER + "@hookimpl\ndef attnreg_backends():\n    pass", "has no @attnreg.hookimpl attnreg_backends()"),
    "unmarked": (
        HEADER + "def attnreg_backends():\n    yield backend('x')",
        "has no @attnreg.hookimpl attnreg_backends()",
    ),
    "misnamed": (HEADER + "@hookimpl\ndef attnreg_backend():\n    yield backend('x')", "PluginValidationError"),
    "taken": (
        HEADER + "@hookimpl\ndef attnreg_backends():\n    yield backend('torch')",
        "'torch' is taken by the backend of attnreg",
    ),
    "arguments": (HEADER + "@hookimpl\ndef attnreg_backends(device):\n    yield backend('x')", "PluginValidationError"),
}


HOOK = "@hookimpl\ndef attnreg_backends():\n"
UNSHOWABLE = """
class Named(type):
    @property
    def __name__(cls):
        raise RuntimeError
class Unshowable(Exception, metaclass=Named):
    def __str__(self):
        raise RuntimeError
"""
BROKEN |= {
    "panics": ("class Panic(BaseException): pass\nraise Panic('in Rust')", "Panic: in Rust"),
    "skips": ("import pytest\npytest.skip('no GPU', allow_module_level=True)", "Skipped: no GPU"),
    "cancelled": ("import asyncio\nraise asyncio.CancelledError", "CancelledError"),
    "closes": (HEADER + HOOK + "    yield backend('x')\n    raise GeneratorExit('mid')", "GeneratorExit: mid"),
    "unshowable": (UNSHOWABLE + "raise Unshowable", "Unshowable: one that its own str() cannot show"),
    "unshowable_object": (
        HEADER + "class Odd:\n    def __repr__(self): raise SystemExit\n" + HOOK + "    yield Odd()",
        "must be an attnreg.Backend, got one that its own repr() cannot show (Odd)",
    ),
    "steers": (
        r"raise OSError('\x1b[2J\x1b]0;mine\x07 first\nsecond')",
        r"OSError: \x1b[2J\x1b]0;mine\x07 first second",
    ),
    "resets": (
        HEADER + HOOK + "    import attnreg\n    attnreg.reset()\n    yield backend('x')",
        "RuntimeError: attnreg.reset() was called by a plug-in while it is loaded",
    ),
    "endless": (
        HEADER + "import itertools\n" + HOOK + "    for i in itertools.count(): yield backend(f'endless{i}')",
        "yields more than 256 backends; the others are left out",
    ),
    "derived": (
        HEADER
        + "class Own(Backend):\n    def __post_init__(self): pass\n"
        + HOOK
        + "    yield Own(name=5, capability=3)",
        "must be an attnreg.Backend, got Own(name=5, capability=3",
    ),
    "unmade": (HEADER + HOOK + "    yield Backend.__new__(Backend)", "a Backend must be made by Backend()"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_plugin_is_shown_with_its_distribution_and_error_and_the_rest_works(kind, distribution, discovered):
    source, error = BROKEN[kind]
    discovered(
        distribution(kind, source),
        distribution("good", HEADER + "@hookimpl\ndef attnreg_backends():\n    yield backend('good')"),
    )
    (fault,) = [status for status in attnreg.backends() if status.backend is None]
    assert fault.name == kind
    assert fault.distribution == f"plugged-{kind} 9.1"
    assert error in fault.reason
    assert not fault.runs_here
    query = torch.randn(1, 1, 4, 4)
    assert (attnreg.local_dot_product(query, query, Window(1, 1), backend="good") == 5.0).all()
    assert attnreg.local_attention(query, query, query, Window(1, 1)).shape == query.shape
    trace = str(attnreg.explain(query, query, query, Window(1, 1)))
    assert f"plugged-{kind} 9.1" in trace
    assert error in trace
    with pytest.raises(attnreg.BackendError, match=f"plugged-{kind}"):
        attnreg.local_attention(query, query, query, Window(1, 1), backend="nonesuch")


def test_what_a_plugin_offered_before_it_failed_is_kept(distribution, discovered):
    discovered(distribution("late", BROKEN["late"][0]))
    assert "early" in [status.name for status in attnreg.backends()]


def test_an_error_is_cut_off(distribution, discovered):
    discovered(distribution("talks", "raise OSError('no ' * 10**6)"))
    (fault,) = [status for status in attnreg.backends() if status.backend is None]
    assert len(fault.reason) < 350


@pytest.mark.parametrize(
    ("metadata", "error"),
    [
        (None, "its metadata lacks a name or a version"),
        (b"", "its metadata lacks a name or a version"),
        (b"Name: plugged-bare\n", "its metadata lacks a name or a version"),
        (b"Name: plugged-bare\xff\nVersion: 9.1\n", "its metadata cannot be read: UnicodeDecodeError"),
    ],
    ids=["none", "empty", "no version", "no UTF-8"],
)
def test_a_distribution_without_sound_metadata_is_shown_and_its_backends_and_others_work(
    metadata, error, distribution, discovered
):
    folders = [
        distribution(name, HEADER + f"@hookimpl\ndef attnreg_backends():\n    yield backend('{name}')")
        for name in ("bare", "good")
    ]
    (file,) = folders[0].glob("*.dist-info/METADATA")
    file.unlink()
    if metadata is not None:
        file.write_bytes(metadata)
    discovered(*folders)
    statuses = {status.name: status for status in attnreg.backends() if status.backend is not None}
    assert statuses["good"].distribution == "plugged-good 9.1"
    assert "unknown" in statuses["bare"].distribution
    (fault,) = [status for status in attnreg.backends() if status.backend is None]
    assert fault.name == "bare"
    assert error in fault.reason
    query = torch.randn(1, 1, 4, 4)
    for name in ("good", "bare"):
        assert (attnreg.local_dot_product(query, query, Window(1, 1), backend=name) == 5.0).all()


def test_a_distributions_name_cannot_steer_a_terminal(distribution, discovered):
    folder = distribution("steered", HEADER + "@hookimpl\ndef attnreg_backends():\n    yield backend('steered')")
    (file,) = folder.glob("*.dist-info/METADATA")
    file.write_text("Name: plugged\x1b[2J\nVersion: 9.1\n")
    discovered(folder)
    (status,) = [status for status in attnreg.backends() if status.name == "steered"]
    assert status.distribution == r"plugged\x1b[2J 9.1"


def test_ctrl_c_while_a_plugin_is_loaded_goes_through_and_the_next_need_begins_anew(distribution, discovered):
    source = (
        HEADER + "calls = []\n@hookimpl\ndef attnreg_backends():\n    yield backend('first')\n"
        "    calls.append(1)\n    if len(calls) == 1: raise KeyboardInterrupt\n    yield backend('second')"
    )
    discovered(distribution("interrupted", source))
    with pytest.raises(KeyboardInterrupt):
        attnreg.backends()
    statuses = attnreg.backends()
    assert {"first", "second", "torch"} <= {status.name for status in statuses}
    assert all(status.backend is not None for status in statuses)


def test_of_an_endless_hook_the_first_backends_are_kept(distribution, discovered):
    discovered(distribution("endless", BROKEN["endless"][0]))
    names = {status.name for status in attnreg.backends()}
    assert {"endless0", "endless255", "torch"} <= names
    assert "endless256" not in names


def test_a_taken_name_does_not_cost_the_plugins_other_backends(distribution, discovered):
    source = HEADER + "@hookimpl\ndef attnreg_backends():\n    yield backend('torch')\n    yield backend('other')"
    discovered(distribution("two", source))
    assert "other" in [status.name for status in attnreg.backends()]


def test_a_plugin_that_asks_for_backends_while_it_is_loaded_gets_those_found_so_far(distribution, discovered):
    source = (
        HEADER + "import attnreg\nattnreg.backends()\n@hookimpl\ndef attnreg_backends():\n    yield backend('curious')"
    )
    discovered(distribution("curious", source))
    assert "curious" in [status.name for status in attnreg.backends()]


OLD = """
from attnreg import Backend, Capability, hookimpl
from attnreg_torch import naive
import torch

def dot(query, key, window, *, bias, key_lengths, scale):
    return naive.local_dot_product(query, key, window, bias=bias, key_lengths=key_lengths, scale=scale)

def average(weights, value, window, *, key_lengths):
    return naive.local_weighted_average(weights, value, window, key_lengths=key_lengths)

def attention(query, key, value, window, *, bias, key_lengths, scale):
    scores = dot(query, key, window, bias=bias, key_lengths=key_lengths, scale=scale)
    return average(scores.softmax(-1), value, window, key_lengths=key_lengths), scores.logsumexp(-1)

@hookimpl
def attnreg_backends():
    capability = Capability(dtypes={torch.float32})
    products = {"local_dot_product": dot, "local_weighted_average": average, "differentiable": True}
    yield Backend(name="old", capability=capability, local_attention=attention, **products)
    yield Backend(name="old_products", capability=capability, **products)
    yield Backend(name="old_and_pinned", capability=capability, contract=2, **products)
"""


def test_a_plugin_that_knows_nothing_of_an_argument_works_and_is_refused_where_a_call_gives_it(
    distribution, discovered
):
    discovered(distribution("old", OLD))
    statuses = {status.name: status for status in attnreg.backends()}
    query = torch.randn(1, 2, 6, 4, requires_grad=True)
    lengths, window = torch.tensor([4]), Window(3, 2)
    more = {
        "key_starts": torch.tensor([1]), "query_starts": torch.tensor([0]), "cu_seqlens_q": torch.tensor([0, 6]),
        "softcap": 2.0, "sinks": torch.zeros(2), "dropout_p": 0.5,
    }  # fmt: skip
    for name in ("old", "old_products", "old_and_pinned"):
        assert statuses[name].runs_here
        output = attnreg.local_attention(
            query, query, query, window, bias=torch.ones(6), key_lengths=lengths, backend=name
        )
        (gradient,) = torch.autograd.grad(output.sum(), query)
        assert gradient.any()
        for argument, given in more.items():
            call = {argument: given, "seed": torch.tensor([1])} if argument == "dropout_p" else {argument: given}
            if name != "old" and argument in ("softcap", "sinks", "dropout_p"):  # composed
                found = attnreg.local_attention(query, query, query, window, **call, backend=name)
                torch.testing.assert_close(
                    found, attnreg.local_attention(query, query, query, window, **call, backend="torch")
                )
                continue
            with pytest.raises(attnreg.BackendError, match=f"{argument} is given; it takes bias, .*key_lengths"):
                attnreg.local_attention(query, query, query, window, **call, backend=name)
            # Nobody asked for it: another one runs the call.
            attnreg.local_attention(query, query, query, window, **call)
        with pytest.raises(attnreg.BackendError, match="key_starts is given; it takes bias, key_lengths"):
            attnreg.local_dot_product(query, query, window, key_starts=more["key_starts"], backend=name)


def test_the_example_plugin_is_installed_and_runs(example_site, discovered):
    discovered(example_site)
    (status,) = [status for status in attnreg.backends() if status.name == "example"]
    assert status.distribution == "attnreg-example 1.2.3"
    assert status.runs_here
    query, key = torch.randn(2, 2, 9, 4, requires_grad=True), torch.randn(2, 2, 9, 4)
    scores = attnreg.local_dot_product(query, key, Window(3, 2), backend="example")
    assert torch.allclose(scores, attnreg.local_dot_product(query, key, Window(3, 2), backend="torch"))
    scores.where(scores.isfinite(), 0).square().sum().backward()
    assert query.grad.abs().sum() > 0
    with pytest.raises(attnreg.BackendError, match="bias is given; it takes none"):
        attnreg.local_dot_product(query, key, Window(3, 2), bias=torch.zeros(1), backend="example")


def test_the_command_shows_a_plugin_and_a_fault_with_the_distributions_name(example_site, distribution):
    broken = distribution("raises", BROKEN["raises"][0])
    run = subprocess.run(
        [sys.executable, "-m", "attnreg", "backends"],
        env={"PATH": "", "PYTHONPATH": f"{example_site}:{broken}"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    for text in ("example", "attnreg-example 1.2.3", "plugged-raises 9.1", "OSError: no licence"):
        assert text in run.stdout


def test_the_core_names_no_backend():
    """Only pyproject.toml names the built-in packages; the core imports and mentions none of them, and no backend."""
    core = Path(attnreg.__file__).parent
    backends = {status.name for status in attnreg.backends()}
    packages = {path.name for path in (core.parent / "backends").iterdir()}
    # torch and triton are libraries as well, whose versions a table is stamped with and commands tell.
    libraries = {
        file: {"torch", "triton"} for file in (core / "tables" / "environment.py", *(core / "cli").glob("*.py"))
    }
    assert {"torch", "torch_block", "triton", "cublas_block"} <= backends
    for file in core.rglob("*.py"):
        text = file.read_text()
        named = {name for name in backends - libraries.get(file, set()) if f'"{name}"' in text or f"'{name}'" in text}
        assert not named | {name for name in packages if name in text}, file


def test_importing_attnreg_imports_no_backend_no_plugin_machinery_and_no_command():
    code = (
        "import sys, torch; before = set(sys.modules); import attnreg; new = set(sys.modules) - before;"
        "print(*sorted(new))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    new = run.stdout.split()
    assert "attnreg.functional" in new
    for module in ("triton", "attnreg_torch", "attnreg_triton", "attnreg_cublas", "pluggy", "typer", "rich"):
        assert module not in new
