"""Bootstrap intervals against theory, brute force and scipy; the summary's shape."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from scipy import stats as scipy_stats

from medjax.errors import UserError
from medjax.metrics import stats


def test_interval_agrees_with_the_normal_theory_of_a_mean():
    values = np.random.default_rng(1).normal(3.0, 2.0, 400)
    low, high = stats.bootstrap_ci(values, n=4000)
    half = 1.96 * values.std() / math.sqrt(400)
    assert low == pytest.approx(values.mean() - half, abs=0.05 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.05 * half)


def test_interval_agrees_with_scipy_for_a_skewed_statistic():
    values = np.random.default_rng(2).exponential(size=60)
    ours = stats.bootstrap_ci(values, level=0.9, n=20000, statistic=np.median)
    theirs = scipy_stats.bootstrap(
        (values,), np.median, confidence_level=0.9, n_resamples=20000, method="percentile", rng=3
    ).confidence_interval
    assert ours == pytest.approx((theirs.low, theirs.high), abs=0.03)


def test_coverage():
    rng = np.random.default_rng(5)
    hits = sum(
        low <= 1.0 <= high
        for low, high in (stats.bootstrap_ci(rng.normal(1.0, 1.0, 40), n=500, level=0.9) for _ in range(300))
    )
    assert 0.83 < hits / 300 < 0.94


def test_interval_is_deterministic_and_ignores_nan():
    values = [0.2, 0.9, math.nan, 0.5, 0.7]
    assert stats.bootstrap_ci(values) == stats.bootstrap_ci([0.2, 0.9, 0.5, 0.7])
    many = np.random.default_rng(0).random(50)
    assert stats.bootstrap_ci(many, seed=1) != stats.bootstrap_ci(many, seed=2)
    assert stats.bootstrap_ci([0.4]) == (0.4, 0.4)
    assert all(math.isnan(value) for value in stats.bootstrap_ci([math.nan]))


def test_chunks_do_not_change_the_interval(monkeypatch):
    values = np.random.default_rng(0).random(50)
    whole = stats.bootstrap_ci(values, n=300)
    monkeypatch.setattr(stats, "_CHUNK", 1000)
    assert stats.bootstrap_ci(values, n=300) == whole


@pytest.mark.parametrize("arguments", [{"level": 1.0}, {"level": 0.0}, {"n": 0}])
def test_interval_refuses(arguments):
    with pytest.raises(UserError):
        stats.bootstrap_ci([1.0, 2.0], **arguments)


def rows(table: dict[str, list[float]], **extra: list) -> list[dict]:
    return [
        {"class": name, "dice": value} | {key: column[case] for key, column in extra.items()}
        for name, values in table.items()
        for case, value in enumerate(values)
    ]


def test_summary_shape_and_means():
    table = {"core": [0.8, 0.6, math.nan], "edema": [0.5, 0.7, 0.9]}
    summary = stats.summarize(rows(table, case=["x", "y", "z"]), ["dice"], ["core", "edema"])
    dice = summary["dice"]
    assert set(summary) == {"dice"}
    assert set(dice) == {"mean", "ci95", "per_class"}
    assert dice["mean"] == pytest.approx(0.7)
    assert dice["per_class"]["core"]["mean"] == pytest.approx(0.7)
    assert [dice["per_class"][name]["n"] for name in ("core", "edema")] == [2, 3]
    assert dice["ci95"][0] <= dice["mean"] <= dice["ci95"][1]
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary


def test_summary_resamples_classes_jointly():
    """A class that mirrors the other makes the mean over classes certain, whatever cases are drawn."""
    values = np.random.default_rng(0).random(20)
    dice = stats.summarize(rows({"a": list(values), "b": list(1 - values)}), ["dice"])["dice"]
    assert dice["ci95"] == pytest.approx([0.5, 0.5])
    low, high = dice["per_class"]["a"]["ci95"]
    assert high - low > 0.1


def test_summary_of_one_class_agrees_with_the_plain_bootstrap():
    values = np.random.default_rng(4).random(150)
    summary = stats.summarize(rows({"a": list(values)}), ["dice"], n=8000)
    assert summary["dice"]["ci95"] == pytest.approx(stats.bootstrap_ci(values, n=8000), abs=0.003)
    assert summary["dice"]["per_class"]["a"]["ci95"] == summary["dice"]["ci95"]


def test_summary_resamples_patients():
    """Copies of a patient's scan are no new evidence: the interval stays that of the patients."""
    values = np.random.default_rng(6).random(30)
    once = stats.summarize(rows({"a": list(values)}, case=list(range(30))), ["dice"])
    four = {"a": list(np.repeat(values, 4))}
    grouped = stats.summarize(rows(four, case=list(range(120)), group=list(np.repeat(range(30), 4))), ["dice"])
    apart = stats.summarize(rows(four, case=list(range(120))), ["dice"])
    assert grouped["dice"]["ci95"] == pytest.approx(once["dice"]["ci95"])
    widths = [high - low for low, high in (apart["dice"]["ci95"], grouped["dice"]["ci95"])]
    assert widths[0] < 0.65 * widths[1]


def test_summary_of_one_case_and_of_none():
    one = stats.summarize(rows({"a": [0.4], "b": [0.8]}), ["dice"])["dice"]
    assert one["mean"] == pytest.approx(0.6)
    assert one["ci95"] == pytest.approx([0.6, 0.6])
    absent = stats.summarize(rows({"a": [math.nan, 0.5], "b": [math.nan, math.nan]}), ["dice"], ["a", "b", "c"])["dice"]
    for name in ("b", "c"):
        assert absent["per_class"][name] == {"mean": None, "ci95": [None, None], "n": 0}
    assert absent["mean"] == 0.5
    nothing = stats.summarize([], ["dice"], ["a"])["dice"]
    assert nothing == {
        "mean": None,
        "ci95": [None, None],
        "per_class": {"a": {"mean": None, "ci95": [None, None], "n": 0}},
    }


def test_summary_without_intervals():
    quick = stats.summarize(rows({"a": [0.1, 0.3]}), ["dice"], n=0)["dice"]
    assert quick["mean"] == pytest.approx(0.2)
    assert quick["ci95"] == quick["per_class"]["a"]["ci95"] == [None, None]


def test_summary_leaves_other_classes_out():
    table = {"a": [0.1, 0.3], "b": [1.0, 1.0]}
    assert stats.summarize(rows(table), ["dice"], ["a"])["dice"]["mean"] == pytest.approx(0.2)


def test_summary_refuses():
    with pytest.raises(UserError, match="no 'hd95'"):
        stats.summarize(rows({"a": [0.1]}), ["hd95"])
    with pytest.raises(UserError, match="two rows of class 'a'"):
        stats.summarize(rows({"a": [0.1, 0.2]}, case=["x", "x"]), ["dice"])
    with pytest.raises(UserError, match="some rows name"):
        stats.summarize([{"class": "a", "dice": 1.0, "case": "x"}, {"class": "a", "dice": 1.0}], ["dice"])
    with pytest.raises(UserError, match="no 'class'"):
        stats.summarize([{"dice": 1.0}], ["dice"])
