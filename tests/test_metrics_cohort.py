"""Metrics of whole cohorts against scikit-learn, brute force, analytic answers and MONAI's FROC."""

from __future__ import annotations

import math

import numpy as np
import pytest

from medjax.errors import UserError
from medjax.metrics import classification as c
from medjax.metrics import detection as d
from medjax.metrics import regression as r
from medjax.metrics import stats


def scores(seed: int, n: int = 40) -> tuple[np.ndarray, np.ndarray]:
    """Scores in tenths, so that many are tied, and truths."""
    rng = np.random.default_rng(seed)
    truths = rng.random(n) < 0.4
    return np.round(np.clip(rng.normal(0.4 + 0.2 * truths, 0.25), 0, 1), 1), truths.astype(int)


# ----------------------------------------------------------------------------------------------------- classification


@pytest.mark.parametrize("seed", range(4))
def test_against_scikit_learn(seed):
    sk = pytest.importorskip("sklearn.metrics")
    s, t = scores(seed)
    assert c.auroc(s, t) == pytest.approx(sk.roc_auc_score(t, s), abs=1e-12)
    assert c.average_precision(s, t) == pytest.approx(sk.average_precision_score(t, s), abs=1e-12)
    assert c.brier(s, t) == pytest.approx(sk.brier_score_loss(t, s), abs=1e-12)
    point = c.operating_point(s, t, threshold=0.5)
    assert point.sensitivity == pytest.approx(sk.recall_score(t, s >= 0.5))
    assert point.specificity == pytest.approx(sk.recall_score(1 - t, s < 0.5))
    rng = np.random.default_rng(seed)
    truths = rng.integers(0, 4, 50)
    calls = np.where(rng.random(50) < 0.5, truths, rng.integers(0, 4, 50))
    table = c.confusion(calls, truths, 4)
    np.testing.assert_array_equal(table, sk.confusion_matrix(truths, calls, labels=range(4)))
    assert c.accuracy(table) == pytest.approx(sk.accuracy_score(truths, calls))
    assert c.balanced_accuracy(table) == pytest.approx(sk.balanced_accuracy_score(truths, calls))
    for weights in ("none", "linear", "quadratic"):
        expected = sk.cohen_kappa_score(truths, calls, weights=None if weights == "none" else weights)
        assert c.kappa(table, weights) == pytest.approx(expected, abs=1e-12)
    a, b = rng.normal(size=(2, 30))
    assert r.r2(a, b) == pytest.approx(sk.r2_score(b, a), abs=1e-12)
    assert r.mean_absolute_error(a, b) == pytest.approx(sk.mean_absolute_error(b, a))
    assert r.root_mean_square_error(a, b) ** 2 == pytest.approx(sk.mean_squared_error(b, a))
    assert r.pearson(a, b) == pytest.approx(np.corrcoef(a, b)[0, 1])


def test_auroc_is_the_chance_of_the_right_order():
    s, t = scores(9)
    pairs = [(x > y) + 0.5 * (x == y) for x in s[t == 1] for y in s[t == 0]]
    assert c.auroc(s, t) == pytest.approx(np.mean(pairs))
    assert c.auroc(np.exp(5 * s), t) == c.auroc(s, t)
    assert c.auroc(-s, t) == pytest.approx(1 - c.auroc(s, t))
    assert c.auroc([0.5] * 4, [0, 1, 0, 1]) == 0.5
    assert c.average_precision([0.5] * 4, [0, 1, 0, 1]) == 0.5


def test_operating_points():
    s, t = np.array([0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0]), np.array([1, 1, 0, 1, 0, 0, 0, 0, 0, 0])
    assert c.operating_point(s, t, specificity=0.9) == (0.8, pytest.approx(2 / 3), 1.0)
    assert c.operating_point(s, t, specificity=6 / 7) == (0.6, 1.0, pytest.approx(6 / 7))
    assert c.operating_point(s, t, specificity=0.0).sensitivity == 1
    for asked in ({"specificity": 90}, {"specificity": -0.1}, {"sensitivity": 1.1}, {"sensitivity": math.nan}):
        with pytest.raises(UserError, match=f"operating point: {next(iter(asked))} .* is outside 0 to 1"):
            c.operating_point(s, t, **asked)
    assert c.operating_point(s, t, sensitivity=0.6) == (0.8, pytest.approx(2 / 3), 1.0)
    assert c.operating_point([0.3, 0.3], [1, 0], specificity=0.5) == (math.inf, 0.0, 1.0)
    with pytest.raises(UserError, match="exactly one"):
        c.operating_point(s, t)


def test_undefined_is_nan():
    for truths in ([1, 1], [0, 0]):
        assert math.isnan(c.auroc([0.1, 0.2], truths))
        assert math.isnan(c.operating_point([0.1, 0.2], truths, specificity=0.5).sensitivity)
    assert math.isnan(c.average_precision([0.1], [0]))
    assert math.isnan(c.kappa(c.confusion([1, 1], [1, 1], 2)))
    assert math.isnan(c.kappa(np.zeros((2, 2), int)))
    assert math.isnan(c.balanced_accuracy(np.zeros((2, 2), int)))
    assert math.isnan(c.brier([], []))
    assert math.isnan(c.calibration_error([], []))
    assert c.balanced_accuracy(c.confusion([0, 1], [0, 0], 3)) == 0.5
    assert math.isnan(r.r2([1, 2], [3, 3]))
    assert math.isnan(r.pearson([1, 1], [3, 4]))
    assert math.isnan(r.mean_absolute_error([], []))


def test_calibration_error():
    p, t = np.array([0.95, 0.95, 0.85, 0.15]), np.array([1, 0, 1, 0])
    # Ten bins: (0.9, 1] is right half the time, (0.8, 0.9] always, (0.1, 0.2] never positive.
    assert c.calibration_error(p, t, bins=10) == pytest.approx((2 * 0.45 + 0.15 + 0.15) / 4)
    assert c.calibration_error([0.2, 0.2], [0, 1], bins=5) == pytest.approx(0.3)  # the edge is in its lower bin
    many = np.stack([1 - p, p], 1)
    sure = np.maximum(p, 1 - p)
    right = np.array([1, 0, 1, 1])
    assert c.calibration_error(many, t, bins=1) == pytest.approx(abs(right.mean() - sure.mean()))
    assert c.brier(many, t) == pytest.approx(2 * c.brier(p, t))
    rng = np.random.default_rng(0)
    q = rng.random(20000)
    for binning in ("width", "mass"):
        assert c.calibration_error(q, rng.random(20000) < q, binning=binning) < 0.02
        assert c.calibration_error(q, rng.random(20000) < q**2, binning=binning) > 0.1


def test_temperature():
    """Logits three times too large are brought back, whatever the number of classes."""
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 1.5, (6000, 3))
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    truths = (rng.random((6000, 1)) > p.cumsum(1)).sum(1)
    assert c.fit_temperature(3 * logits, truths) == pytest.approx(3, rel=0.05)
    log_p = np.log(p)
    assert c.fit_temperature(log_p, truths) == pytest.approx(1, rel=0.05)  # log probabilities will do
    binary = rng.normal(0, 2, 6000)
    answers = rng.random(6000) < 1 / (1 + np.exp(-binary))
    assert c.fit_temperature(0.5 * binary, answers) == pytest.approx(0.5, rel=0.08)
    assert c.fit_temperature(np.array([5.0, -5.0]), [1, 0]) == 0.05
    assert c.fit_temperature(np.array([5.0, -5.0]), [0, 1]) == 20
    assert c.fit_temperature(np.zeros((0, 3)), []) == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: c.auroc([0.1], [0, 1]), "1 scores and 2"),
        (lambda: c.auroc([math.nan, 0.1], [0, 1]), "NaN"),
        (lambda: c.auroc([0.2, 0.1], [0, 2]), "0 or 1"),
        (lambda: c.brier([1.5], [1]), "outside 0 to 1"),
        (lambda: c.confusion([3], [0], 3), "outside 0 to 2"),
        (lambda: c.kappa(np.eye(2), "cubic"), "kappa weights"),
        (lambda: c.calibration_error([0.5], [1], bins=0), "bins=0"),
        (lambda: c.fit_temperature(np.array([math.inf]), [1]), "finite"),
        (lambda: r.r2([1.0], [math.nan]), "not finite"),
        (lambda: r.r2([1.0], [1.0, 2.0]), "1 predictions"),
        (lambda: d.froc(np.array([0.5]), np.array([]), 0), "at least one scan"),
        (lambda: d.box_iou(np.zeros((2, 5)), np.zeros((0, 6))), "boxes"),
        (lambda: d.match(np.zeros((0, 6)), [], np.zeros((0, 6)), rule="touch"), "matching rule"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(UserError, match=message):
        call()


# --------------------------------------------------------------------------------------------------------- regression


def test_bland_altman():
    a, b = np.array([10.0, 12.0, 9.0]), np.array([9.0, 10.0, 9.0])
    found = r.bland_altman(a, b)
    assert found.bias == pytest.approx(1)
    assert found.sd == pytest.approx(1)
    assert (found.low, found.high) == (pytest.approx(-0.96), pytest.approx(2.96))
    assert math.isnan(r.bland_altman([1.0], [2.0]).low)
    rng = np.random.default_rng(0)
    truths = rng.normal(0, 10, 4000)
    found = r.bland_altman(truths + rng.normal(2, 3, 4000), truths)
    assert (found.bias, found.low, found.high) == pytest.approx((2, 2 - 5.88, 2 + 5.88), abs=0.3)
    assert r.coverage([0, 0, 0], [1, 1, 1], [0.5, 1.0, 2.0]) == pytest.approx(2 / 3)


# ---------------------------------------------------------------------------------------------------------- detection


def boxes(*rows) -> np.ndarray:
    return np.array(rows, float).reshape(-1, 6)


def test_box_overlap_and_suppression():
    a = boxes([0, 0, 0, 2, 2, 2], [1, 0, 0, 2, 2, 2], [9, 9, 9, 0, 0, 0])
    iou = d.box_iou(a, a)
    np.testing.assert_allclose(iou, [[1, 1 / 3, 0], [1 / 3, 1, 0], [0, 0, 0]])
    assert d.non_maximum_suppression(a, [0.5, 0.9, 0.1], iou=0.3).tolist() == [1, 2]
    assert d.non_maximum_suppression(a, [0.5, 0.9, 0.1], iou=0.4).tolist() == [1, 0, 2]
    assert d.non_maximum_suppression(a, [0.5, 0.9, 0.1], iou=1, apart=1.5).tolist() == [1, 2]
    assert d.non_maximum_suppression(boxes(), []).tolist() == []


def test_matching():
    lesions = boxes([0, 0, 0, 10, 10, 10], [20, 0, 0, 4, 4, 4])
    candidates = boxes([4, 0, 0, 3, 3, 3], [0, 0, 0, 9, 9, 9], [17, 0, 0, 4, 4, 4], [21, 0, 0, 1, 1, 1])
    found = d.match(candidates, [0.9, 0.5, 0.7, 0.2], lesions)
    assert found.by.tolist() == [0, 3]
    assert found.found.tolist() == [0.9, 0.2]
    assert found.false.tolist() == [False, False, True, False]
    overlap = d.match(candidates, [0.9, 0.5, 0.7, 0.2], lesions, rule="iou", iou=0.14)
    assert overlap.by.tolist() == [1, 2]
    assert overlap.false.tolist() == [True, False, False, True]
    nothing = d.match(boxes(), [], lesions)
    assert nothing.by.tolist() == [-1, -1]
    assert (nothing.found == -math.inf).all()
    assert d.match(candidates, [1, 1, 1, 1], boxes()).false.all()


def test_froc_of_a_known_cohort():
    """Four lesions in two scans; sensitivities between the points are linear."""
    curve = d.froc(np.array([0.9, 0.6, 0.3, -math.inf]), np.array([0.8, 0.5, 0.4, 0.2]), 2)
    np.testing.assert_allclose(curve.rates, [0, 0, 0.5, 0.5, 1, 1.5, 1.5, 2])
    np.testing.assert_allclose(curve.sensitivity, [0, 0.25, 0.25, 0.5, 0.5, 0.5, 0.75, 0.75])
    np.testing.assert_allclose(d.sensitivity_at(curve), [0.25 + 0.25 * 0.25, 0.375, 0.5, 0.5, 0.75, 0.75, 0.75])
    assert d.cpm(curve) == pytest.approx(np.mean([0.3125, 0.375, 0.5, 0.5, 0.75, 0.75, 0.75]))
    perfect = d.froc(np.array([0.9, 0.8]), np.array([0.1]), 1)
    assert d.cpm(perfect) == 1
    assert d.detection_average_precision(np.array([0.9, 0.8]), np.array([0.1])) == 1
    assert d.cpm(d.froc(np.array([-math.inf]), np.array([]), 3)) == 0
    assert math.isnan(d.cpm(d.froc(np.array([]), np.array([0.4]), 3)))
    assert d.detection_average_precision(np.array([0.5, -math.inf]), np.array([0.7])) == pytest.approx(0.25)


def test_cpm_by_brute_force_over_thresholds():
    rng = np.random.default_rng(3)
    found = np.where(rng.random(30) < 0.2, -math.inf, rng.random(30))
    false = rng.random(120) * 0.8
    points = sorted({((false >= t).sum() / 7, (found >= t).mean()) for t in [*found, *false, 2.0]})
    best = {rate: max(s for q, s in points if q == rate) for rate, _ in points}
    expected = np.interp(d.LUNA_RATES, list(best), list(best.values()))
    assert d.cpm(d.froc(found, false, 7)) == pytest.approx(expected.mean())


@pytest.mark.peers
def test_peer_monai_froc():
    peer = pytest.importorskip("monai.metrics")
    rng = np.random.default_rng(0)
    hits, false = rng.random(25), rng.random(60) * 0.9  # of 30 lesions, in 6 scans
    rates, sensitivity = peer.compute_froc_curve_data(false, hits, 30, 6)
    expected = peer.compute_froc_score(rates, sensitivity, (0.25, 0.5, 1, 2, 4, 8))
    curve = d.froc(np.append(hits, [-math.inf] * 5), false, 6)
    assert d.cpm(curve, (0.25, 0.5, 1, 2, 4, 8)) == pytest.approx(expected, abs=1e-5)


# -------------------------------------------------------------------------------------------------- cohort bootstrap


def test_summary_of_a_cohort():
    rng = np.random.default_rng(0)
    rows = []
    for case in range(60):
        for name, gain in (("a", 1.5), ("b", 0.0)):
            truth = int(rng.random() < 0.5)
            rows.append({"class": name, "case": case, "p": rng.normal(gain * truth), "t": truth})
    summary = stats.summarize_cohort(rows, {"auroc": lambda t: c.auroc(t["p"], t["t"])}, ["a", "b", "c"])["auroc"]
    for name, n in (("a", 60), ("b", 60), ("c", 0)):
        assert summary["per_class"][name]["n"] == n
    of_a = [row for row in rows if row["class"] == "a"]
    assert summary["per_class"]["a"]["mean"] == c.auroc([x["p"] for x in of_a], [x["t"] for x in of_a])
    assert summary["per_class"]["c"] == {"mean": None, "ci95": [None, None], "n": 0}
    low, high = summary["per_class"]["a"]["ci95"]
    # Hanley & McNeil's standard error of an AUROC, about 0.05 here.
    assert 0.1 < high - low < 0.3
    assert low < summary["per_class"]["a"]["mean"] < high
    low, high = summary["per_class"]["b"]["ci95"]
    assert low < 0.5 < high
    again = stats.summarize_cohort(rows, {"auroc": lambda t: c.auroc(t["p"], t["t"])}, ["a", "b", "c"])["auroc"]
    assert again == summary
    quick = stats.summarize_cohort(rows, {"auroc": lambda t: c.auroc(t["p"], t["t"])}, ["a"], n=0)["auroc"]
    assert quick["mean"] == summary["per_class"]["a"]["mean"]
    assert quick["ci95"] == quick["per_class"]["a"]["ci95"] == [None, None]


def test_a_cohorts_mean_has_the_interval_of_the_plain_bootstrap():
    values = np.random.default_rng(1).random(50)
    rows = [{"class": "a", "v": v} for v in values]
    summary = stats.summarize_cohort(rows, {"mean": lambda t: float(t["v"].mean())}, n=4000)["mean"]
    assert summary["mean"] == pytest.approx(values.mean())
    assert summary["ci95"] == pytest.approx(stats.bootstrap_ci(values, n=4000), abs=0.006)
    grouped = [{**row, "case": i, "group": i // 25} for i, row in enumerate(rows)]
    two = stats.summarize_cohort(grouped, {"mean": lambda t: float(t["v"].mean())})["mean"]["ci95"]
    halves = sorted((values[:25].mean(), values[25:].mean()))
    assert two == pytest.approx(halves)
    with pytest.raises(UserError, match="no 'class'"):
        stats.summarize_cohort([{"v": 1}], {})
