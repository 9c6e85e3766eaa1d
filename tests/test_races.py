"""What happens while something else happens: registration, removal, forks, Ctrl-C, requests closed out of order."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import textwrap
import threading
import weakref

import pytest
import torch

import attnreg
from attnreg import Backend, Capability, Window
from attnreg.registry import registry

QUERY = torch.randn(1, 1, 6, 4)
WINDOW = Window(2, 1)


def painter(name: str, mark: float, **options) -> Backend:
    def local_dot_product(query, key, window, *, scale):
        return query.new_full((*query.shape[:3], window.size), mark)

    return Backend(
        name=name, capability=Capability(dtypes={torch.float32}), local_dot_product=local_dot_product, **options
    )


def painted(**options) -> float:
    return attnreg.local_dot_product(QUERY, QUERY, WINDOW, **options)[0, 0, 0, 0].item()


def test_a_plan_made_while_a_backend_is_registered_is_not_kept():
    """The rank of the first is asked while a plan is made: in that moment the second, better one comes."""
    handles = []

    def rank(problem):
        if not handles:
            handles.append(attnreg.register(painter("second", 2.0, rank=-2)))
        return -1

    with attnreg.register(painter("first", 1.0, rank=rank)):
        painted()
        decision = attnreg.explain(QUERY, QUERY, WINDOW, op="local_dot_product")
        assert decision.backend == "second"
        assert painted() == 2.0
    handles[0].remove()


def test_a_backend_that_is_removed_while_its_plan_is_made_is_replaced():
    handles = []

    def rank(problem):
        handles[0].remove()
        return -1

    handles.append(attnreg.register(painter("fleeting", 1.0, rank=rank)))
    with attnreg.register(painter("lasting", 2.0, rank=0)):
        assert painted() == 2.0


def test_calls_go_on_while_backends_come_and_go():
    stop, errors = threading.Event(), []

    def call():
        while not stop.is_set():
            try:
                painted()
            except Exception as error:
                errors.append(error)

    threads = [threading.Thread(target=call) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(50):
        with attnreg.register(painter("passing", 1.0, rank=-1)):
            painted()
    stop.set()
    for thread in threads:
        thread.join()
    assert not errors


def test_the_backward_of_a_forward_stays_with_its_backend_when_the_name_is_taken_anew():
    def backend(mark):
        def backward(grad_scores, query, key, window, *, scale, needs_grad):
            return {name: torch.full_like({"query": query, "key": key}[name], mark) for name in needs_grad}

        return painter("again", mark, local_dot_product_backward=backward)

    query = QUERY.clone().requires_grad_()
    with attnreg.register(backend(1.0)):
        output = attnreg.local_dot_product(query, QUERY, WINDOW, backend="again")
    with attnreg.register(backend(2.0)):
        output.sum().backward()
        assert painted(backend="again") == 2.0
    assert (query.grad == 1.0).all()


def run_python(source: str, *folders) -> str:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*map(str, folders), *filter(None, sys.path)])}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(source)], capture_output=True, text=True, env=environment, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def write_plug_in(folder, name: str, source: str) -> None:
    """A distribution with one module, which is its entry point."""
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[attnreg]\n{name} = {name}\n")
    (folder / f"{name}.py").write_text(textwrap.dedent(source))


@pytest.fixture
def interrupting(tmp_path):
    """A plug-in whose hook runs ``builtins.interrupt`` before it offers its backend."""
    write_plug_in(
        tmp_path,
        "interrupting",
        """
        import builtins, torch
        from attnreg import Backend, Capability, hookimpl

        @hookimpl
        def attnreg_backends():
            builtins.interrupt()
            capability = Capability(dtypes={torch.float32})
            yield Backend(name="interrupting", capability=capability, local_dot_product=lambda *_, scale: None)
        """,
    )
    return tmp_path


def test_ctrl_c_during_discovery_leaves_it_to_the_next_need(interrupting):
    found = run_python(
        """
        import builtins, sys
        calls = []
        def interrupt():
            calls.append(1)
            if len(calls) == 1:
                raise KeyboardInterrupt
        builtins.interrupt = interrupt
        import attnreg
        try:
            attnreg.backends()
        except KeyboardInterrupt:
            print("interrupted")
        print(*(status.name for status in attnreg.backends()))
        """,
        interrupting,
    )
    first, second = found.splitlines()
    assert first == "interrupted"
    assert {"torch", "torch_block", "interrupting"} <= set(second.split())


def test_a_fork_during_discovery_leaves_the_child_its_backends(interrupting):
    """Another thread discovers while the main one forks: the child has to begin anew."""
    found = run_python(
        """
        import builtins, os, threading
        inside, done = threading.Event(), threading.Event()
        def interrupt():
            if not inside.is_set():
                inside.set()
                done.wait(60)
        builtins.interrupt = interrupt
        import attnreg
        thread = threading.Thread(target=attnreg.backends)
        thread.start()
        inside.wait(60)
        child = os.fork()
        if child == 0:
            names = {status.name for status in attnreg.backends()}
            os._exit(0 if {"torch", "torch_block"} <= names else 1)
        done.set()
        thread.join()
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        """,
        interrupting,
    )
    assert found.split() == ["0"]


def test_requests_closed_out_of_order_leave_the_others():
    first, second = attnreg.use_backend("torch"), attnreg.use_backend("torch_block")

    def chosen():
        return attnreg.explain(QUERY, QUERY, QUERY, WINDOW)

    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert chosen().backend == "torch_block"
    assert "use_backend" in chosen().reason
    second.__exit__(None, None, None)
    assert "use_backend" not in chosen().reason
    with first, second, first:
        assert chosen().backend == "torch"
    assert "use_backend" not in chosen().reason


def test_reset_forgets_and_what_runs_goes_on():
    query = QUERY.clone().requires_grad_()
    output = attnreg.local_attention(query, QUERY, QUERY, WINDOW)
    attnreg.reset()
    assert not registry.plans
    output.sum().backward()
    assert query.grad is not None


def test_a_backend_may_be_registered_by_a_module_that_another_thread_discovers(tmp_path):
    """One thread imports the plug-in's module, which registers a backend; the other finds its entry point meanwhile."""
    write_plug_in(
        tmp_path,
        "slow_plugin",
        """
        import builtins, time, attnreg, torch
        builtins.imported.set()
        time.sleep(1)
        def dot(query, key, window, *, scale):
            return query.new_zeros((*query.shape[:3], window.size))
        def backend(name):
            return attnreg.Backend(name=name, capability=attnreg.Capability(dtypes={torch.float32}), local_dot_product=dot)
        attnreg.register(backend("by_hand"))
        @attnreg.hookimpl
        def attnreg_backends():
            yield backend("by_hook")
        """,
    )
    names = run_python(
        """
        import builtins, faulthandler, importlib, threading
        faulthandler.dump_traceback_later(60, exit=True)
        import attnreg
        builtins.imported = threading.Event()
        thread = threading.Thread(target=importlib.import_module, args=("slow_plugin",))
        thread.start()
        builtins.imported.wait()
        attnreg.backends()
        thread.join()
        print(*[status.name for status in attnreg.backends()])
        """,
        tmp_path,
    ).split()
    assert {"by_hand", "by_hook", "torch"} <= set(names)


def test_a_backend_that_is_being_prepared_holds_no_other_up():
    started, go_on = threading.Event(), threading.Event()

    def prepare():
        started.set()
        go_on.wait(60)

    with attnreg.register(painter("slow", 1.0, prepare=prepare)), attnreg.register(painter("quick", 2.0)):
        thread = threading.Thread(target=painted, kwargs={"backend": "slow"})
        thread.start()
        started.wait(60)
        assert painted(backend="quick") == 2.0
        go_on.set()
        thread.join()


def test_a_reset_while_plug_ins_are_found_loses_none(interrupting):
    """Another thread resets in the midst; what is found then is found again."""
    names = run_python(
        """
        import builtins, threading
        import attnreg
        def interrupt():
            builtins.interrupt = lambda: None
            thread = threading.Thread(target=attnreg.reset)
            thread.start()
            thread.join()
        builtins.interrupt = interrupt
        first = attnreg.backends()
        print(*sorted(status.name for status in attnreg.backends()))
        """,
        interrupting,
    ).split()
    assert {"torch", "torch_block"} <= set(names)
    assert len(names) == len(set(names))


def test_a_backend_that_was_removed_is_not_kept_alive():
    def use():
        backend = painter("fleeting", 1.0)
        with attnreg.register(backend):
            painted(backend="fleeting")
        return weakref.ref(backend)

    gone = use()
    gc.collect()
    assert gone() is None


def test_a_backend_that_becomes_unavailable_is_not_chosen_for_a_new_shape():
    here = [None]
    with attnreg.register(painter("coming", 1.0, rank=-1, unavailable=lambda: here[0])):
        assert painted() == 1.0
        here[0] = "it has gone"
        longer = torch.randn(1, 1, 7, 4)
        assert attnreg.explain(longer, longer, WINDOW, op="local_dot_product").backend != "coming"
        assert attnreg.local_dot_product(longer, longer, WINDOW)[0, 0, 0, 2].item() != 1.0


@pytest.mark.parametrize("hooks", ["copied", "as they are"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_the_backward_runs_on_the_backend_of_its_forward_whatever_becomes_of_saved_tensors(compiled, hooks):
    def backend(name, mark, rank):
        def backward(grad_scores, query, key, window, *, scale, needs_grad):
            return {name: torch.full_like({"query": query, "key": key}[name], mark) for name in needs_grad}

        return painter(name, mark, local_dot_product_backward=backward, rank=rank)

    def call(query):
        return attnreg.local_dot_product(query, QUERY, WINDOW)

    query = QUERY.clone().requires_grad_()
    if compiled:
        call = torch.compile(call, backend="aot_eager", fullgraph=True)
    with attnreg.register(backend("asked", 1.0, 50)), attnreg.register(backend("best", 2.0, -1)):
        with (
            attnreg.use_backend("asked"),
            torch.autograd.graph.saved_tensors_hooks(
                torch.clone if hooks == "copied" else lambda tensor: tensor, lambda tensor: tensor
            ),
        ):
            scores = call(query)
        scores.sum().backward()
    assert (scores == 1.0).all()
    assert (query.grad == 1.0).all()
