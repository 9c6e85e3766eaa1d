"""A backend that is wrongly made is refused where it is made; one that misbehaves when it is asked costs only itself."""

from __future__ import annotations

import asyncio
import itertools

import pytest
import torch

import attnreg
from attnreg import Backend, Capability, Window
from attnreg.packages import package_version
from attnreg.printable import MOST_CHARACTERS, MOST_OF_A_REPORT, brief, told, type_name
from attnreg.registry import registry

QUERY = torch.randn(1, 1, 5, 4)
WINDOW = Window(1, 1)

NONSENSE = [64, 0.5, True, "cuda", b"cuda", "", torch.float32, object(), {}, set(), [], (), {"a": 1}, [None], [[64]], [64.0],
            [True], [0], [-1], ["64"], [torch.int32], ["cuda:0"], ["no such thing!"], [object()], range(0), range(9), lambda: 1]  # fmt: skip


def hostile(*_):
    raise RuntimeError("hostile")


class Int(int):
    __hash__ = int.__hash__
    __repr__ = __str__ = __format__ = __index__ = __int__ = __eq__ = __lt__ = __ge__ = __bool__ = hostile


class Str(str):
    __hash__ = str.__hash__
    __repr__ = __str__ = __format__ = __len__ = __getitem__ = __eq__ = isprintable = split = isidentifier = hostile


class Float(float):
    __repr__ = __str__ = __format__ = __float__ = __eq__ = __ne__ = __lt__ = __hash__ = hostile


class Panic(BaseException):
    """As a library in Rust raises it: no Exception."""


class Named(type):
    __name__ = property(hostile)


class Unshowable(Exception, metaclass=Named):
    def __str__(self):
        raise Panic("hostile")

    __repr__ = __str__


SOUND = {
    "dtypes": [],
    "devices": [],
    "head_dims": [],
    "window_sizes": [],
    "takes": [set(), [], (), range(0)],
    "grouped_heads": [True],
    "unequal_lengths": [True],
}


def dot(query, key, window, *, scale):
    return query.new_zeros((*query.shape[:3], window.size))


@pytest.mark.parametrize(
    ("field", "given"),
    [pair for pair in itertools.product(SOUND, NONSENSE) if not any(pair[1] is each or pair[1] == each for each in SOUND[pair[0]] if type(pair[1]) is type(each))],
    ids=lambda value: value if isinstance(value, str) and value in SOUND else None,
)  # fmt: skip
def test_a_capability_of_nonsense_is_refused_where_it_is_made(field, given):
    with pytest.raises((TypeError, ValueError), match=f"Capability: {field} "):
        Capability(**{"dtypes": {torch.float32}, field: given})


def test_a_capability_keeps_its_own_copy():
    sizes = [4]
    capability = Capability(dtypes=[torch.float32], head_dims=sizes)
    sizes.append(object())
    assert capability.head_dims == {4}
    assert Capability(dtypes=[torch.float32], window_sizes=range(1, 9)).window_sizes == range(1, 9)


def test_a_capability_takes_ranges_of_any_length_and_names_them():
    capability = Capability(
        dtypes=[torch.float32], head_dims=range(1, 10**30), window_sizes=range(4, 10**30, 2), takes=range(0)
    )
    backend = Backend(name="own", capability=capability, local_dot_product=dot)
    with attnreg.register(backend):
        decision = attnreg.explain(QUERY, QUERY, WINDOW, op="local_dot_product")
    (candidate,) = (each for each in decision.candidates if each.name == "own")
    assert candidate.refusals == (f"the window's size is 3; it takes 4 to {10**30 - 2} in steps of 2",)


def test_what_a_backend_is_made_of_has_no_methods_of_its_own():
    capability = Capability(
        dtypes=[torch.float32],
        devices=[Str("cpu")],
        head_dims=[Int(4)],
        window_sizes=[Int(3)],
        takes=[Str("bias")],
    )
    backend = Backend(
        name=Str("own"),
        capability=capability,
        summary=Str("it\x1b[2J"),
        local_dot_product=lambda query, key, window, *, bias, scale: None,
        options={Str("shade"): int},
        library=Str("torch"),
        rank=Float(3.5),
    )
    kept = backend.capability
    values = [*kept.devices, *kept.head_dims, *kept.window_sizes, *kept.takes, *backend.options, backend.name]
    assert {type(value) for value in [*values, backend.summary, backend.library]} == {int, str}
    assert values == ["cpu", 4, 3, "bias", "shade", "own"]
    assert (backend.summary, backend.library, backend.rank) == (r"it\x1b[2J", "torch", 3.5)
    assert type(Backend(name="own", capability=capability, local_dot_product=dot_of_all, rank=Int(5)).rank) is float


def dot_of_all(query, key, window, **given):
    return dot(query, key, window, scale=1.0)


def attention(query, key, value, window, *, scale, sinks):
    return query.clone(), query[..., 0].clone()


def attention_backward(*inputs, scale, sinks, needs_grad):
    return {}


@pytest.mark.parametrize(
    ("takes", "message"),
    [
        ({"sinks", "softcap"}, "attention does not accept softcap"),
        ({"dropout_p"}, "attention does not accept dropout_p"),
        ({"sinks", "grad_log_sum_exp"}, "attention_backward does not accept grad_log_sum_exp"),
        ({"grad_output"}, "Capability: takes has 'grad_output'; the ops' arguments are bias, cu_seqlens_k,"),
    ],
)
def test_functions_that_lack_what_the_capability_takes_are_refused_where_the_backend_is_made(takes, message):
    with pytest.raises((TypeError, ValueError), match=message):
        Backend(
            name="own",
            capability=Capability(dtypes={torch.float32}, takes=takes),
            local_attention=attention,
            local_attention_backward=attention_backward,
        )


def test_what_functions_name_is_what_a_backend_takes():
    def backward(*inputs, scale, sinks, grad_log_sum_exp, needs_grad):
        return {}

    def made(function):
        capability = Capability(dtypes={torch.float32})
        return Backend(name="own", capability=capability, local_attention=attention, local_attention_backward=function)

    assert made(None).taken == {"local_attention": {"sinks"}}
    assert made(attention_backward).taken == {"local_attention": {"sinks"}}
    assert made(backward).taken == {"local_attention": {"sinks", "grad_log_sum_exp"}}


class Unchecked(Capability):
    def __post_init__(self):
        pass


class UncheckedBackend(Backend):
    def __post_init__(self):
        pass


class Derived(Backend):
    taken = property(hostile)


def changed(given, **fields):
    for name, value in fields.items():
        object.__setattr__(given, name, value)
    return given


def sound(**fields):
    return Backend(
        **{"name": "own", "capability": Capability(dtypes={torch.float32}), "local_dot_product": dot, **fields}
    )


UNMADE = {
    "derived capability": lambda: sound(capability=Unchecked(dtypes=5)),
    "capability never made": lambda: sound(capability=Capability.__new__(Capability)),
    "changed capability": lambda: sound(capability=changed(Capability(dtypes={torch.float32}), head_dims=64)),
    "capability changed later": lambda: changed(sound(), capability=Unchecked(dtypes=5)),
    "derived": lambda: Derived(name="own", capability=Capability(dtypes={torch.float32}), local_dot_product=dot),
    "derived and unchecked": lambda: UncheckedBackend(name=None, capability=None),
    "never made": lambda: Backend.__new__(Backend),
    "changed": lambda: changed(sound(), options=None),
}


@pytest.mark.parametrize("make", UNMADE.values(), ids=UNMADE)
def test_what_was_not_made_as_it_should_be_is_not_registered(make):
    with pytest.raises(TypeError, match=r"must (be|map)"):
        attnreg.register(make())


def test_what_becomes_of_a_backend_after_it_was_registered_changes_nothing():
    backend = sound()
    with attnreg.register(backend) as handle:
        changed(backend, name=None, options=None, rank="first", library=5)
        changed(backend.capability, head_dims=64, dtypes=None)
        assert attnreg.local_dot_product(QUERY, QUERY, WINDOW, backend="own").shape == (1, 1, 5, 3)
        assert handle.backend.name == "own"
    assert "own" not in {status.name for status in attnreg.backends()}


@pytest.mark.parametrize(
    "fields",
    [{"capability": None}, {"rank": Unshowable}, {"library": object()}, {"taken": {}}, {"local_dot_product": None}],
)
def test_whatever_is_wrong_with_a_registered_backend_is_a_reason_against_it_alone(fields):
    with attnreg.register(sound(rank=-1)) as handle:
        changed(handle.backend, **fields)
        for name in ("torch", None, "-own"):
            query = torch.randn(1, 1, 5, 4)
            assert attnreg.local_dot_product(query, query, WINDOW, backend=name).isfinite().any()
            assert "own" in str(attnreg.explain(query, query, WINDOW, op="local_dot_product", backend=name))
        assert "own" in {status.name for status in attnreg.backends()}


def raising(error):
    def question(*_):
        raise error

    return question


MISBEHAVIOUR = [
    {question: raising(error)}
    for question in ("rank", "refuse", "unavailable", "prepare")
    for error in (
        RuntimeError("trouble"), SystemExit(3), KeyError(), AssertionError(), Panic("trouble"), GeneratorExit(), asyncio.CancelledError(),
        pytest.skip.Exception("skipped"), Unshowable(), RuntimeError("\x1b[2J"), RuntimeError("x" * 10**6),
    )
] + [
    {question: lambda *_, answer=answer: answer}
    for question in ("refuse", "unavailable", "prepare")
    for answer in ("", "\x1b[2J", "x" * 10**6, "\udcff", Str("no"), Unshowable(), Int(3))
] + [
    {"rank": lambda problem: float("nan")},
    {"rank": lambda problem: "first"},
    {"refuse": lambda problem: 5},
    {"refuse": lambda: None},
    {"unavailable": lambda: True},
    {"prepare": lambda: object()},
]  # fmt: skip


@pytest.mark.parametrize("fields", MISBEHAVIOUR, ids=lambda fields: next(iter(fields)))
def test_a_question_that_goes_wrong_refuses_its_backend_alone(fields):
    first = {"rank": -1.0} if "rank" not in fields else {}
    backend = Backend(
        name="wild", capability=Capability(dtypes={torch.float32}), local_dot_product=dot, **{**first, **fields}
    )
    with attnreg.register(backend):
        for name in ("torch", None):
            scores = attnreg.local_dot_product(QUERY, QUERY, WINDOW, backend=name)
            assert scores.isfinite().any()
        with pytest.raises(attnreg.BackendError, match="wild"):
            attnreg.local_dot_product(QUERY, QUERY, WINDOW, backend="wild")
        decision = attnreg.explain(QUERY, QUERY, WINDOW, op="local_dot_product")
        (candidate,) = (each for each in decision.candidates if each.name == "wild")
        (reason,) = candidate.refusals
        assert (
            next(iter(fields)) in reason or reason in (r"\x1b[2J", r"\udcff", "no") or len(reason) == MOST_OF_A_REPORT
        )
        assert reason.isprintable()
        assert len(reason) <= MOST_OF_A_REPORT
        assert str(decision).replace("\n", "").isprintable()
        statuses = {status.name: status for status in attnreg.backends()}
        assert statuses.keys() >= {"wild", "torch"}
        assert (statuses["wild"].reason or "").isprintable()


@pytest.mark.parametrize("question", ["rank", "refuse", "unavailable", "prepare", "workspace"])
def test_ctrl_c_in_a_question_goes_through_and_leaves_the_rest_as_it_was(question):
    with attnreg.register(sound(**{"rank": -1, question: raising(KeyboardInterrupt())})):
        with pytest.raises(KeyboardInterrupt):
            attnreg.local_dot_product(*torch.randn(2, 1, 1, 6, 4), WINDOW)
        assert "own" in {entry.backend.name for entry in registry.entries}
    assert attnreg.local_dot_product(QUERY, QUERY, WINDOW).isfinite().any()


@pytest.mark.parametrize(
    "error",
    [Panic("no"), Unshowable(), ValueError("\x1b[2J"), SystemExit(3)],
    ids=type_name,
)
def test_an_option_that_goes_wrong_refuses_its_backend_alone(error):
    with attnreg.register(sound(options={"shade": raising(error)})):
        with pytest.raises(attnreg.BackendError, match="the option shade is '1': ") as raised:
            attnreg.local_dot_product(QUERY, QUERY, WINDOW, backend="own:shade=1")
        assert "\x1b" not in str(raised.value)
        assert (
            attnreg.explain(QUERY, QUERY, WINDOW, op="local_dot_product", backend=["own:shade=1", "torch"]).backend
            == "torch"
        )


def test_a_report_of_several_lines_keeps_them():
    with (
        attnreg.register(sound(prepare=lambda: "building failed:\n  nvcc\x1b[0m says no")),
        pytest.raises(attnreg.BackendError, match=r"building failed:\n  nvcc\\x1b\[0m says no"),
    ):
        attnreg.local_dot_product(QUERY, QUERY, WINDOW, backend="own")


@pytest.mark.parametrize(
    "error",
    [Unshowable(), Panic(Str("no")), ValueError("x" * 10**6), OSError("\x1b[2J\n\u202e"), KeyError()],
    ids=type_name,
)
def test_an_exception_is_told_whatever_it_does_when_it_is_asked(error):
    assert told(error).isprintable()
    assert len(told(error)) <= MOST_CHARACTERS
    assert brief(error).isprintable()
    assert len(brief(error)) < 200


@pytest.mark.parametrize(
    ("field", "given"),
    [
        *[("rank", rank) for rank in (float("nan"), "1", True, 10**400)],
        *[("library", library) for library in (5, "", " ", "a\0b", "../torch", "\udcff", "\x1b[31m")],
        *[("differentiable", 1), ("summary", 5), ("options", {"a b": int}), ("options", 5)],
    ],
    ids=type_name,
)
def test_a_backend_of_nonsense_is_refused_where_it_is_made(field, given):
    with pytest.raises(TypeError, match=field):
        Backend(name="own", capability=Capability(dtypes={torch.float32}), local_dot_product=dot, **{field: given})


@pytest.mark.parametrize("name", ["-own", "-", "", "a b", "a\n", 5, Unshowable()], ids=type_name)
def test_a_name_that_cannot_be_asked_for_is_refused(name):
    with pytest.raises(ValueError, match=r"which excludes a backend|letters, digits"):
        sound(name=name)


@pytest.mark.parametrize("contract", [True, 2.0, Int(2), 3, Unshowable()], ids=type_name)
def test_a_backend_for_another_contract_is_refused(contract):
    with pytest.raises(ValueError, match="it is written for contract "):
        sound(contract=contract)


@pytest.mark.parametrize("package", ["", " ", "a\0b", "\udcff", "no-such-package"])
def test_what_is_no_package_has_no_version(package):
    assert package_version(package) is None


@pytest.mark.parametrize(
    ("written", "on"), [("", 0), ("0", 0), ("false", 0), ("OFF", 0), ("no", 0), ("1", 1), ("True", 1)]
)
def test_the_switch_of_autotune_is_read_as_it_is_meant(monkeypatch, written, on):
    monkeypatch.setenv("ATTNREG_AUTOTUNE", written)
    assert registry.autotunes is bool(on)


def test_a_switch_that_is_neither_on_nor_off_is_an_error(monkeypatch):
    monkeypatch.setenv("ATTNREG_AUTOTUNE", "perhaps")
    with pytest.raises(ValueError, match=r"ATTNREG_AUTOTUNE must be 1 or 0 .*, got 'perhaps'"):
        attnreg.local_dot_product(QUERY.double(), QUERY.double(), Window(1, 3))
