"""Where the tests run: every backend that can, on the CPU, in Triton's interpreter, or on a GPU with ``-m gpu``."""

from __future__ import annotations

import os

import torch

# Before anything imports triton: without a GPU its kernels run in the interpreter. cuBLAS is deterministic only if told so.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
os.environ.pop("ATTNREG_BACKEND", None)
os.environ.pop("ATTNREG_TABLE", None)
os.environ.pop("ATTNREG_AUTOTUNE", None)

import pytest
from interpreted import run_faster

import attnreg


@pytest.fixture(autouse=True)
def _fresh_registry_after_each_test():
    """What a test registers or breaks is gone after it."""
    yield
    if any(status.distribution == "this process" for status in attnreg.backends()):
        attnreg.reset()


@pytest.fixture(scope="session", autouse=True)
def _no_tables(tmp_path_factory):
    """Neither what somebody tuned on this machine nor what is shipped decides in a test; builds stay where they are."""
    from attnreg.tables import store

    folder = tmp_path_factory.mktemp("tables")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "table_dir", lambda: folder)
        patch.setattr(store, "SHIPPED", folder / "shipped")
        yield


@pytest.fixture(scope="session", autouse=True)
def _interpreted_triton_runs_faster():
    with pytest.MonkeyPatch.context() as patch:
        if os.environ.get("TRITON_INTERPRET") == "1":
            run_faster(patch)
        yield


@pytest.fixture
def torch_alone(monkeypatch):
    """Of what can run on a CPU, the backends in PyTorch: ``torch_block`` is the default, on every machine.

    ``attnreg_cpu`` needs a compiler; Triton's interpreter is slow, and off in child processes too.
    """
    from attnreg.registry import registry

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    attnreg.reset()
    for entry in registry.entries:
        if entry.backend.name in ("attnreg_cpu", "triton"):
            registry.remove(entry.backend)
    yield
    attnreg.reset()


@pytest.fixture
def library_for_cpus():
    """The library of ``attnreg_cpu`` is loaded and runs its best kernels. Where there is a compiler, one that fails is a fault."""
    from attnreg_cpu import build

    reason = build.prepare()
    if reason is not None:
        (pytest.skip if build.LIBRARY.find_compiler() is None else pytest.fail)(reason)
    yield
    build.choose_isa("")


@pytest.fixture
def folder(tmp_path, monkeypatch, torch_alone):
    """The user's tables lie here, and none is shipped."""
    from attnreg.registry import registry
    from attnreg.tables import store

    monkeypatch.setattr(store, "table_dir", lambda: tmp_path / "tables")
    monkeypatch.setattr(store, "SHIPPED", tmp_path / "shipped")
    registry.tables.forget()
    registry.look_at_tables()
    return tmp_path / "tables"


@pytest.fixture
def as_set():
    """Torch's settings are afterwards what they were."""
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    yield
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(precision)


@pytest.fixture
def poisoned_memory():
    """Uninitialised memory holds NaN: an element that nobody writes shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all(), "torch no longer fills uninitialised memory with NaN"
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem):
    """A backend that has every op of its own must run every case; one that is an adapter for some op may refuse.

    Then its refusal is the reason to skip. Whether such a refusal is right is held by tests of the adapters themselves.
    """
    try:
        return (yield)
    except attnreg.BackendError as error:
        values = getattr(pyfuncitem, "callspec", None)
        adapters = {
            status.name
            for status in attnreg.backends()
            if status.backend is not None and len(status.backend.own_ops) < 3
        }
        asked = adapters & {value for value in (values.params.values() if values else ()) if isinstance(value, str)}
        if any(f"backend {name!r}, asked for by" in str(error) for name in asked):
            pytest.skip(f"refused: {' '.join(str(error).splitlines()[1:])}")
        raise
