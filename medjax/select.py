"""`python -m medjax.select RUN COHORT --count=10`: which unlabelled cases a reader should label next.

    python -m medjax.select runs/hippocampus_fewshot ../shared/data/hippocampus --count=10
    python -m medjax.select runs/brain_seg new_scans/ --count=5 --by=disagreement --pool=0

Of the cases without labels the `pool` times `count` most uncertain are looked at, and of those the ones taken that lie
farthest from all cases with labels and from each other: uncertain, but not all for the same reason (Yang et al., MICCAI
2017; the second step is the greedy k-centre of Sener & Savarese, ICLR 2018). --pool=1 asks for uncertainty alone,
--pool=0 for diversity alone. docs/semi_supervised.md says how both are measured.
"""

from __future__ import annotations

from medjax import runtime

if __name__ == "__main__":
    runtime.ensure_tuned_allocator()  # starts anew, so before JAX is imported

import argparse
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from medjax import config as config_lib
from medjax.augment import sides
from medjax.errors import UserError, run_program, warn_once
from medjax.ops.windows import SlidingWindow
from medjax.predict import BASE, Run, find_inputs, read_case, write_table

BY = ("entropy", "disagreement")
_UNCERTAIN = ("softmax", "sigmoid")  # activations of tasks that say probabilities
_MAYBE = 0.05  # probability of foreground from which a voxel counts
_CONSTANT = 1e-3  # spread of a feature relative to its size under which it tells nothing


class Pick(NamedTuple):
    """A case in the order of the ranking.

    distance: to the nearest case with labels or taken before; inf: there was none; nan: not taken for its distance.
    """

    number: int
    distance: float


def entropy(p: np.ndarray, independent: bool) -> np.ndarray:
    """Entropy of probabilities [..., K] as a share of the greatest, [...]; `independent`: of K yes-or-no answers."""

    def term(q: np.ndarray) -> np.ndarray:
        return -q * np.log(np.maximum(q, 1e-12))

    if independent:
        return (term(p) + term(1.0 - p)).mean(axis=-1) / np.log(2.0)
    return term(p).sum(axis=-1) / np.log(p.shape[-1])


def uncertainty(views: Sequence[np.ndarray], independent: bool) -> dict[str, float]:
    """How uncertain a case is.

    Args:
      views: probabilities [X, Y, Z, K] of the same voxels (or [K] of the case) as said in each view.

    Returns:
      'entropy' of the mean over the views, and 'disagreement': that less the mean of the views' own entropies, the
      mutual information of view and class (Houlsby et al. 2011). Both are shares of the greatest entropy, and means
      over the voxels that may be foreground (probability from 0.05), or over all where there are none.
    """
    mean = np.mean(views, axis=0)
    whole, own = entropy(mean, independent), np.mean([entropy(p, independent) for p in views], axis=0)
    if mean.ndim > 1:
        maybe = (mean.max(axis=-1) if independent else 1.0 - mean[..., 0]) >= _MAYBE
        if maybe.any():
            whole, own = whole[maybe], own[maybe]
    return {"entropy": float(whole.mean()), "disagreement": float((whole - own).mean())}


def standardise(features: np.ndarray) -> np.ndarray:
    """Features [N, F], each with mean 0 and deviation 1 over the cases; those that are the same for all are dropped."""
    spread, size = features.std(axis=0), np.sqrt(np.square(features).mean(axis=0))
    telling = spread > _CONSTANT * np.maximum(size, 1e-12)
    kept = features[:, telling]
    return (kept - kept.mean(axis=0)) / np.maximum(spread[telling], 1e-12)


def k_centre(points: np.ndarray, centres: np.ndarray, count: int, first: int = 0) -> list[Pick]:
    """Greedy k-centre: `count` times the point farthest from all centres, which then is one.

    Its greatest distance of any point to the nearest centre is at most twice the least possible (Gonzalez 1985).

    Args:
      points: [N, F]. centres: [M, F], there already; without any, the point `first` begins.
    """
    distance = np.full(len(points), np.inf)
    for centre in centres:
        distance = np.minimum(distance, np.linalg.norm(points - centre, axis=1))
    picks: list[Pick] = []
    for _ in range(min(count, len(points))):
        number = int(distance.argmax()) if np.isfinite(distance).all() else first
        picks.append(Pick(number, float(distance[number])))
        distance = np.minimum(distance, np.linalg.norm(points - points[number], axis=1))
        distance[number] = -1.0
    return picks


def rank(scores: np.ndarray, features: np.ndarray, centres: np.ndarray, count: int, pool: float) -> list[Pick]:
    """All cases in the order in which they should be labelled; the first `count` have been chosen together.

    Args:
      scores: uncertainty [N]. features: [N, F], standardised. centres: those of the cases with labels, [M, F].
      pool: times `count`: how many of the most uncertain are chosen from; 0: all.
    """
    order = np.argsort(-scores, kind="stable")
    pooled = order[: max(count, round(pool * count))] if pool else order
    if pool == 1:
        picks = [Pick(int(i), float("nan")) for i in pooled[:count]]
    else:
        picks = [Pick(int(pooled[p.number]), p.distance) for p in k_centre(features[pooled], centres, count)]
    taken = {pick.number for pick in picks}
    return picks + [Pick(int(i), float("nan")) for i in order if i not in taken]


class Judge:
    """What a run's network makes of prepared cases.

    Args:
      mirror: axes; the views are the volume and its flips along them. shapes: of the prepared cases.

    Raises:
      UserError: in a flip it is not sure what is left and what is right.
    """

    def __init__(self, run: Run, mirror: Sequence[int], shapes: Sequence[Sequence[int]]) -> None:
        self.tasks = {n: t for n, t in run.tasks.items() if t.activation in _UNCERTAIN}
        self._run, self._predictor = run, run.predictor(shapes)
        choices = ((False, True) if axis in mirror else (False,) for axis in range(3))
        self._flips = [tuple(a for a in range(3) if flips[a]) for flips in itertools.product(*choices)]
        try:
            self._swap = sides.views(run.config.augment, self.tasks, mirror, run.plan.orientation)
        except UserError as error:
            raise UserError(f"{run.folder}: {error}; here with --mirror") from None
        x = jnp.zeros((1, *run.config.data.patch, len(run.plan.modalities)))
        width = jax.eval_shape(lambda: coarsest(run.model, run.params, x)).shape[1]

        def describe(params: Any, x: jax.Array) -> Any:
            return x[..., :0], coarsest(run.model, params, x)

        canvas = tuple(int(n) for n in np.max(np.asarray(shapes), axis=0))
        self._window = SlidingWindow(
            describe, tuple(run.config.data.patch), 0, pooled_out=width, overlap=0.0, canvas=canvas
        )

    def uncertainty(self, image: np.ndarray) -> dict[str, float]:
        """`uncertainty` of a prepared image [X, Y, Z, C], the mean over the tasks."""
        views: dict[str, list[np.ndarray]] = {name: [] for name in self.tasks}
        for axes in self._flips:
            found = self._predictor(self._run.params, np.ascontiguousarray(np.flip(image, axes)))
            for name, task in self.tasks.items():
                p = np.array(found[name], np.float64)
                if task.kind == "dense":
                    p = np.flip(p, axes)
                    # What the network calls left in a mirrored volume is right.
                    for a, b in self._swap.get(name, ()) if 0 in axes else ():
                        p[..., [a, b]] = p[..., [b, a]]
                views[name].append(p)
        every = []
        for name, task in self.tasks.items():
            # As many answers as outputs: each has a sigmoid of its own. Two classes from one output exclude each other.
            independent = task.activation == "sigmoid" and views[name][0].shape[-1] == task.outputs
            every.append(uncertainty(views[name], independent))
        return {key: float(np.mean([one[key] for one in every])) for key in BY}

    def features(self, image: np.ndarray) -> np.ndarray:
        """Features [F] of a prepared image: the mean over its windows."""
        return np.asarray(self._window(self._run.params, image)[1], np.float64)


def coarsest(model: Any, params: Any, x: jax.Array) -> jax.Array:
    """[B, X, Y, Z, C] -> [B, F]: every feature map of the backbone's coarsest grid, averaged over the grid.

    Before and after normalisation: an instance norm leaves no mean that tells one case from another.
    """
    _, state = model.apply({"params": params}, x, train=False, capture_intermediates=True, mutable=["intermediates"])
    maps = [m for m in jax.tree.leaves(state["intermediates"]["backbone"]) if m.ndim == 5 and m.shape[0] == len(x)]
    least = min(m[0, ..., 0].size for m in maps)
    kept = [m for m in maps if m[0, ..., 0].size == least]
    return jnp.concatenate([m.astype(jnp.float32).mean(axis=(1, 2, 3)) for m in kept], axis=-1)


def open_cases(run: Run, cohort: str) -> tuple[list[Any], list[Any], dict[str, str]]:
    """(cases to choose from, cases with labels, refused files) of a cohort, or of a folder of volumes.

    Of the cohort that the run was trained on these are its training cases, the labels hidden from it left hidden;
    validation and test cases are no candidates.
    """
    from medjax.data import cohort as cohorts
    from medjax.data import dataset, readers

    spec = config_lib.defaults().data
    config_lib.merge(spec, run.config.data, "data")
    path = Path(cohort).expanduser()
    own = cohort == spec.cohort or (path.exists() and path.resolve() == Path(spec.cohort).expanduser().resolve())
    if not own and path.is_dir():
        try:
            readers.recognise(path, {})
        except UserError:
            found, refused = find_inputs(path, run.plan.channels, allow_missing=run.plan.missing == "zero")
            return [cohorts.Case(name, name, images) for name, images in found.items()], [], refused
    if own:
        spec.unlabelled = True
        opened = dataset.open_cohort(spec, run.config.tasks)
        cases = dataset.open_splits(opened, spec, run.config.seed, run.config.tasks, check_content=False)["train"]
    else:
        spec.cohort, spec.layout = str(path), ""
        opened = dataset.open_cohort(spec, run.config.tasks)
        cases = opened.cases
    if tuple(opened.modalities) != tuple(run.plan.modalities):
        raise UserError(f"{cohort}: has {', '.join(opened.modalities)}; the run needs {', '.join(run.plan.modalities)}")
    labelled = [case for case in cases if set(case.targets) & set(run.tasks)]
    return [case for case in cases if case not in labelled], labelled, {}


def judge(
    run: Run, candidates: Sequence[Any], labelled: Sequence[Any], mirror: Sequence[int], tick: Callable[[int], None]
) -> tuple[list[Any], list[dict[str, float]], np.ndarray, np.ndarray, dict[str, str]]:
    """(candidates that could be read, their uncertainties, their features, those of labelled cases, what was refused).

    The features are standardised over all of them.
    """
    refused: dict[str, str] = {}
    shapes: dict[str, Any] = {}
    for case in (*candidates, *labelled):
        try:
            shapes[case.id] = run.plan.prepared_shape(case)
        except UserError as error:
            refused[case.id] = str(error)
    if not shapes:
        raise UserError(next(iter(refused.values())))
    seen = Judge(run, mirror, list(shapes.values()))
    kept, found, features, known = [], [], [], []
    for number, case in enumerate((*labelled, *candidates), 1):
        tick(number)
        if case.id not in shapes:
            continue
        try:
            image = read_case(case, run.plan)[0].image
        except UserError as error:
            refused[case.id] = str(error)
            continue
        if number <= len(labelled):
            known.append(seen.features(image))
            continue
        kept.append(case)
        found.append(seen.uncertainty(image))
        features.append(seen.features(image))
    every = standardise(np.stack([*features, *known])) if features or known else np.zeros((0, 0))
    return kept, found, every[: len(kept)], every[len(kept) :], refused


def rows(
    candidates: Sequence[Any], found: Sequence[Mapping[str, float]], ranked: Sequence[Pick], count: int
) -> list[dict[str, Any]]:
    """The ranking as a table, the best first."""
    return [
        {
            "rank": place,
            "case": candidates[pick.number].id,
            "label": "yes" if place <= count else "",
            **found[pick.number],
            "distance": pick.distance,
            "image": str(next(iter(candidates[pick.number].images.values()))),
        }
        for place, pick in enumerate(ranked, 1)
    ]


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="python -m medjax.select", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    p.add_argument("run", type=Path, help="folder of a trained run")
    p.add_argument("cohort", help="a cohort as data.cohort, or a folder of volumes; the run's own: its training cases")
    p.add_argument("--count", type=int, default=10, help="how many can be labelled (default 10)")
    p.add_argument("--by", choices=BY, default="entropy", help="how uncertainty is measured (default entropy)")
    p.add_argument("--pool", type=float, default=4.0, help="most uncertain cases looked at for each to be labelled")
    p.add_argument("--mirror", type=int, nargs="*", choices=(0, 1, 2), metavar="AXIS", help="flips that are views")
    p.add_argument("--output", type=Path, help="the table (default: RUN/select.csv)")
    p.add_argument("--checkpoint", choices=("best", "latest"), default="best")
    p.add_argument("--base", default="", metavar="FOLDER", help=BASE)
    return p


def main(argv: Sequence[str] | None = None) -> None:
    """Ranks; raises UserError for a user's mistake."""
    args = parser().parse_args(argv)
    from medjax.logging import Progress, say

    if args.count < 1:
        raise UserError(f"--count={args.count}: needs 1 or more")
    if args.pool and args.pool < 1:
        raise UserError(f"--pool={args.pool:g}: needs 1 or more, or 0 for all cases")
    run = Run(args.run, kind=args.checkpoint, base=args.base)
    if not any(task.activation in _UNCERTAIN for task in run.tasks.values()):
        raise UserError(f"{args.run}: no task says probabilities (segmentation, classification), so none is uncertain")
    mirror = views(run.config) if args.mirror is None else tuple(args.mirror)
    run.config.eval.mirror = ()  # each view is predicted by itself
    if args.by == "disagreement" and not mirror:
        why = f"{args.run}: was trained without mirroring" if args.mirror is None else "--mirror: names no axis"
        raise UserError(
            f"{why}, so there is one view of a case and nothing to disagree about; give --mirror AXIS..., or rank by "
            "--by=entropy"
        )
    candidates, labelled, refused = open_cases(run, args.cohort)
    if not candidates and not refused:
        raise UserError(f"{args.cohort}: every case has labels; there is none to choose")
    progress = Progress("case", len(candidates) + len(labelled))
    kept, found, features, centres, unread = judge(run, candidates, labelled, mirror, progress.update)
    progress.close()
    refused |= unread
    if not kept:
        raise UserError(f"{args.cohort}: none of {len(refused)} case(s) can be read: {next(iter(refused.values()))}")
    count = min(args.count, len(kept))
    if count < args.count:
        warn_once(f"{args.cohort}: there are {count} cases without labels; all are chosen")
    ranked = rank(np.array([one[args.by] for one in found]), features, centres, count, args.pool)
    table = rows(kept, found, ranked, count)
    output = args.output or args.run / "select.csv"
    output.parent.mkdir(parents=True, exist_ok=True)
    write_table(table, output)
    say(f"{'rank':>4}  {'entropy':>8}  {'disagreement':>12}  {'distance':>8}  case")
    for row in table[:count]:
        numbers = (("entropy", 8), ("disagreement", 12), ("distance", 8))
        said = (f"{row[key]:{width}.3f}" if np.isfinite(row[key]) else f"{'-':>{width}}" for key, width in numbers)
        say(f"{row['rank']:4}  {'  '.join(said)}  {row['case']}")
    say(
        f"{count} of {len(kept)} cases chosen, {len(labelled)} have labels; all ranked in {output} (step {run.step}, "
        f"{run.kind} checkpoint of {args.run})"
    )
    if refused:
        listed = "".join(f"\n  {reason}" for reason in refused.values())
        raise UserError(f"{args.cohort}: {len(refused)} case(s) could not be read and are not ranked:{listed}")


def views(config: Any) -> tuple[int, ...]:
    """Axes along which a run's volumes are flipped in prediction, or else were in training."""
    axes, _ = sides.mirrored(config.augment)
    return tuple(int(axis) for axis in config.eval.mirror or axes)


if __name__ == "__main__":
    run_program(main)
