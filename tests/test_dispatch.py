"""Which backend runs a call: precedence, filters, and a trace that says why."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import threading
import weakref

import pytest
import torch

import attnreg
from attnreg import Backend, BackendError, Capability, Window, asking, use_backend

pytestmark = pytest.mark.usefixtures("torch_alone")

QUERY = torch.randn(1, 2, 6, 4)
WINDOW = Window(2, 1)


def chosen(**options) -> str:
    return attnreg.explain(QUERY, QUERY, QUERY, WINDOW, **options).backend


def marked(mark: float):
    """A dot product that shows who computed it."""

    def local_dot_product(query, key, window, *, bias, key_lengths, scale):
        return query.new_full((*query.shape[:3], window.size), mark)

    return local_dot_product


def backend(name: str, mark: float = 1.0, **options) -> Backend:
    return Backend(
        name=name,
        capability=options.pop("capability", Capability(dtypes={torch.float32})),
        local_dot_product=marked(mark),
        **options,
    )


def test_nothing_asked_for_means_the_heuristic():
    decision = attnreg.explain(QUERY, QUERY, QUERY, WINDOW)
    assert decision.backend == "torch_block"
    assert "heuristic" in decision.reason


def test_the_argument_goes_before_the_block_and_the_block_before_the_environment(monkeypatch):
    monkeypatch.setenv("ATTNREG_BACKEND", "torch_block")
    assert chosen() == "torch_block"
    assert "ATTNREG_BACKEND" in attnreg.explain(QUERY, QUERY, QUERY, WINDOW).reason
    with use_backend("torch"):
        assert chosen() == "torch"
        assert chosen(backend="torch_block") == "torch_block"
    assert chosen() == "torch_block"


def test_the_environment_is_read_at_every_call(monkeypatch):
    with attnreg.register(backend("a", 1.0)), attnreg.register(backend("b", 2.0)):
        for name, mark in (("a", 1.0), ("b", 2.0), ("a", 1.0)):
            monkeypatch.setenv("ATTNREG_BACKEND", name)
            assert (attnreg.local_dot_product(QUERY, QUERY, WINDOW) == mark).all()
        monkeypatch.setenv("ATTNREG_BACKEND", "")
        assert chosen() == "torch_block"


def test_an_unknown_name_lists_those_that_there_are(monkeypatch):
    with (
        pytest.raises(BackendError, match=r"'nonesuch', asked for by use_backend; registered:.*torch"),
        use_backend("nonesuch"),
    ):
        pass
    monkeypatch.setenv("ATTNREG_BACKEND", "nonesuch")
    with pytest.raises(BackendError, match="'nonesuch', asked for by the environment variable ATTNREG_BACKEND"):
        attnreg.local_attention(QUERY, QUERY, QUERY, WINDOW)


def test_the_innermost_block_counts_and_the_outer_one_is_back_after_it():
    with use_backend("torch"):
        with use_backend("torch_block"):
            assert chosen() == "torch_block"
        assert chosen() == "torch"
    assert "heuristic" in attnreg.explain(QUERY, QUERY, QUERY, WINDOW).reason


def test_a_block_ends_with_an_exception_too():
    with pytest.raises(RuntimeError, match="inside"), use_backend("torch"):
        raise RuntimeError("inside")
    assert chosen() == "torch_block"


def test_use_backend_is_a_decorator_of_functions_and_coroutines():
    @use_backend("torch")
    def plain():
        return chosen()

    @use_backend("torch")
    async def coroutine():
        await asyncio.sleep(0)
        return chosen()

    assert plain() == "torch"
    assert plain.__name__ == "plain"
    assert asyncio.run(coroutine()) == "torch"
    assert chosen() == "torch_block"


def _generator():
    with use_backend("torch"):
        yield chosen()
        yield chosen()


async def _async_generator():
    with use_backend("torch"):
        yield chosen()
        await asyncio.sleep(0)
        yield chosen()
        yield await asyncio.to_thread(chosen)
        yield (await asyncio.gather(_chosen_in_task(), _chosen_in_task()))[0]


async def _chosen_in_task():
    await asyncio.sleep(0)
    return chosen()


def test_a_block_in_a_generator_counts_for_the_generator_alone():
    def delegates():
        yield from _generator()

    for generator in (_generator(), delegates()):
        seen = [(inside, chosen()) for inside in generator]
        assert seen == [("torch", "torch_block")] * 2
    with use_backend("torch"):
        (first, *_) = ((inside, chosen()) for inside in _in_the_other())
        assert first == ("torch_block", "torch")
    assert chosen() == "torch_block"


def _in_the_other():
    with use_backend("torch_block"):
        yield chosen()


def test_a_block_in_an_async_generator_counts_for_it_and_for_the_tasks_and_threads_that_it_waits_for():
    async def consumer():
        seen = []
        async for inside in _async_generator():
            seen.append((inside, chosen()))
            await asyncio.sleep(0)
            seen[-1] = (*seen[-1], chosen())
        return seen

    assert asyncio.run(consumer()) == [("torch", "torch_block", "torch_block")] * 4


def test_a_generator_that_goes_on_elsewhere_leaves_nothing_behind_and_takes_nothing_away():
    shared = use_backend("torch")

    def generator():
        with shared:
            with shared:
                yield
            yield

    def in_a_thread(function):
        thread = threading.Thread(target=function)
        thread.start()
        thread.join()

    finished, closed = generator(), generator()
    next(finished)
    next(closed)
    seen = []

    def close():
        with shared:
            closed.close()
            seen.append(chosen())
        seen.append(chosen())

    in_a_thread(lambda: list(finished))
    in_a_thread(close)
    assert seen == ["torch", "torch_block"]
    assert chosen() == "torch_block"
    with shared:
        pass
    assert asking.wishes.get() is None
    assert not shared._blocks

    async def main():
        asynchronous = _async_generator()
        await anext(asynchronous)
        await asyncio.create_task(asynchronous.aclose())
        return chosen(), await asyncio.create_task(_chosen_in_task())

    assert asyncio.run(main()) == ("torch_block", "torch_block")


def test_a_block_in_a_suspended_generator_keeps_nothing_alive():
    class Large:
        pass

    def generator():
        large = Large()
        alive.append(weakref.ref(large))
        with use_backend("torch"):
            yield

    alive = []
    dropped, closed = generator(), generator()
    next(dropped)
    next(closed)
    del dropped
    thread = threading.Thread(target=closed.close)
    thread.start()
    thread.join()
    del closed
    assert [each() for each in alive] == [None, None]


@pytest.fixture
def torch_asked_for():
    with use_backend("torch"):
        yield


@pytest.mark.usefixtures("torch_asked_for")
def test_a_fixture_asks_for_its_test():
    assert chosen() == "torch"


def test_a_generator_of_contextlib_asks_for_the_block_around():
    @contextlib.contextmanager
    def manager():
        with use_backend("torch"):
            yield

    @contextlib.asynccontextmanager
    async def async_manager():
        with use_backend("torch"):
            yield

    async def main():
        async with async_manager():
            return chosen(), await asyncio.create_task(_chosen_in_task())

    with manager():
        assert chosen() == "torch"
    assert asyncio.run(main()) == ("torch", "torch")
    assert chosen() == "torch_block"


class _Callable:
    def __call__(self):
        yield


class _AsyncCallable:
    async def __call__(self):
        return chosen()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (_generator, "the generator function _generator"),
        (_async_generator, "the generator function _async_generator"),
        (functools.partial(functools.partial(_generator)), "the generator function _generator"),
        (_Callable(), "the generator function _Callable"),
        (5, r"use_backend decorates functions, got 5 \(int\)"),
        (_Callable, "_Callable is a class: decorate its methods"),
        (staticmethod(chosen), "write @staticmethod above @use_backend"),
        (classmethod(chosen), "write @classmethod above @use_backend"),
        (property(chosen), "write @property above @use_backend"),
    ],
)
def test_what_no_block_can_be_put_around_is_not_decorated(given, message):
    with pytest.raises(TypeError, match=message):
        use_backend("torch")(given)


def test_an_object_whose_call_is_a_coroutine_is_decorated_as_one():
    for function in (_AsyncCallable(), functools.partial(_AsyncCallable()), _AsyncCallable().__call__):
        assert asyncio.run(use_backend("torch")(function)()) == "torch"


@pytest.mark.parametrize(
    ("function", "kind"),
    [
        (lambda: _generator(), "a generator"),
        (lambda: _async_generator(), "an async generator"),
        (lambda: _chosen_in_task(), "a coroutine"),
    ],
)
def test_a_decorated_function_must_not_return_what_would_run_outside_the_block(function, kind):
    with pytest.raises(TypeError, match=f"returned {kind}, which would run outside the block"):
        use_backend("torch")(function)()
    assert chosen() == "torch_block"


def test_threads_and_tasks_do_not_see_each_others_blocks():
    seen = []
    with use_backend("torch"):
        thread = threading.Thread(target=lambda: seen.append(chosen()))
        thread.start()
        thread.join()
    assert seen == ["torch_block"]

    shared = use_backend("torch")

    async def inside(turn: asyncio.Event, other: asyncio.Event):
        with shared:
            turn.set()
            await other.wait()
            return chosen()

    async def outside(turn: asyncio.Event, other: asyncio.Event):
        await turn.wait()
        name = chosen()
        other.set()
        return name

    async def both():
        turn, other = asyncio.Event(), asyncio.Event()
        return await asyncio.gather(inside(turn, other), outside(turn, other))

    assert asyncio.run(both()) == ["torch", "torch_block"]


def test_a_forced_backend_that_cannot_run_a_call_raises_with_every_reason():
    narrow = Capability(
        dtypes={torch.float16}, devices={"cuda"}, head_dims=range(8, 65), window_sizes=range(1, 3), takes=(),
        grouped_heads=False, unequal_lengths=False,
    )  # fmt: skip
    with attnreg.register(backend("narrow", capability=narrow, unavailable=lambda: "no such machine")):
        with pytest.raises(BackendError) as raised:
            attnreg.local_dot_product(
                QUERY.requires_grad_(), torch.randn(1, 1, 7, 4), WINDOW, bias=torch.zeros(1),
                key_lengths=torch.tensor([3]), backend="narrow",
            )  # fmt: skip
        QUERY.requires_grad_(False)
    for reason in (
        "asked for by the argument backend=",
        "gradients are needed and it has no local_dot_product_backward",
        "the device is cpu; it takes cuda",
        "the dtype is float32; it takes float16",
        "the head_dim of query and key is 4; it takes 8 to 64",
        "the window's size is 4; it takes 1 to 2",
        "bias is given; it takes none",
        "key_lengths is given",
        "H = 2 and Hkv = 1 differ",
        "Lq = 6 and Lk = 7 differ",
        "no such machine",
    ):
        assert reason in str(raised.value)


def test_an_op_that_a_backend_lacks_is_a_reason():
    with attnreg.register(backend("dot_only")), pytest.raises(BackendError, match="it has no local_attention"):
        attnreg.local_attention(QUERY, QUERY, QUERY, WINDOW, backend="dot_only")


def test_where_no_backend_can_run_a_call_the_error_lists_each_with_its_reasons():
    strange = torch.zeros(1, 1, 2, 4, dtype=torch.float8_e4m3fn)
    with pytest.raises(BackendError, match="no backend can run") as raised:
        attnreg.local_attention(strange, strange, strange, WINDOW)
    for status in attnreg.backends():
        assert f"{status.name}:" in str(raised.value)
    assert "the dtype is float8_e4m3fn" in str(raised.value)


def test_the_lowest_rank_is_taken_and_a_tie_goes_by_name():
    with attnreg.register(backend("zebra", rank=1.0)), attnreg.register(backend("ant", rank=lambda problem: 1.0)):
        assert attnreg.explain(QUERY, QUERY, WINDOW, op="local_dot_product").backend == "ant"


def test_the_rank_may_depend_on_the_problem():
    small_windows_first = backend("small", rank=lambda problem: 1.0 if problem.window.size < 4 else 99.0)
    with attnreg.register(small_windows_first):
        assert attnreg.explain(query=QUERY, key=QUERY, window=Window(1, 1)).backend == "small"
        assert attnreg.explain(query=QUERY, key=QUERY, window=Window(5, 5)).backend == "torch_block"


def test_registering_and_removing_takes_effect_on_the_next_call():
    before = attnreg.local_dot_product(QUERY, QUERY, WINDOW)
    handle = attnreg.register(backend("first", 7.0, rank=0))
    assert (attnreg.local_dot_product(QUERY, QUERY, WINDOW) == 7.0).all()
    handle.remove()
    assert torch.equal(attnreg.local_dot_product(QUERY, QUERY, WINDOW), before)
    handle.remove()
    with pytest.raises(BackendError, match="no backend is called 'first'"):
        attnreg.local_dot_product(QUERY, QUERY, WINDOW, backend="first")


def test_a_name_can_be_taken_only_once():
    with pytest.raises(ValueError, match="'torch' is taken by the backend of attnreg"):
        attnreg.register(backend("torch"))
    with pytest.raises(TypeError, match=r"must be an attnreg\.Backend"):
        attnreg.register("torch")


def test_a_backend_is_prepared_once_and_only_before_its_first_use():
    calls = []
    with attnreg.register(backend("slow_start", prepare=lambda: calls.append(1))):
        attnreg.explain(QUERY, QUERY, WINDOW, op="local_dot_product", backend="slow_start")
        assert not calls
        for _ in range(3):
            attnreg.local_dot_product(QUERY, QUERY, Window(_, 0), backend="slow_start")
        assert calls == [1]


def test_a_failed_preparation_refuses_the_backend_with_its_reason_and_never_falls_back_where_it_was_forced():
    failing = backend("failing", rank=0, prepare=lambda: "the compiler said no")
    with attnreg.register(failing):
        with pytest.raises(BackendError, match="the compiler said no"):
            attnreg.local_dot_product(QUERY, QUERY, WINDOW, backend="failing")
        decision = attnreg.explain(QUERY, QUERY, WINDOW, op="local_dot_product")
        assert decision.backend == "torch_block"
        assert "the compiler said no" in str(decision)


def test_a_backends_own_functions_that_raise_are_reasons_not_exceptions():
    def broken(*_):
        raise OSError("driver gone")

    for field in ("unavailable", "refuse", "rank"):
        with attnreg.register(backend("broken", **{field: broken})):
            with pytest.raises(BackendError, match="driver gone"):
                attnreg.local_dot_product(QUERY, QUERY, WINDOW, backend="broken")
            assert attnreg.local_dot_product(QUERY, QUERY, WINDOW).shape == (1, 2, 6, 4)


def test_the_trace_names_the_problem_the_choice_and_every_other_candidate():
    trace = str(attnreg.explain(QUERY, QUERY, QUERY, WINDOW, backend="torch"))
    for part in ("local_attention on cpu, float32", "Window(left=2, right=1), W=4", "-> torch: forced by the argument"):
        assert part in trace
    for status in attnreg.backends():
        assert status.name in trace


def test_what_a_backend_lacks_is_composed_of_its_products():
    """A stranger with two products, forward and backward, gets local_attention and its gradients from the core."""
    from attnreg_torch import block

    products = Backend(
        name="products",
        capability=Capability(dtypes={torch.float32, torch.bfloat16}),
        local_dot_product=block.local_dot_product,
        local_dot_product_backward=block.local_dot_product_backward,
        local_weighted_average=block.local_weighted_average,
        local_weighted_average_backward=block.local_weighted_average_backward,
    )
    with attnreg.register(products):
        results = []
        for name in ("products", "torch"):
            tensors = [QUERY.clone().requires_grad_() for _ in range(3)]
            bias = torch.arange(4.0).requires_grad_()
            output = attnreg.local_attention(*tensors, WINDOW, bias=bias, key_lengths=torch.tensor([3]), backend=name)
            output.backward(torch.arange(output.numel()).view(output.shape) / 10)
            results.append([output.detach(), *(tensor.grad for tensor in (*tensors, bias))])
    for composed, expected in zip(*results):
        assert torch.allclose(composed, expected, atol=1e-5)


def test_a_differentiable_backend_needs_no_backward():
    from attnreg_torch import naive

    forward_only = Backend(
        name="forward_only",
        capability=Capability(dtypes={torch.float32}),
        local_dot_product=naive.local_dot_product,
        local_weighted_average=naive.local_weighted_average,
        differentiable=True,
    )
    with attnreg.register(forward_only):
        query = QUERY.clone().requires_grad_()
        attnreg.local_attention(query, query, query, WINDOW, backend="forward_only").square().sum().backward()
        expected = QUERY.clone().requires_grad_()
        attnreg.local_attention(expected, expected, expected, WINDOW, backend="torch").square().sum().backward()
    assert torch.allclose(query.grad, expected.grad, atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"name": "two words"}, ValueError, "name must be"),
        ({"capability": {"dtypes": ()}}, TypeError, "capability must be a Capability"),
        ({"local_dot_product": "function"}, TypeError, "local_dot_product must be callable, got 'function'"),
        ({"local_dot_product": None}, ValueError, "has no op"),
        ({"local_weighted_average_backward": marked(1.0)}, ValueError, "without local_weighted_average"),
        ({"rank": "high"}, TypeError, "rank must be a number or callable"),
        ({"library": 4}, TypeError, "library must be the name of a distribution, got 4"),
    ],
)
def test_a_backend_put_together_wrongly_says_so(fields, error, message):
    given = {
        "name": "x",
        "capability": Capability(dtypes={torch.float32}),
        "local_dot_product": marked(1.0),
        **fields,
    }
    with pytest.raises(error, match=message):
        Backend(**given)


def test_lengths_that_never_repeat_do_not_fill_the_memory(monkeypatch):
    from attnreg import plan
    from attnreg.registry import registry

    monkeypatch.setattr(plan, "MOST_PLANS", 5)
    for length in range(1, 20):
        attnreg.local_dot_product(QUERY[:, :, :1].expand(1, 2, length, 4), QUERY, WINDOW)
    assert len(registry.plans) <= 5
