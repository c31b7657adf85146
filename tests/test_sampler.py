"""The index source: a pure function of (seed, example), exact shares, patches that stay in bounds."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medjax.data.sampler import Sampler, check_filled, check_multiple, cut, foreground_points
from medjax.errors import UserError

POINTS = [np.array([[3, 4, 5], [9, 9, 9]]), np.array([[0, 0, 0]])]


def test_every_case_once_an_epoch_in_another_order_each_time() -> None:
    sampler = Sampler(seed=3, n_cases=7)
    epochs = [[sampler.case(e * 7 + i) for i in range(7)] for e in range(20)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 15


def test_an_example_does_not_depend_on_what_was_drawn_before() -> None:
    def draw(sampler: Sampler, n: int) -> tuple:
        return sampler.case(n), *sampler.start(n, (20, 20, 20), (8, 8, 8), POINTS)

    forward = [draw(Sampler(5, 4), n) for n in range(50)]
    backward = [draw(Sampler(5, 4), n) for n in reversed(range(50))][::-1]
    assert forward == backward
    assert forward != [draw(Sampler(6, 4), n) for n in range(50)]


@pytest.mark.parametrize("share", [0.0, 0.33, 0.5, 2 / 3, 1.0])
def test_the_foreground_share_is_exact_in_every_long_run(share: float) -> None:
    sampler = Sampler(seed=1, n_cases=4, foreground=share)
    chosen = np.array([sampler.is_foreground(n) for n in range(1000)])
    for first, last in ((0, 1000), (17, 400), (900, 1000)):
        assert abs(chosen[first:last].sum() - share * (last - first)) <= 1


@settings(max_examples=100, deadline=None)
@given(
    example=st.integers(0, 2**40),
    shape=st.tuples(*[st.integers(1, 40)] * 3),
    patch=st.tuples(*[st.integers(1, 24)] * 3),
    share=st.sampled_from([0.0, 1.0]),
)
def test_a_patch_stays_inside_or_covers_the_volume(example: int, shape: tuple, patch: tuple, share: float) -> None:
    target = np.zeros(shape, np.uint8)
    target[tuple(n // 2 for n in shape)] = 1
    start = Sampler(9, 5, share).start(example, shape, patch, foreground_points(target))
    volume = np.arange(1, np.prod(shape) + 1).reshape(shape)
    got = cut(volume, start, patch)
    assert got.shape == patch
    # No voxel is lost where the volume fits, none invented where it does not.
    assert (got > 0).sum() == np.prod(np.minimum(shape, patch))
    if share == 1.0:
        assert cut(target, start, patch).any()


def test_patches_reach_every_corner_and_every_class() -> None:
    sampler = Sampler(seed=0, n_cases=1, foreground=0.0)
    starts = np.array([sampler.start(n, (12, 12, 12), (8, 8, 8), []) for n in range(300)])
    assert starts.min(0).tolist() == [0, 0, 0]
    assert starts.max(0).tolist() == [4, 4, 4]
    target = np.zeros((40, 40, 40), np.uint8)
    target[2:4, 2:4, 2:4], target[5:39, 5:39, 5:39] = 1, 2
    points = foreground_points(target, limit=64)
    assert [len(p) for p in points] == [8, 64]
    sampler = Sampler(seed=0, n_cases=1, foreground=1.0)
    has_rare = [
        bool((cut(target, sampler.start(n, target.shape, (6, 6, 6), points), (6, 6, 6)) == 1).any()) for n in range(200)
    ]
    assert 0.3 < np.mean(has_rare) < 0.7  # classes are drawn evenly, however rare


def test_cut_equals_padding() -> None:
    rng = np.random.default_rng(0)
    volume = rng.normal(size=(5, 6, 7, 2))
    padded = np.pad(volume, ((4, 4), (4, 4), (4, 4), (0, 0)))
    for start in ((-2, 3, 0), (3, -4, 5), (0, 0, 0), (4, 5, 6)):
        a, b, c = (s + 4 for s in start)
        np.testing.assert_array_equal(cut(volume, start, (4, 4, 4)), padded[a : a + 4, b : b + 4, c : c + 4])


def test_check_patch() -> None:
    check_multiple((32, 40, 8), (8, 8, 8))
    check_filled((32, 32, 32), [(30, 31, 29)], (8, 8, 8))
    with pytest.raises(UserError, match=r"multiple of .*\(8, 8, 8\); the nearest is \(32, 40, 8\)"):
        check_multiple((30, 40, 3), (8, 8, 8))
    with pytest.raises(UserError, match=r"larger than every padded training volume.*use data.patch=\(32, 40, 32\)"):
        check_filled((64, 64, 64), [(30, 20, 25), (10, 37, 30)], (8, 8, 8))
