"""Which weights are dropped: by a written law, the same on every backend and every path, and drawn anew where no seed is given."""

from __future__ import annotations

import pytest
import torch
from composed import composed
from running import runs
from torch.utils.checkpoint import checkpoint

import attnreg
from attnreg import LocalAttention, Window, local_attention
from attnreg.dropout import kept, threshold, words

WINDOW = Window(3, 2)
SEED = torch.tensor([0x0123456789ABCDEF])


def tensors(length=16, batch=1, heads=2, **options):
    return [torch.randn(batch, heads, length, 8, **options) for _ in range(3)]


# The law


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, -1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), 0x299F31D0A4093822,
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)  # fmt: skip
def test_the_generator_is_philox_4x32_10(counter, key, expected):
    """The answers that are known of it, of Random123."""
    assert tuple(int(word) for word in words(torch.tensor([key]), *map(torch.tensor, counter))) == expected


def test_a_weight_is_dropped_whose_word_is_below_the_threshold():
    n, h, i = (torch.tensor(number) for number in (3, 2, 9))
    mask = kept(SEED, 0.3, n, h, i, torch.tensor(-3), 20)
    for key, found in enumerate(mask.tolist(), start=-3):
        if key >= 0:
            word = words(SEED, n, h, i, torch.tensor(key // 4))[key % 4]
            assert found == (int(word) >= int(0.3 * 2**32))
    assert threshold(0.0) == threshold(1e-12) == 0
    assert threshold(0.5) == 2**31


@pytest.mark.parametrize("dropout_p", [0.1, 0.5, 0.9])
def test_weights_are_kept_at_their_rate_and_on_their_own(dropout_p):
    n, h, i = torch.arange(4), torch.arange(4), torch.arange(64)
    mask = kept(SEED, dropout_p, n[:, None, None], h[:, None], i, torch.zeros(64, dtype=torch.int64), 64).double()
    # Within five standard errors.
    rate, spread = 1 - dropout_p, (dropout_p * (1 - dropout_p)) ** 0.5
    assert abs(mask.mean() - rate) < 5 * spread / mask.numel() ** 0.5
    for dim in range(4):
        pairs = mask.narrow(dim, 1, mask.shape[dim] - 1) * mask.narrow(dim, 0, mask.shape[dim] - 1)
        assert abs(pairs.mean() - rate**2) < 8 * spread / pairs.numel() ** 0.5


def shown_weights(backend, device="cpu", dtype=torch.float32, batch=2, heads=2, length=12, **given):
    """The weights of a call, by values that are the keys' numbers in one-hot form."""
    query = torch.zeros(batch, heads, length, 8, dtype=dtype, device=device)
    value = torch.eye(length, dtype=dtype, device=device).expand(batch, heads, length, length)
    return local_attention(query, query, value, Window(11, 11), backend=backend, **given)


@pytest.fixture(autouse=True)
def _composed():
    with attnreg.register(composed("torch_block")):
        yield


def dropping(*dtypes):
    taken = {status.name: status.backend.taken for status in attnreg.backends() if status.backend is not None}
    return [run for run in runs(*dtypes) if "dropout_p" in taken[run.values[0]].get("local_attention", ())]


@pytest.mark.parametrize("dropout_p", [0.25, 0.75])
@pytest.mark.parametrize(
    ("backend", "device", "dtype"),
    [*dropping(torch.float32), *dropping(torch.bfloat16), ("composed", "cpu", torch.float32)],
)
def test_every_backend_drops_the_weights_of_the_law(dropout_p, backend, device, dtype):
    seed = SEED.to(device)
    found = shown_weights(backend, device, dtype, dropout_p=dropout_p, seed=seed)
    n, h, i = (torch.arange(size, device=device) for size in (2, 2, 12))
    begin = torch.zeros(12, dtype=torch.int64, device=device)
    mask = kept(seed, dropout_p, n[:, None, None], h[:, None], i, begin, 12)
    assert torch.equal(found != 0, mask)
    torch.testing.assert_close(found.float(), mask / (12 * (1 - dropout_p)), rtol=1e-2, atol=1e-3)


def test_the_law_counts_rows_and_keys_of_a_pack_from_its_beginning():
    offsets = torch.tensor([0, 5, 12])
    found = shown_weights("torch", batch=1, dropout_p=0.5, seed=SEED, cu_seqlens_q=offsets)[0]
    begin = torch.zeros(12, dtype=torch.int64)
    mask = kept(SEED, 0.5, torch.tensor(0), torch.arange(2)[:, None], torch.arange(12), begin, 12)
    same = (torch.arange(12) < 5)[:, None] == (torch.arange(12) < 5)
    assert torch.equal(found != 0, mask & same)


@pytest.mark.parametrize("part", ["low", "high"])
def test_each_half_of_the_seed_counts(part):
    other = SEED + (1 if part == "low" else 2**32)
    found = [shown_weights("torch", dropout_p=0.5, seed=seed) != 0 for seed in (SEED, other)]
    assert not torch.equal(*found)


def test_what_is_kept_makes_up_for_what_is_dropped():
    """The mean over many seeds is the call without dropout."""
    given = tensors(heads=1)
    plain = local_attention(*given, WINDOW)
    many = torch.stack(
        [local_attention(*given, WINDOW, dropout_p=0.5, seed=torch.tensor([seed])) for seed in range(600)]
    )
    assert (many.mean(0) - plain).abs().max() < 6 * many.std(0).max() / 600**0.5


def test_a_share_too_small_to_be_told_from_none_drops_none():
    given = tensors()
    torch.testing.assert_close(local_attention(*given, WINDOW, dropout_p=1e-12), local_attention(*given, WINDOW))


def test_the_log_sum_exp_is_that_before_dropping():
    given = tensors()
    results = [attnreg.local_attention_with_lse(*given, WINDOW, dropout_p=p, seed=SEED) for p in (0.0, 0.5)]
    torch.testing.assert_close(results[0][1], results[1][1])
    assert not torch.equal(results[0][0], results[1][0])


# The seed


def attend(query, key, value):
    return local_attention(query, key, value, WINDOW, dropout_p=0.5)


def compiled(function):
    torch._dynamo.reset()
    return torch.compile(function, backend="aot_eager", fullgraph=True)


@pytest.mark.parametrize(
    "bad",
    [{"dropout_p": 1.0}, {"dropout_p": "half"}, {"softcap": -1.0}, {"backend": "nobody"}, {"key": torch.zeros(2, 2)}],
    ids=str,
)
def test_a_call_that_is_refused_draws_no_seed(bad):
    query, key, value = tensors()
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    given = {"query": query, "key": key, "value": value, "dropout_p": 0.5} | bad
    with pytest.raises((TypeError, ValueError)):
        local_attention(window=WINDOW, **given)
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize(
    ("seed", "told"),
    [
        (7, "an integer torch.Tensor or None, got int"),
        (torch.zeros(1), "an integer dtype, got torch.float32"),
        (torch.zeros(2, dtype=torch.int64), "does not broadcast"),
    ],
    ids=["int", "float", "two"],
)
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_a_bad_seed_is_told_whether_or_not_something_is_dropped(seed, told, dropout_p):
    with pytest.raises((TypeError, ValueError), match=f"seed.*{told}"):
        local_attention(*tensors(), WINDOW, dropout_p=dropout_p, seed=seed)


@pytest.mark.parametrize("way", [lambda function: function, compiled], ids=["eager", "compiled"])
def test_manual_seed_repeats_a_call_and_two_calls_differ(way):
    given, function = tensors(), way(attend)
    torch.manual_seed(3)
    first, second = function(*given), function(*given)
    torch.manual_seed(3)
    assert torch.equal(function(*given), first)
    assert torch.equal(function(*given), second)
    assert not torch.equal(first, second)


def test_a_compiled_call_draws_the_seed_that_an_eager_one_draws():
    given = tensors()
    results = []
    for function in (attend, compiled(attend)):
        torch.manual_seed(3)
        results.append(function(*given))
    assert torch.equal(*results)


@pytest.mark.parametrize(("backend", "device", "dtype"), dropping(torch.float32))
def test_a_given_seed_drops_the_same_eager_and_compiled(backend, device, dtype):
    given = [each.requires_grad_() for each in tensors(device=device, dtype=dtype)]
    seed = SEED.to(device)

    def run(*given):
        return local_attention(*given, WINDOW, dropout_p=0.5, seed=seed, backend=backend)

    results = [function(*given) for function in (run, run, compiled(run))]
    gradients = [torch.autograd.grad(each.sin().sum(), given) for each in results]
    for found, found_gradients in zip(results[1:], gradients[1:]):
        assert torch.equal(found, results[0])
        assert all(torch.equal(*pair) for pair in zip(found_gradients, gradients[0]))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("way", [lambda function: function, compiled], ids=["eager", "compiled"])
def test_a_checkpoint_without_a_seed_computes_the_same_again(way, reentrant):
    given = [each.requires_grad_() for each in tensors()]
    if way is compiled and reentrant:
        pytest.skip("torch.compile leaves reentrant checkpoints out of its graph")

    def run(*given):
        return checkpoint(attend, *given, use_reentrant=reentrant).sin().sum()

    run = way(run)
    torch.manual_seed(3)
    found = torch.autograd.grad(run(*given), given) if not reentrant else _by_backward(run(*given), given)
    torch.manual_seed(3)
    expected = torch.autograd.grad(attend(*given).sin().sum(), given)
    for gradient, wanted in zip(found, expected):
        torch.testing.assert_close(gradient, wanted)


def _by_backward(loss, leaves):
    loss.backward()
    return [leaf.grad for leaf in leaves]


@pytest.mark.parametrize("backend", ["torch", "composed"])
def test_the_backward_drops_what_the_forward_dropped(backend):
    given = [each.requires_grad_() for each in tensors(length=6, dtype=torch.float64)]

    def run(*given):
        return local_attention(*given, WINDOW, dropout_p=0.4, seed=SEED, backend=backend)

    assert torch.autograd.gradcheck(run, given)


def test_no_seed_is_drawn_where_nothing_is_dropped_or_only_asked():
    given = tensors()
    module = LocalAttention(WINDOW, dropout_p=0.5)
    state = torch.get_rng_state()
    local_attention(*given, WINDOW, dropout_p=0.0)
    local_attention(*given, WINDOW, dropout_p=0)
    local_attention(*given, WINDOW, dropout_p=0.5, seed=SEED)
    module.eval()(*given)
    decision = attnreg.explain(*given, WINDOW, dropout_p=0.5)
    assert torch.equal(torch.get_rng_state(), state)
    assert decision.problem.gives("dropout_p") is not None
    assert decision.problem.gives("seed").dtype == torch.int64
    assert "; dropout_p; seed;" in str(decision)
    local_attention(*given, WINDOW, dropout_p=0.5)
    assert not torch.equal(torch.get_rng_state(), state)


def test_a_call_that_drops_nothing_is_the_plain_one():
    given = tensors()
    problem = attnreg.explain(*given, WINDOW, dropout_p=0.0, seed=SEED).problem
    assert problem == attnreg.explain(*given, WINDOW).problem
    assert torch.equal(local_attention(*given, WINDOW, dropout_p=0.0, seed=SEED), local_attention(*given, WINDOW))
