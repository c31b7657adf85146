"""Tasks: each says its targets, head, loss, metrics and how to decode what the network says.

A batch carries `<task>/target` and `<task>/mask` (bool[B]: False where the case has no label for the task), so cases
labelled for some tasks only train together.

Four kinds of task differ in how whole cases are predicted, and the spines ask for nothing but the kind:

| kind | head's first output | over a whole case | decoded | written |
|---|---|---|---|---|
| `dense` | f32[B, X, Y, Z, K] | sliding window; logits averaged | mask on the file's grid | NIfTI |
| `findings` | f32[B, X, Y, Z, K] | sliding window; logits averaged | `Found`s, in world mm (RAS+) | one row a finding |
| `case` | f32[B, K] | the same windows; mean of logits, each once | value a name | one row a name |
| `pretext` | the task's own | not at all: measured on one fixed patch a case | - | - |

A `pretext` task is self-supervised: it has no target, every case trains it, and it sends a view of its own through the
shared backbone (`medjax.tasks.pretext`).

All outputs are averaged in the space the head gives (logits, standardised numbers, log sizes) and pass through
`probabilities` once. A `case` task that must see everything at once takes a patch as large as the volume: one window.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import flax.linen as nn
import numpy as np
from jax import Array

from medjax.errors import UserError
from medjax.tasks.common import Activation, Kind, Odd

# type in a config -> (file, class)
TASKS = {
    "segmentation": ("segmentation", "Segmentation"),
    "classification": ("classification", "Classification"),
    "regression": ("regression", "Regression"),
    "detection": ("detection", "Detection"),
    "landmark": ("landmark", "Landmark"),
    "masked": ("masked", "Masked"),
    "autoregressive": ("autoregressive", "Autoregressive"),
    "contrastive": ("contrastive", "Contrastive"),
}


# type in a config -> options that say how answers are read and scored, which `config.eval.tasks` may change
READING = {
    "segmentation": ("nsd_tolerance", "convention", "centreline", "lesions", "lesion_dilation", "lesion_volume"),
    "classification": ("temperature", "threshold", "specificity"),
    "detection": ("score_from", "limit", "iou", "rule", "match_iou", "rates"),
    "landmark": ("score_from", "tolerance", "penalty"),
}


class Known(NamedTuple):
    """The target of one case, as prepared, or as the cohort has it.

    Attributes:
      case: its id, for messages.
      value: mask int [X, Y, Z]; class int []; number float []; vector float [K]; findings float [M, 7 + A].
      shape: of the prepared grid; None where the case is not prepared: places are then not known in its voxels.
      columns: names of the A attributes of findings.
      geometry: the way back (`affine`: prepared voxel -> world mm); None: voxels of 1 mm along the world's axes.
    """

    case: str
    value: np.ndarray
    shape: tuple[int, int, int] | None
    columns: tuple[str, ...] = ()
    geometry: Any = None


class Task(Protocol):
    """What the spines ask of a task. Shapes: B examples, K output channels."""

    name: str
    weight: float

    @property
    def kind(self) -> Kind:
        """How whole cases are predicted, see the module."""

    @property
    def targets(self) -> tuple[str, ...]:
        """Kinds of target that fit: of 'mask', 'class', 'number', 'vector', 'findings' (`medjax.data.targets`)."""

    @property
    def width(self) -> int:
        """Numbers in a vector target (K); 0 where the target is no vector."""

    @property
    def outputs(self) -> int:
        """Channels of the head's first output."""

    @property
    def odd(self) -> Odd:
        """Output channels that change sign when the volume is mirrored along x, along y, along z (offsets)."""

    @property
    def activation(self) -> Activation:
        """What makes the head's first output comparable between two networks (`medjax.semi`): 'softmax' over its
        channels, 'sigmoid' of each, 'identity' for numbers; '' where outputs cannot be compared one by one."""

    def head(self) -> nn.Module:
        """From the pyramid to a list of outputs; the first is what whole cases are predicted with."""

    def fit(self, known: Sequence[Known]) -> dict[str, Any]:
        """Checks the training cases' targets and learns from them.

        Returns:
          Options of this task type to write into its part of the config, from which the task is then built again:
          class weights, the scale of a number. They travel with the checkpoint's config. Empty if there is nothing to
          learn, or the config says it already.

        Raises:
          UserError: no target at all, a class out of range or not finite, a class without an example...
        """

    def check_target(self, one: Known) -> None:
        """Raises UserError, naming task and case, for a target that the task cannot be taught or scored with."""

    def prepare(self, key: Array, batch: dict[str, Array]) -> dict[str, Array]:
        """The batch with this task's targets in the form its loss takes; runs on the device, inside jit.

        May add keys `<task>/...`, every one with the examples along the first axis.

        Args:
          key: of the run. What is random is drawn from it folded with `batch['example']`, example by example.
        """

    def loss(self, outputs: Any, batch: Mapping[str, Array]) -> Array:
        """Loss of each example [B]; the step weighs them by `<task>/mask` and the task by `weight`.

        Finite, with a finite gradient, for unlabelled examples too.
        """

    def probabilities(self, outputs: Array) -> Array:
        """Averaged outputs [..., K] -> what `decode` takes, [..., K] (or other channels for 'case')."""

    def decode(self, outputs: np.ndarray, geometry: Any = None) -> Any:
        """What `probabilities` gave for one case -> what a user reads.

        Args:
          outputs: dense and findings: [X, Y, Z, K] on the prepared grid; case: [K].
          geometry: the way back to the file's own grid (`affine`: prepared voxel -> world mm). Without it masks stay on
            the prepared grid, and a voxel of findings is taken to be 1 mm with its index as the place.
        """

    def reference(self, value: np.ndarray, geometry: Any = None) -> Any:
        """A case's target as prepared (`Known.value`) -> what `score` compares with.

        Findings move to world millimetres; class, number and vector stay. Masks too, though whole cases are scored
        against the mask file itself.
        """

    def score(
        self, prediction: Any, reference: Any, spacing: Sequence[float], voxel: float | None = None
    ) -> list[dict[str, Any]]:
        """Rows of one case: each has 'class', and what `summarize` needs.

        A case may have several rows of one class (findings); one that has none to report still gives a row.

        Args:
          prediction: from `decode`. reference: mask on the same grid, or from `reference`. spacing: of the grid, mm.
          voxel: mm³ of one of its voxels; None: the product of `spacing`, which is too large where it is sheared.
        """

    def summarize(self, rows: Sequence[Mapping[str, Any]], *, resamples: int = 1000) -> dict[str, Any]:
        """Metrics of a cohort from the rows of its cases, to which the spine has added 'case' and 'group'.

        Args:
          resamples: of the bootstrap; 0: no intervals, for scores while training.

        Returns:
          `{metric: {"mean": m, "ci95": [low, high], "per_class": {class: {"mean": m, "ci95": [low, high], "n": n}}}}`,
          with `of` where n is of so many, and None where undefined; the metrics of most interest first. Intervals are
          95 % bootstrap over patients.
        """

    def selection(self, summary: Mapping[str, Any]) -> float:
        """One number from `summarize`, the higher the better and 0 to 1 in the usual case, by which the best checkpoint
        is chosen; several tasks' are averaged. 0 where nothing could be scored."""

    def table(self, decoded: Any) -> list[dict[str, Any]]:
        """What `decode` returned as rows of plain numbers and texts, to be written as CSV or JSON; dense: empty."""


class DenseTask(Task, Protocol):
    """What evaluation and prediction ask of a task of kind 'dense' besides."""

    @property
    def classes(self) -> dict[str, tuple[int, ...]]:
        """What is scored: name -> values of the target it covers."""

    @property
    def paintable(self) -> bool:
        """Whether a prediction fits in one label map."""

    def paint(self, decoded: Any) -> np.ndarray:
        """What `decode` returned as one label map."""


def _class(kind: str) -> Any:
    if kind not in TASKS:
        raise UserError(f"config: task type '{kind}' is not known; known: {', '.join(sorted(TASKS))}")
    file, cls = TASKS[kind]
    return getattr(importlib.import_module(f"medjax.tasks.{file}"), cls)


def options(kind: str) -> dict[str, Any]:
    """The options of a task type and their defaults."""
    skip = {"name", "labels"}
    return {
        f.name: f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default
        for f in dataclasses.fields(_class(kind))
        if f.name not in skip
    }


def build(config: Mapping[str, Any], labels: Mapping[str, int]) -> dict[str, Any]:
    """The tasks of `config.tasks`, bound to the cohort's labels (name -> value in the mask file).

    Raises UserError for no task, a type or an option that is not known, and what a task cannot mean.
    """
    if not config:
        raise UserError("config: no tasks; set e.g. config.tasks = {'organ': {'type': 'segmentation'}}")
    built = {}
    for name, c in config.items():
        cls = _class(c["type"])
        bound = {"labels": dict(labels)} if "labels" in {f.name for f in dataclasses.fields(cls)} else {}
        built[name] = cls(name=name, **bound, **{k: v for k, v in c.items() if k != "type"})
        if not 0 <= built[name].weight < float("inf"):
            raise UserError(f"config: tasks.{name}.weight={built[name].weight}: needs a number from 0 on")
    return built


def read_as(config: Mapping[str, Any], reading: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """`config.tasks` with the options of `config.eval.tasks`, which say how a trained network's answers are read.

    Args:
      config: `config.tasks`. reading: task -> options, of `READING` alone.

    Raises:
      UserError: a task that there is not, an option that training depends on or nobody knows, a value of another type.
    """
    merged = {name: dict(c.items()) for name, c in config.items()}
    for name, given in reading.items():
        where = f"config: eval.tasks.{name}"
        if name not in merged:
            raise UserError(f"{where}: no task '{name}'; there are: {', '.join(merged)}")
        if not hasattr(given, "items"):
            raise UserError(f"{where} must be a table of options such as {{'temperature': 1.7}}, not {given!r}")
        kind = merged[name]["type"]
        for key, value in given.items():
            if key not in READING.get(kind, ()):
                raise UserError(
                    f"{where}.{key}: not one of the options by which the answers of a trained '{kind}' are read: "
                    f"{', '.join(READING.get(kind, ())) or 'it has none'}"
                )
            default = options(kind)[key]
            right = int | float if isinstance(default, float) else tuple | list if key == "rates" else type(default)
            if not isinstance(value, right) or (isinstance(value, bool) and not isinstance(default, bool)):
                raise UserError(f"{where}.{key}={value!r} must be of the type of its default, {default!r}")
            merged[name][key] = value
    return merged


def fit(config: Mapping[str, Any], built: Mapping[str, Any], known: Mapping[str, Sequence[Known]]) -> dict[str, Any]:
    """What the tasks learn from the training cases: task -> options to write into `config.tasks.<task>`.

    Args:
      config: `config.tasks`. built: from `build`. known: task -> targets of the training cases that have one.

    Raises:
      UserError: a task without a target in any case, or targets that do not fit it.
    """
    found = {name for name, values in known.items() if len(values)}
    built = {name: task for name, task in built.items() if task.kind != "pretext"}
    for name in built:
        if name not in found:
            import difflib

            near = difflib.get_close_matches(name, found, n=1, cutoff=0.5)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            raise UserError(
                f"task '{name}': no training case has a target of that name{hint} (targets there: "
                f"{', '.join(sorted(found)) or 'none'}). Rename the task, or give the cases that target."
            )
    learnt = {name: task.fit(known[name]) for name, task in built.items()}
    return {name: {k: v for k, v in values.items() if config[name].get(k) != v} for name, values in learnt.items()}


def self_supervised(built: Mapping[str, Any]) -> dict[str, Any]:
    """The self-supervised ones among tasks."""
    return {name: task for name, task in built.items() if task.kind == "pretext"}


def views(built: Mapping[str, Any], batch: Mapping[str, Array]) -> dict[str, dict[str, Array]]:
    """What the self-supervised tasks send through the backbone for a prepared batch: task -> view."""
    return {name: task.view(batch) for name, task in self_supervised(built).items()}
