"""Learning from examples without labels (`config.semi`), inside the train step.

| method | who teaches | what the student is asked |
|---|---|---|
| `mean_teacher` | the average of the student's parameters | the same probabilities, where the teacher is certain |
| `fixmatch` | the student itself on the weak view | the class that the teacher is confident of |
| `cps` | a second network, begun elsewhere; it learns likewise | the class that the other network says |

Tarvainen & Valpola, NeurIPS 2017, with the uncertainty of Yu et al., MICCAI 2019; Sohn et al., NeurIPS 2020; Chen et
al., CVPR 2021. The average is `State.average`, which is what is evaluated.

`config.augment` makes the weak view, `semi.strong` the student's view of the examples that are compared: intensities
alone change, so that voxel stays beside voxel, and a label beside its tissue. Nothing here has state of its own: views
and noise depend on (seed, example).

Where `data.sampling.labelled` says how many rows at least are not compared, these are left out of the strong view and
of the teacher's passes (`Semi.rows`).
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from ml_collections import ConfigDict

from medjax.augment import base, mixing, policy
from medjax.data.sampler import fewest
from medjax.errors import UserError
from medjax.ops import normal

# Method -> threshold as published.
METHODS = {"mean_teacher": 0.75, "fixmatch": 0.95, "cps": 0.0}
UNCERTAINTY = ("threshold", "entropy", "none")
LOSSES = ("mse", "dice")
CASES = ("unlabelled", "all")

Forward = Callable[..., dict[str, Any]]
"""(parameters, image [B, X, Y, Z, C], dropout key, train=True) -> task -> the head's outputs."""


def ramp(step: Any, length: int) -> Any:
    """exp(-5 (1 - t)²) with t = step / length, and 1 from `length` on (Laine & Aila, ICLR 2017)."""
    return jnp.exp(-5.0 * (1.0 - jnp.minimum(step / length, 1.0)) ** 2) if length else jnp.ones(())


def said(outputs: Array, activation: str) -> Array:
    """What two networks are compared by, [B, ..., K]: probabilities; numbers as they are."""
    if activation == "softmax":
        return jax.nn.softmax(outputs, axis=-1)
    return jax.nn.sigmoid(outputs) if activation == "sigmoid" else outputs


def entropy(p: Array, activation: str) -> Array:
    """Entropy of probabilities [..., K] as a share of the greatest: [..., 1] of a softmax, [..., K] of sigmoids.

    Numbers have none: zeros.
    """
    if activation == "softmax":
        return jnp.sum(jax.scipy.special.entr(p), axis=-1, keepdims=True) / jnp.log(float(p.shape[-1]))
    if activation == "sigmoid":
        return (jax.scipy.special.entr(p) + jax.scipy.special.entr(1.0 - p)) / jnp.log(2.0)
    return jnp.zeros_like(p)


def consistency(student: Array, teacher: Array, weight: Array) -> Array:
    """Mean square difference of each example [B], over channels and voxels, weighed by `weight` [B, ..., 1 or K].

    0 where every weight is 0.
    """
    axes = tuple(range(1, student.ndim))
    weight = jnp.broadcast_to(weight, student.shape)
    total = jnp.sum(weight, axes)
    squares = jnp.sum(weight * jnp.square(student - teacher), axes)
    return jnp.where(total > 0, squares / jnp.where(total > 0, total, 1.0), 0.0)


def overlap_loss(student: Array, teacher: Array, weight: Array, smooth: float = 1.0) -> Array:
    """1 - the mean over channels of 2 Σ w p q / (Σ w p² + Σ w q²), of each example [B], as small structures need it.

    With squares below (Milletari et al. 2016) it is 0 where both say the same, which plain soft Dice is not unless all
    of it is certain. `smooth` voxels are added above and below: 0 where neither says anything.

    Args:
      student, teacher: probabilities [B, *S, K]. weight: [B, *S, 1 or K].
    """
    axes = tuple(range(1, student.ndim - 1))
    both = jnp.sum(weight * student * teacher, axes)
    each = jnp.sum(weight * (jnp.square(student) + jnp.square(teacher)), axes)
    return 1.0 - jnp.mean((2.0 * both + smooth) / (each + smooth), axis=-1)


def pseudo_loss(outputs: Array, teacher: Array, threshold: float, activation: str) -> Array:
    """Cross-entropy of each example [B] with the class that the teacher's probabilities favour.

    Where its confidence is below `threshold` the cross-entropy counts as 0; the mean is over all voxels, as published.
    """
    if activation == "softmax":
        confident = jnp.max(teacher, axis=-1) >= threshold
        label = jnp.argmax(teacher, axis=-1)
        loss = -jnp.take_along_axis(jax.nn.log_softmax(outputs, axis=-1), label[..., None], axis=-1)[..., 0]
    else:
        confident = jnp.maximum(teacher, 1.0 - teacher) >= threshold
        loss = jax.nn.softplus(jnp.where(teacher > 0.5, -outputs, outputs))
    return jnp.mean(jnp.where(confident, loss, 0.0), axis=tuple(range(1, loss.ndim)))


class Semi:
    """What `config.semi` adds to the train step.

    Args:
      tasks: of the run. rampup: `semi.rampup` in steps.
      labelled: of each training case, the tasks it has a label for.
      consecutive: whether the rows that `loss` is given follow one another in the order of the examples and lie on one
        device; else the teacher sees them all.

    Attributes:
      two: whether there is a second network.
      masks: keys of the batch, bool [B], that `views` adds: whose outputs are compared for which task.
    """

    def __init__(
        self,
        config: ConfigDict,
        tasks: Mapping[str, Any],
        rampup: int,
        labelled: Sequence[Sequence[str]],
        consecutive: bool = False,
    ) -> None:
        c = config.semi
        check(c)
        self._tasks = {name: task for name, task in tasks.items() if task.activation}
        if c.method != "mean_teacher":
            self._tasks = {name: task for name, task in self._tasks.items() if task.activation != "identity"}
        if not self._tasks:
            raise UserError(
                f"config: semi.method='{c.method}': no task has outputs it can compare; segmentation and "
                "classification have, and regression for 'mean_teacher'"
            )
        if c.cases == "unlabelled" and all(set(self._tasks) <= set(known) for known in labelled):
            raise UserError(
                f"config: semi.method='{c.method}', but every training case has its labels; add cases without, hide "
                "some labels (data.labelled), or compare all of them (semi.cases='all')"
            )
        strong, _ = policy.parse({"transforms": tuple(c.strong)})
        if others := [t.name for t in strong if not isinstance(t, base.OnImage | mixing.ModalityDropout)]:
            raise UserError(
                f"config: semi.strong: '{others[0]}' changes more than intensities, so the two views could not be "
                "compared voxel by voxel; it belongs into config.augment"
            )
        self.two = c.method == "cps"
        self.masks = tuple(f"semi/{name}" for name in self._tasks)
        self._config, self._rampup, self._consecutive = c, rampup, consecutive
        # The share of the examples that the sampler takes of cases with a label, if none of those is compared: one that
        # lacks the label of another task is. A self-supervised task has no label.
        supervised = {name for name, task in tasks.items() if task.kind != "pretext"}
        known = [supervised & set(case) for case in labelled]
        sure = c.cases == "unlabelled" and any(known) and all(set(self._tasks) <= case for case in known if case)
        self._labelled = config.data.sampling.labelled if sure else 0.0
        self._threshold = METHODS[c.method] if c.threshold is None else c.threshold
        # A stream of its own: the strong view must not repeat the weak one's draws.
        self._seed = zlib.crc32(f"semi:{config.seed}".encode())
        self._strong = policy.build({"transforms": tuple(c.strong)}, (), self._seed)

    def ramp(self, step: Any) -> Any:
        """How far the ramp is, 0 to 1."""
        return ramp(step, self._rampup)

    def rows(self, batch: Mapping[str, Array]) -> Array | None:
        """Numbers, rising, of the rows int32 [n] among which all are that some task compares; None: of all rows.

        n is the same in every step: B less as many as `data.sampling.labelled` gives labels at least, whatever rows
        those are. It needs B rows that follow one another in the order of the examples.
        """
        size = batch["example"].shape[0]
        most = max(1, size - fewest(self._labelled, size))
        if most == size:
            return None
        return jnp.sort(jnp.argsort(~self._compared(batch), stable=True)[:most])

    def _compared(self, batch: Mapping[str, Array]) -> Array:
        """bool [B]: whether some task compares the example."""
        return jnp.any(jnp.stack([batch[key] for key in self.masks]), axis=0)

    def views(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Adds `masks` and `semi/image`, the teacher's view; examples that are compared get their strong view.

        The batch is one device's rows.
        """
        masks = {
            key: batch["valid"] & (~batch[f"{key[5:]}/mask"] if self._config.cases == "unlabelled" else True)
            for key in self.masks
        }
        if self.two:
            return {**batch, **masks}
        rows, compared = self.rows(batch | masks), self._compared(masks)
        weak = {key: _take(batch[key], rows) for key in ("image", "modality", "spacing", "example")}
        strong = self._strong(weak)["image"]
        image = jnp.where(_take(compared, rows).reshape(-1, 1, 1, 1, 1), strong, weak["image"])
        if rows is not None:
            image = batch["image"].at[rows].set(image, unique_indices=True, indices_are_sorted=True)
        return {**batch, **masks, "image": image, "semi/image": batch["image"]}

    def loss(
        self,
        forward: Forward,
        outputs: Mapping[str, Any],
        other: Any,
        batch: Mapping[str, Array],
        share: Mapping[str, Any],
        key: Array,
        step: Any,
    ) -> tuple[Any, dict[str, Any]]:
        """The loss, weighed and ramped, and each task's without the weights.

        Args:
          outputs: of the student, on `batch['image']`.
          other: 'cps': the second network's outputs on the same; else the teacher's parameters.
          share: `semi/<task>` -> what each example's loss is multiplied by.
          key: of the dropout.
        """
        rise = self.ramp(step)
        # Two networks have to see the labelled rows anyway.
        rows = self.rows(batch) if self._consecutive and not self.two else None
        taught = None if self.two else self._teach(forward, jax.lax.stop_gradient(other), batch, rows, key)
        total, parts = 0.0, {}
        for name, task in self._tasks.items():
            own, kind = _take(outputs[name][0], rows), task.activation
            if taught is None:
                theirs = other[name][0]
                each = self._pseudo(own, said(theirs, kind), kind) + self._pseudo(theirs, said(own, kind), kind)
            elif self._config.method == "fixmatch":
                each = self._pseudo(own, taught[name], kind)
            else:
                weight = self._certainty(entropy(taught[name], kind), rise)
                each = self._compare(said(own, kind), taught[name], weight, kind)
            counted = jnp.where(_take(batch[f"semi/{name}"], rows), each, 0.0)
            parts[f"semi/{name}"] = jnp.sum(counted) * share[f"semi/{name}"]
            total += task.weight * parts[f"semi/{name}"]
        return self._config.weight * rise * total, parts

    def _pseudo(self, outputs: Array, teacher: Array, kind: str) -> Array:
        return pseudo_loss(outputs, jax.lax.stop_gradient(teacher), self._threshold, kind)

    def _compare(self, student: Array, teacher: Array, weight: Array, kind: str) -> Array:
        """What `semi.loss` says of two predictions, [B]; of a case as a whole, and of numbers, their mean square."""
        if self._config.loss == "mse" or kind == "identity" or student.ndim < 3:
            return consistency(student, teacher, weight)
        if kind == "softmax":  # the background is nearly everything, and says no more than the others do
            student, teacher = student[..., 1:], teacher[..., 1:]
        return overlap_loss(student, teacher, weight)

    def _certainty(self, uncertain: Array, rise: Any) -> Array:
        """Weight of what the teacher says, from its entropy as a share of the greatest."""
        if self._config.uncertainty == "entropy":
            return 1.0 - uncertain
        if self._config.uncertainty == "none":
            return jnp.ones_like(uncertain)
        return (uncertain <= self._threshold + (1.0 - self._threshold) * rise).astype(uncertain.dtype)

    def _teach(
        self, forward: Forward, params: Any, batch: Mapping[str, Array], rows: Array | None, key: Array
    ) -> dict[str, Array]:
        """What the teacher says of its view of `rows`, task -> [n, ..., K]: the mean over its passes."""
        passes = self._config.passes
        image, modality, examples = (_take(batch[k], rows) for k in ("semi/image", "modality", "example"))

        def once(number: Any) -> dict[str, Array]:
            seen = image
            if self._config.method == "mean_teacher" and self._config.noise:
                root = jax.random.fold_in(jax.random.key(self._seed), number)
                keys = jax.vmap(lambda e: jax.random.key_data(jax.random.fold_in(root, e)))(examples)
                noise = jnp.clip(normal.normal(keys, image[0].size), -2.0, 2.0).reshape(image.shape)
                # What an example lacks stays as it is, as in every view of the student.
                noise = jnp.where(modality[:, None, None, None], noise, 0.0)
                seen = image + (self._config.noise * noise).astype(image.dtype)
            # Several passes differ in their dropout too: Monte Carlo.
            outputs = forward(params, seen, jax.random.fold_in(key, number), train=passes > 1)
            return {name: said(outputs[name][0], task.activation) for name, task in self._tasks.items()}

        if passes == 1:
            return jax.lax.stop_gradient(once(jnp.uint32(1)))
        found = jax.lax.map(once, jnp.arange(1, passes + 1, dtype=jnp.uint32))
        return jax.lax.stop_gradient({name: p.mean(axis=0) for name, p in found.items()})


def _take(x: Array, rows: Array | None) -> Array:
    """Those rows of `x`; None: all."""
    return x if rows is None else x.at[rows].get(unique_indices=True, indices_are_sorted=True)


def check(c: Mapping[str, Any]) -> None:
    """Raises UserError for what `config.semi` cannot mean."""
    if c["method"] not in METHODS:
        raise UserError(f"config: semi.method '{c['method']}' is not known; known: {', '.join(METHODS)}")
    for key, known in (("uncertainty", UNCERTAINTY), ("cases", CASES), ("loss", LOSSES)):
        if c[key] not in known:
            raise UserError(f"config: semi.{key} '{c[key]}' is not known; known: {', '.join(known)}")
    if c["loss"] != "mse" and c["method"] != "mean_teacher":
        raise UserError(
            f"config: semi.loss='{c['loss']}' is how the mean teacher compares; semi.method='{c['method']}' asks "
            "for the teacher's class by its cross-entropy: leave semi.loss out"
        )
    for key, alone in (("uncertainty", "threshold"), ("passes", 1)):
        if c[key] != alone and c["method"] != "mean_teacher":
            raise UserError(
                f"config: semi.{key}={c[key]!r} is of the mean teacher; semi.method='{c['method']}' has no use for it: "
                f"leave semi.{key} out"
            )
    share = c["threshold"]
    if share is not None and (not isinstance(share, int | float) or not 0 <= share <= 1):
        raise UserError(f"config: semi.threshold={share}: needs a number from 0 to 1")
    for key, least in (("weight", 0), ("noise", 0), ("passes", 1)):
        if not c[key] >= least:
            raise UserError(f"config: semi.{key}={c[key]}: needs {least} or more")


def average_decay(config: ConfigDict) -> float:
    """Decay of the average that is kept of the parameters, from 0 on and less than 1 (`config.LIMITS`); 0: none is."""
    return float(config["semi" if config.semi.method == "mean_teacher" else "optim"].ema)
