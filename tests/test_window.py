"""The window: the only off-by-one."""

from __future__ import annotations

import pickle

import pytest
import torch

import attnreg
from attnreg import Window


@pytest.mark.parametrize("size", [1, 2, 3, 8, 9])
def test_a_causal_window_has_exactly_its_size_and_no_future(size):
    window = Window.causal(size)
    assert (window.left, window.right, window.size) == (size - 1, 0, size)


@pytest.mark.parametrize(("size", "left", "right"), [(1, 0, 0), (2, 1, 0), (8, 4, 3), (9, 4, 4)])
def test_a_centered_window_has_exactly_its_size_and_an_even_one_its_extra_key_on_the_left(size, left, right):
    assert Window.centered(size) == Window(left, right)
    assert Window.centered(size).size == size


def test_windows_are_values():
    assert Window(3, 1) == Window(left=3, right=1) != Window(1, 3)
    assert len({Window(3, 1), Window(3, 1)}) == 1
    assert pickle.loads(pickle.dumps(Window(3, 1))) == Window(3, 1)
    with pytest.raises(AttributeError):
        Window(3, 1).left = 4


@pytest.mark.parametrize(
    "make", [lambda: Window(-1, 0), lambda: Window(0, -2), lambda: Window.causal(0), lambda: Window.centered(-3)]
)
def test_a_negative_distance_or_empty_window_is_a_value_error(make):
    with pytest.raises(ValueError, match="at least"):
        make()


@pytest.mark.parametrize("given", [1.0, "3", None, True])
def test_a_distance_that_is_no_integer_is_a_type_error_that_shows_it(given):
    with pytest.raises(TypeError, match=f"must be an int, got {given!r}"):
        Window(given, 0)


def test_integers_of_other_libraries_are_integers():
    numpy = pytest.importorskip("numpy")
    assert Window(numpy.int64(3), torch.tensor(1)) == Window(3, 1)


@pytest.mark.parametrize("op", ["local_dot_product", "local_weighted_average"])
def test_an_int_is_no_window_and_the_error_names_both_constructors(op):
    tensor = torch.randn(1, 1, 8, 8)
    with pytest.raises(TypeError, match=r"Window\.causal\(8\).*Window\.centered\(8\)"):
        getattr(attnreg, op)(tensor, tensor, 8)
    with pytest.raises(TypeError, match=r"Window\.causal\(8\).*Window\.centered\(8\)"):
        attnreg.local_attention(tensor, tensor, tensor, 8)
    with pytest.raises(TypeError, match=r"Window\.causal\(8\)"):
        attnreg.LocalAttention(8)
    with pytest.raises(TypeError, match=r"Window\.causal\(8\)"):
        attnreg.band_from_dense(torch.zeros(8, 8), 8)
