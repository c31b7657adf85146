"""The index source: a pure function of (seed, example), exact shares, patches that stay in bounds."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medjax.data.sampler import (
    Sampler,
    Wheel,
    bucket_of,
    bucket_shapes,
    check_filled,
    check_multiple,
    cut,
    foreground_points,
)
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
    start = Sampler(9, 5, share).start(example, shape, patch, foreground_points(target).values())
    volume = np.arange(1, np.prod(shape) + 1).reshape(shape)
    got = cut(volume, start, patch)
    assert got.shape == patch
    # No voxel is lost where the volume fits, none invented where it does not.
    assert (got > 0).sum() == np.prod(np.minimum(shape, patch))
    if share == 1.0:
        assert cut(target, start, patch).any()


@pytest.mark.parametrize("length", [24, 30, 31, 32])
@pytest.mark.parametrize("overhang", [(3, 0), (0, 3), (3, 3)])
def test_a_volume_that_fits_loses_nothing_to_the_overhang(length: int, overhang: tuple[int, int]) -> None:
    starts = {int(Sampler(0, 1, 0.0).start(n, (length,) * 3, (32,) * 3, [], [overhang] * 3)[0]) for n in range(60)}
    assert all(start <= 0 and start + 32 >= length for start in starts)
    # What touches the border has a voxel of padding there, in some patches.
    assert not overhang[0] or min(starts) < 0 or length == 32
    assert not overhang[1] or max(starts) + 32 > length or length == 32


def test_patches_reach_every_corner_and_every_class() -> None:
    sampler = Sampler(seed=0, n_cases=1, foreground=0.0)
    starts = np.array([sampler.start(n, (12, 12, 12), (8, 8, 8), []) for n in range(300)])
    assert starts.min(0).tolist() == [0, 0, 0]
    assert starts.max(0).tolist() == [4, 4, 4]
    target = np.zeros((40, 40, 40), np.uint8)
    target[2:4, 2:4, 2:4], target[5:39, 5:39, 5:39] = 1, 2
    assert list(foreground_points(target, ignore=2)) == [1]
    points = list(foreground_points(target, limit=64).values())
    assert [len(p) for p in points] == [8, 64]
    sampler = Sampler(seed=0, n_cases=1, foreground=1.0)
    has_rare = [
        bool((cut(target, sampler.start(n, target.shape, (6, 6, 6), points), (6, 6, 6)) == 1).any()) for n in range(200)
    ]
    assert 0.3 < np.mean(has_rare) < 0.7  # classes are drawn evenly, however rare


@settings(max_examples=60, deadline=None)
@given(
    weights=st.lists(st.sampled_from([0.0, 0.1, 1.0, 1.0, 2.5, 40.0]), min_size=1, max_size=12).filter(any),
    seed=st.integers(0, 5),
    first=st.integers(0, 2**44),
)
def test_a_wheel_keeps_its_shares(weights: list[float], seed: int, first: int) -> None:
    wheel = Wheel(seed, 9, tuple(weights))
    turns = [wheel.turn(n) for n in range(1280)]
    assert len(set(turns)) == len(turns)  # an item never has the same turn twice...
    taken = Counter(item for item, _ in turns)
    shares = np.asarray(weights) / sum(weights)
    for item, share in enumerate(shares):
        assert abs(taken[item] - 1280 * share) <= 3 + len(weights) * (min(weights) == max(weights))
        own = sorted(turn for i, turn in turns if i == item)
        assert own == list(range(len(own)))  # ...and leaves none out
    # Far into a run it is as exact, and still a function of the number alone.
    assert wheel.turn(first) == Wheel(seed, 9, tuple(weights)).turn(first)
    assert shares[wheel.turn(first)[0]] > 0


def test_a_wheel_shuffles() -> None:
    order = [Wheel(0, 1, (3.0, 1.0)).turn(n)[0] for n in range(640)]
    assert Counter(order) == {0: 480, 1: 160}
    assert len({tuple(order[i : i + 8]) for i in range(0, 640, 8)}) > 20
    assert order != [Wheel(0, 1, (3.0, 1.0), salt=1).turn(n)[0] for n in range(640)]


def test_cases_are_taken_by_their_weights() -> None:
    weights = (1.0, 0.0, 3.0, 0.5)
    sampler = Sampler(2, 4, 0.5, weights)
    for first, last in ((0, 4500), (1000, 1900)):
        taken = Counter(sampler.case(n) for n in range(first, last))
        for case, weight in enumerate(weights):
            assert abs(taken[case] - (last - first) * weight / 4.5) <= 20 * (weight > 0)
    assert abs(Counter(sampler.case(n) for n in range(4500))[2] - 3000) <= 3


@pytest.mark.parametrize("share", [0.25, 1.0])
def test_classes_are_balanced_exactly_over_time(share: float) -> None:
    classes = {("a", 1): 1.0, ("a", 2): 1.0, ("b", 1): 1.0}
    holders = {("a", 1): (0, 1, 2, 3), ("a", 2): (3,), ("b", 1): (1, 2)}
    sampler = Sampler(5, 6, share, (), classes, holders)
    drawn = [sampler.draw(n) for n in range(2400)]
    taken = Counter(key for _, key in drawn)
    assert all(abs(taken[key] - 800 * share) <= 1 for key in classes)
    assert taken[None] == 2400 - sum(taken[key] for key in classes)
    for key, held in holders.items():
        cases = Counter(case for case, k in drawn if k == key)
        assert set(cases) == set(held)  # the case has the class...
        assert max(cases.values()) - min(cases.values()) <= 1  # ...and each that has it is taken as often
    everywhere = Counter(case for case, k in drawn if k is None)
    assert not everywhere or max(everywhere.values()) - min(everywhere.values()) <= 1
    # In any stretch of the run, not only from its beginning.
    for first in (7, 1111):
        stretch = Counter(key for _, key in drawn[first : first + 600])
        assert all(abs(stretch[key] - 200 * share) <= 2 for key in classes)


def test_classes_by_weight() -> None:
    classes = {("a", 1): 3.0, ("a", 2): 1.0}
    sampler = Sampler(5, 2, 0.5, (), classes, dict.fromkeys(classes, (0, 1)))
    taken = Counter(sampler.draw(n)[1] for n in range(2560))
    assert taken == {None: 1280, ("a", 1): 960, ("a", 2): 320}


def test_buckets_hold_every_volume_with_little_padding() -> None:
    rng = np.random.default_rng(0)
    shapes = [tuple(rng.integers(20, 60, 3)) for _ in range(40)] + [(18, 200, 20)] * 3
    padded = []
    for count in (1, 2, 4, 100):
        buckets = bucket_shapes(shapes, count, (4, 4, 2))
        assert len(buckets) <= count
        assert all(n % f == 0 for b in buckets for n, f in zip(b, (4, 4, 2), strict=True))
        padded.append(sum(np.prod(buckets[bucket_of(shape, buckets)]) for shape in shapes))
    assert padded == sorted(padded, reverse=True)
    assert padded[0] == 43 * np.prod(-(-np.max(shapes, 0) // (4, 4, 2)) * (4, 4, 2))
    assert padded[-1] <= sum(np.prod([-(-n // f) * f for n, f in zip(s, (4, 4, 2), strict=True)]) for s in shapes)
    assert (20, 200, 20) in bucket_shapes(shapes, 2, (4, 4, 2))


def test_a_batch_is_of_one_bucket_and_cases_are_taken_evenly() -> None:
    sampler = Sampler(1, 7, buckets=((0, 2, 3), (), (1, 4, 5, 6)), batch_size=2)
    drawn = [(sampler.bucket(n), sampler.draw(n)[0]) for n in range(2 * 7 * 20)]
    assert all(drawn[i][0] == drawn[i + 1][0] for i in range(0, len(drawn), 2))
    assert all(case in sampler.buckets[bucket] for bucket, case in drawn)
    taken = Counter(case for _, case in drawn)
    assert all(abs(n - 40) <= 6 for n in taken.values())


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
