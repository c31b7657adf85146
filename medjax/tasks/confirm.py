"""Masks confirmed by findings: parts of a segmentation that no finding of another task supports are taken away.

A network that outlines lesions and finds them says the same thing twice. The outline is judged voxel by voxel and knows
little of whether a blob as a whole is a lesion; the score of a finding is about nothing else. So
`eval.confirm = {'outline': {'by': 'nodules', 'score': 0.3}}` keeps of the mask `outline` only the connected parts
(26 neighbours, all classes together) that a finding of `nodules` of score 0.3 or more hits, in the sense in which
findings are scored: the part comes nearer to its centre than half the mean of its sizes (at least one voxel).

It is done to the probabilities on the prepared grid, before the way back to a file's own, so training's validation,
evaluation and prediction see the same masks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from medjax.errors import UserError
from medjax.tasks import findings

KEYS = ("by", "score")

Rules = Mapping[str, tuple[str, float]]
"""Task whose masks are confirmed -> (task whose findings confirm them, their least score)."""


def rules(config: Mapping[str, Any], tasks: Mapping[str, Any]) -> Rules:
    """Reads and checks `config.eval.confirm`.

    Args:
      config: task -> `{'by': task, 'score': least score}`. tasks: of the run, by name.

    Raises:
      UserError: a task that there is not, that has no masks or no findings; an option missing or out of range; a score
        below the least that findings are reported with.
    """
    read = {}
    for name, rule in config.items():
        where = f"config: eval.confirm.{name}"
        if name not in tasks or tasks[name].kind != "dense":
            dense = [other for other, task in tasks.items() if task.kind == "dense"]
            raise UserError(f"{where}: no task '{name}' with masks; there are: {', '.join(dense) or 'none'}")
        if not hasattr(rule, "items"):
            raise UserError(f"{where} must be a table such as {{'by': 'nodules', 'score': 0.3}}, not {rule!r}")
        given = dict(rule.items())
        if unknown := [key for key in given if key not in KEYS]:
            raise UserError(f"{where}: no option '{unknown[0]}'; there are: {', '.join(KEYS)}")
        by, score = given.get("by", ""), given.get("score", 0.5)
        if by not in tasks or tasks[by].kind != "findings":
            others = [other for other, task in tasks.items() if task.kind == "findings"]
            raise UserError(f"{where}.by='{by}': no task of that name with findings; there are: {', '.join(others)}")
        if isinstance(score, bool) or not isinstance(score, int | float) or not 0 <= score <= 1:
            raise UserError(f"{where}.score={score!r}: a least score is a number from 0 to 1")
        if score < (least := getattr(tasks[by], "score_from", 0.0)):
            raise UserError(
                f"{where}.score={score!r}: '{by}' reports no finding below {least} (score_from), so it would act as "
                f"{least}. Raise the score, or lower eval.tasks.{by}.score_from (for validation while training as "
                f"well, tasks.{by}.score_from)"
            )
        read[name] = (by, float(score))
    return read


def confirmed(
    rules: Rules, tasks: Mapping[str, Any], probabilities: Mapping[str, np.ndarray], geometry: Any = None
) -> dict[str, np.ndarray]:
    """The probabilities of a case with the parts of masks that no finding confirms turned into background.

    Args:
      rules: what `rules` returned; without any the probabilities themselves come back.
      probabilities: task -> [X, Y, Z, K] on the prepared grid; not written to.
      geometry: of the prepared grid (`affine`: voxel -> world mm); None: voxels of 1 mm.
    """
    out = dict(probabilities)
    for name, (by, score) in rules.items():
        found = [one for one in tasks[by].decode(probabilities[by], geometry) if one.score >= score]
        drop = unconfirmed(tasks[name].decode(probabilities[name]), found, findings.affine_of(geometry))
        if drop.any():
            out[name] = probabilities[name].copy()
            out[name][drop] = 0
            if tasks[name].activation == "softmax":
                out[name][drop, 0] = 1
    return out


def unconfirmed(mask: np.ndarray, found: list[Any], affine: np.ndarray) -> np.ndarray:
    """bool [X, Y, Z]: the parts of a mask that no finding hits.

    Args:
      mask: label values [X, Y, Z], or regions bool [X, Y, Z, R]. found: with `center` and `size` in world mm.
      affine: [4, 4], voxel -> world mm.
    """
    from scipy import ndimage

    inside = mask.any(axis=-1) if mask.ndim == 4 else mask > 0
    parts, count = ndimage.label(inside, np.ones((3, 3, 3)))
    kept = np.zeros(count + 1, bool)
    kept[0] = True
    inverse, step = np.linalg.inv(affine), findings.spacing_of(affine)
    for one in found:
        middle = findings.to_world(np.asarray([one.center], float), inverse)[0]
        reach = max(float(np.mean(one.size)) / 2, float(step.max()))
        low = np.maximum(np.ceil(middle - reach / step), 0).astype(int)
        high = np.minimum(np.floor(middle + reach / step) + 1, parts.shape).astype(int)
        if (low >= high).any():
            continue
        ranges = (np.arange(a, b) for a, b in zip(low, high, strict=True))
        grid = np.meshgrid(*ranges, indexing="ij", sparse=True)
        square = sum(((g - m) * s) ** 2 for g, m, s in zip(grid, middle, step, strict=True))
        box = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
        kept[parts[box][np.asarray(square) <= reach**2]] = True
    return ~kept[parts]
