"""Where a run's first weights come from (`config.init`): another run, one of its checkpoints, or converted weights.

Names are mapped by rules, and what does not have the shape it needs is reshaped only by a rule that was asked for:

- `channels`, for another number (or other names) of modalities: 'average' spreads the kernel's sum over its input
  channels evenly, so that equal channels give the response they gave before; by 'names' a modality keeps its own
  weights, and one the source did not have begins at zero.
- `kernels`, for larger convolution kernels of the same channels: 'trilinear' is UpKern (Roy et al. 2023).
- `positions`, for another grid of a transformer's tokens, or of their offsets in a window: 'trilinear'. Learnt
  positions become what the network itself makes of them for another image; of windows it would cut out the middle.

A run begins from them at step 0 only; one that goes on from its own checkpoint does not look at them again. Where few
parameters train (`config.peft`), its checkpoints hold those alone and refer to the source for the rest: then the
source is read each time, and must be what it was, bit for bit.
"""

from __future__ import annotations

import difflib
import json
import math
import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from medjax import checkpoint, convert, models, peft, tasks
from medjax import config as config_lib
from medjax.errors import UserError, check_regex, warn_once
from medjax.models import stages
from medjax.models.model import build_model

Weights = dict[str, np.ndarray]

_KINDS = ("best", "latest")
_CHANNELS = ("", "average", "names")
_INTERPOLATED = ("", "trilinear")
_GRIDS = ("position", "bias_table")  # parameters that lie on a grid of tokens, or of their offsets
_TORCH = (".pth", ".pt", ".ckpt", ".bin", ".safetensors")


@dataclass(frozen=True)
class Source:
    """Weights to begin from.

    Attributes:
      path: as it was given. where: that, checkpoint and step, for people. params: path -> array.
      model: the backbone's `name` and options.
      modalities: of the images it saw, in the order of the channels; (): not known. kind, step: of the checkpoint.
      decoded: False if its decoder, begun at random, was in no task's way, so that it never learnt.
    """

    path: Path
    where: str
    params: Weights
    model: Mapping[str, Any]
    modalities: tuple[str, ...] = ()
    kind: str = ""
    step: int = -1
    decoded: bool = True


@dataclass(frozen=True)
class Target:
    """What is to be filled.

    Attributes:
      model: the backbone's `name` and options. shapes: of every parameter, by path. stems: parameters that see the
        image -> their axis of input channels. modalities: of the images.
    """

    model: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    stems: Mapping[str, int]
    modalities: tuple[str, ...]


@dataclass
class Start:
    """What became of a source's arrays.

    Attributes:
      params: path -> array of the network that begins. reshaped: path -> what was done to it. missing: paths that keep
        their random start. unused: the source's names that found no place. untrained: paths of `params` that the source
        never trained either (`Source.decoded`).
    """

    source: Source
    params: Weights = field(default_factory=dict)
    reshaped: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    untrained: list[str] = field(default_factory=list)

    def reference(self, paths: Iterable[str], folder: Path) -> dict[str, Any]:
        """What a checkpoint in the run `folder` says of the parameters at `paths` instead of holding them."""
        source = self.source
        beside = os.path.relpath(source.path.resolve(), folder.resolve())
        about = {"source": str(source.path), "beside": beside, "kind": source.kind, "step": source.step}
        return {**about, "sha256": peft.digest(self.params, paths)}

    def verify(self, reference: Mapping[str, Any], paths: Collection[str], folder: Path) -> None:
        """Raises UserError unless the parameters at `paths` are those that the reference was made of."""
        missing = [path for path in paths if path not in self.params]
        if missing:
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            raise UserError(
                f"{self.source.where}: the network has parameters here that neither this nor {folder} has: "
                f"{', '.join(missing[:3])}{more}; a key of model, init or peft has changed since, or the version of "
                "medjax"
            )
        if peft.digest(self.params, paths) != reference["sha256"]:
            raise UserError(
                f"{self.source.where}: has other weights than {reference['source']} had, of which {folder} holds a "
                "change, or a key of init or peft has changed since"
            )


def open_start(
    config: ConfigDict,
    model: Any,
    modalities: Sequence[str],
    folder: Path,
    reference: Mapping[str, Any] | None = None,
    own: Collection[str] = (),
) -> Start | None:
    """Reads `config.init.source`, its `{seed}` filled in, and maps it onto the parameters of `model`; None without.

    Args:
      folder: of the run. reference: of a run that goes on, or is read: what its checkpoint says of the source.
      own: with a reference: paths that the checkpoint holds itself.
    """
    where = config.init.source.replace("{seed}", str(config.seed))
    if reference:
        return _referred(where, describe(config, model, modalities), config.init, folder, reference, own)
    start = None
    if where:
        start = match(read(Path(where), config.init.which), describe(config, model, modalities), config.init)
    if config.model.get("norm") == "batch_frozen":
        _check_statistics(start, describe(config, model, modalities).shapes)
    return start


def _check_statistics(start: Start | None, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuses to begin with frozen normalisations whose statistics nobody measured: they would do nothing, for good.

    Where the source has those of some, what is without is told: it may have been left out on purpose.
    """
    needed = peft.statistics(shapes)
    without = sorted({path.rpartition("/")[0] for path in needed.difference(start.params if start else ())})
    if not without:
        return
    which = ", ".join(without[:3]) + (f" and {len(without) - 3} more" if len(without) > 3 else "")
    what = "have no statistics: they would stay at mean 0 and variance 1 for good, which is no normalisation"
    if 2 * len(without) == len(needed):
        held = f"init.source {start.source.where} holds none" if start else "init.source is empty"
        raise UserError(
            f"config: model.norm='batch_frozen' keeps the statistics of converted weights, and {held}: {which} {what}. "
            "Give converted weights by init.source=FOLDER (python -m medjax.convert), or set model.norm='instance'"
        )
    warn_once(f"init.source: with model.norm='batch_frozen' {which} {what}")


def _referred(
    given: str,
    target: Target,
    rules: Mapping[str, Any],
    folder: Path,
    reference: Mapping[str, Any],
    own: Collection[str],
) -> Start:
    """The weights of a reference, from the first place that has them: given, beside the run, as it was named."""
    named = [given] if given != reference["source"] else []
    places = [*map(Path, filter(None, named)), folder / reference["beside"], Path(reference["source"])]
    tried = {place.resolve(): place for place in places}  # what is one place is called as it was named
    paths = [path for path in target.shapes if path not in own]
    failures = []
    for place in tried.values():
        try:
            if not place.exists():
                raise UserError(f"{place}: is not there")
            kind = reference["kind"]
            start = match(read(place, kind or "best", reference["step"] if kind else None), target, rules)
            start.verify(reference, paths, folder)
        except UserError as error:
            failures.append(str(error))
        else:
            return start
    raise UserError(
        f"{folder}: its checkpoints hold a change of {reference['source']}, which is not found as it was:"
        + "".join(f"\n  {failure}" for failure in failures)
        + "\nPut it back, or say where it is: --config.init.source=FOLDER of medjax.main, --base=FOLDER of "
        "medjax.predict, medjax.select and medjax.merge."
    )


def describe(config: ConfigDict, model: Any, modalities: Sequence[str]) -> Target:
    """The parameters of `model` for images of `modalities`."""

    def shapes(channels: int) -> dict[str, tuple[int, ...]]:
        x = jnp.zeros((1, *config.data.patch, channels))
        made = jax.eval_shape(lambda: model.init(jax.random.key(0), x, train=True)["params"])
        return {name: tuple(leaf.shape) for name, leaf in peft.flat(made).items()}

    here, wider = shapes(len(modalities)), shapes(len(modalities) + 1)
    # What grows with the number of channels sees the image: the axis that grows is that of the channels.
    grown = {p: [a != b for a, b in zip(shape, wider[p], strict=True)] for p, shape in here.items()}
    stems = {p: axes.index(True) for p, axes in grown.items() if any(axes) and p.startswith("backbone/")}
    return Target(config.model.to_dict(), here, stems, tuple(modalities))


def fill(tree: Any, params: Mapping[str, np.ndarray]) -> Any:
    """The tree with the leaves that `params` has in their place, laid out over the devices as they were."""

    def put(path: Any, leaf: Any) -> Any:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name not in params:
            return leaf
        found = np.asarray(params[name], leaf.dtype)
        return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda index: found[index])

    return jax.tree_util.tree_map_with_path(put, tree)


# --- sources ---------------------------------------------------------------------------------------------------------


def read(path: Path, which: str = "best", step: int | None = None) -> Source:
    """Reads a run folder, a folder within its `checkpoints`, or `params.npz` of `medjax.convert` (or its folder).

    Of a run that kept averaged weights these are taken; where it trained a change of others (`config.peft`), both
    together.

    Args:
      which: of a run's checkpoints, 'best' (without one 'latest') or 'latest'. step: of it; None: the newest.

    Raises:
      UserError: nothing of that kind is there, or it is damaged.
    """
    if which not in _KINDS:
        raise UserError(f"config: init.which '{which}' is not known; known: {', '.join(_KINDS)}")
    if path.suffix in _TORCH:
        raise UserError(
            f"{path}: init.source takes converted weights: python -m medjax.convert --from={path} --to=FOLDER "
            "--model=NAME, then init.source=FOLDER"
        )
    if not path.exists():
        name = path.name.removesuffix("_debug")
        recipe = f"configs/{name}.py{':debug' if name != path.name else ''}"
        # A recipe's arguments are part of its run's name, unless --workdir says otherwise.
        first = f"run --config={recipe} first, with --workdir={path}, or give source=, or "
        first = first if path.parent.name == "runs" else ""
        raise UserError(f"{path}: there is no such run, checkpoint or params.npz; {first}correct init.source")
    if path.is_file() or (path / convert.FILE).is_file():
        tree, about = convert.load(path)
        return Source(path, str(path), peft.flat(tree), about.get("model", {}))
    run, kind, named = _locate(path.resolve(), which)
    checkpoints = checkpoint.Checkpoints(checkpoint.require(run), read_only=True)
    try:
        return _of_run(checkpoints, run, path, kind, step if named is None else named)
    finally:
        checkpoints.close()


def _locate(path: Path, which: str) -> tuple[Path, str, int | None]:
    """(run folder, kind, step) of a run folder or of a folder within its checkpoints; step None: the newest."""
    if path.name.isdigit() and path.parent.name in _KINDS:
        return path.parents[2], path.parent.name, int(path.name)
    if path.name in _KINDS and path.parent.name == "checkpoints":
        return path.parents[1], path.name, None
    return (path.parent if path.name == "checkpoints" else path), which, None


def _of_run(checkpoints: checkpoint.Checkpoints, run: Path, path: Path, kind: str, step: int | None) -> Source:
    steps = checkpoints.steps(kind)
    if not steps and path.name not in _KINDS:
        kind, steps = "latest", checkpoints.steps("latest")
    if not steps:
        raise UserError(f"{path}: holds no complete checkpoint; train it first")
    step = steps[0] if step is None else step
    if step not in steps:
        raise UserError(f"{path}: there is no complete checkpoint of step {step}; of '{kind}' there are {steps}")
    meta = checkpoints.meta(kind, step)
    params = whole_parameters(checkpoints, kind, step, run)
    modalities = tuple(json.loads(meta["plan"])["modalities"])
    config = meta["config"]
    model, begun = config["model"], config.get("init", {}).get("source")
    decoded = bool(begun) or any(_decodes(task, model) for task in config["tasks"].values())
    return Source(path, f"{path} ({kind}, step {step})", params, model, modalities, kind, step, decoded)


def _decodes(task: Mapping[str, Any], model: Mapping[str, Any]) -> bool:
    """Whether what the backbone's decoder makes of an image is in the loss of a task, given as its section."""
    if task["type"] == "masked":
        return task.get("method") == "simmim" or task.get("decoder") == "backbone"
    if task["type"] == "contrastive":
        return task.get("scope") == "local"
    # Pooled heads may take the bottleneck alone.
    pooled = task["type"] in ("classification", "regression")
    bottom = pooled and task.get("levels") == 1 and bool(model.get("bottleneck"))
    return task["type"] != "autoregressive" and not bottom


def whole_parameters(
    checkpoints: checkpoint.Checkpoints, kind: str, step: int, folder: Path, source: str = ""
) -> Weights:
    """The parameters to evaluate of a checkpoint, as its network takes them: parts and changes put together.

    Args:
      folder: of the run. source: where what it is a change of may lie now, if elsewhere than it lay.
    """
    trained, frozen = checkpoints.parameters(kind, step)
    meta, base = checkpoints.meta(kind, step), None
    if meta.get("base"):
        config = config_lib.from_json(meta["config"])
        model = build_model(config, tasks.build(config.tasks, meta["labels"]))
        config.init.source = source or config.init.source
        own = {**peft.flat(trained), **peft.flat(frozen)}
        start = open_start(config, model, json.loads(meta["plan"])["modalities"], folder, meta["base"], own)
        assert start is not None
        base = peft.nest({path: array for path, array in start.params.items() if path not in own})
    elif source:
        warn_once(f"{folder}: its checkpoint holds all of its parameters; nothing is read from {source}")
    whole = peft.flat(peft.combine(trained, frozen, base))
    return {path: np.asarray(leaf) for path, leaf in whole.items()}


def restore_parameters(
    checkpoints: checkpoint.Checkpoints, kind: str, step: int, like: Any, folder: Path, source: str = ""
) -> Any:
    """The same in the shapes, types and shardings of `like`."""
    if not source and not checkpoints.divided(kind, step):
        return checkpoints.restore_parameters(kind, step, like)
    found = whole_parameters(checkpoints, kind, step, folder, source)
    checkpoints.check_parameters(kind, step, peft.nest(found), like)
    return fill(like, found)


# --- mapping ---------------------------------------------------------------------------------------------------------


def match(source: Source, target: Target, rules: Mapping[str, Any]) -> Start:
    """Maps a source's arrays onto a network by the rules of `config.init`.

    Raises:
      UserError: another backbone, a rule that matches nothing, an array that does not fit without a rule, two arrays
        for one place, nothing matched.
    """
    for key, known in (("channels", _CHANNELS), ("kernels", _INTERPOLATED), ("positions", _INTERPOLATED)):
        if rules[key] not in known:
            raise UserError(f"config: init.{key} '{rules[key]}' is not known; known: {', '.join(filter(None, known))}")
    _check_family(source, target, bool(rules["rules"]))
    names = _rename(source, rules["rules"])
    skipped = _matching(rules["skip"], target.shapes, "init.skip")
    there, here = source.modalities, target.modalities
    if there != here and len(there) == len(here) and not rules["channels"]:
        warn_once(
            f"init.source: channels are taken in order: {', '.join(there)} there as {', '.join(here)} here; "
            "init.channels='names' takes them by name"
        )
    done, misfits = Start(source), []
    for path, shape in target.shapes.items():
        if path not in names or path in skipped:
            done.missing.append(path)
            continue
        array = source.params[names[path]]
        fitted, how = _fit(path, array, shape, source, target, rules)
        if fitted is None:
            misfits.append(f"{path}: {_size(array.shape)} there, {_size(shape)} here{how}")
            continue
        done.params[path] = np.asarray(fitted, np.float32, order="C")
        if how:
            done.reshaped[path] = f"{_size(array.shape)} -> {_size(shape)}, {how}"
    taken = {names[path] for path in done.params}
    done.unused = [name for name in source.params if name not in taken]
    if misfits:
        raise UserError(
            f"init.source {source.where}: {len(misfits)} parameter(s) do not fit:\n  "
            + "\n  ".join(misfits[:12])
            + (f"\n  ... and {len(misfits) - 12} more" if len(misfits) > 12 else "")
            + "\nSet model.* as it was there, or leave them out with init.skip=('REGEX',)."
        )
    _check_found(done, target)
    if not source.decoded:
        where = stages.places(str(target.model["name"]), done.params)
        done.untrained = [path for path, place in where.items() if place.part == "decoder"]
    _say_options(source, target)
    return done


def _check_family(source: Source, target: Target, ruled: bool) -> None:
    """Refuses weights of another backbone, whose names may fit by chance, unless rules say how to read them."""
    there, here = (m.get("name", "") for m in (source.model, target.model))
    files = [models.BACKBONES[n][0] if n in models.BACKBONES else n for n in (there, here)]
    if there and files[0] != files[1] and not ruled:
        raise UserError(
            f"init.source {source.where}: its backbone is '{there}', this run's is '{here}'; set model.name='{there}' "
            "with its options, or say in init.rules which parameter becomes which"
        )


def _rename(source: Source, rules: Sequence[Any]) -> dict[str, str]:
    """Path -> the source's name for it."""
    used, found = set(), dict[str, str]()
    for name in source.params:
        path = name
        for rule in rules:
            if not (isinstance(rule, Sequence) and len(rule) == 2 and all(isinstance(r, str) for r in rule)):
                raise UserError(f"config: init.rules are pairs of texts (regex, replacement), not {rule!r}")
            try:
                m = re.fullmatch(rule[0], name)
                path = m.expand(rule[1]) if m else name
            except (re.error, IndexError) as error:
                raise UserError(f"config: init.rules {tuple(rule)}: {error}") from None
            if m:
                used.add(rule[0])
                break
        if not path:
            continue
        if path in found:
            raise UserError(f"config: init.rules make both '{found[path]}' and '{name}' to '{path}'")
        found[path] = name
    for pattern, _ in rules:
        if pattern not in used:
            near = difflib.get_close_matches(pattern, source.params, n=1, cutoff=0.0)
            raise UserError(
                f"config: init.rules '{pattern}' matches nothing in {source.where}, or only what a rule before it "
                f"took; the nearest name there: '{near[0] if near else ''}'"
            )
    return found


def _matching(patterns: Sequence[str], names: Mapping[str, Any], key: str) -> set[str]:
    """The names that one of the patterns matches whole."""
    found: set[str] = set()
    for pattern in patterns:
        check_regex(pattern, key)
        hits = {name for name in names if re.fullmatch(pattern, name)}
        if not hits:
            near = difflib.get_close_matches(pattern, names, n=1, cutoff=0.0)
            raise UserError(
                f"config: {key} '{pattern}' matches no parameter; the nearest is '{near[0] if near else ''}'"
            )
        found |= hits
    return found


def _fit(
    path: str, array: np.ndarray, shape: tuple[int, ...], source: Source, target: Target, rules: Mapping[str, Any]
) -> tuple[np.ndarray | None, str]:
    """The array in the shape it needs, and what was done to it; or None, and the cure."""
    how = []
    axis = target.stems.get(path)
    if axis is not None and array.ndim == len(shape):
        # Of names that are not known only the number can be told; a rule by names then says so.
        known = bool(source.modalities) or rules["channels"] == "names"
        others = rules["channels"] and known and source.modalities != target.modalities
        if array.shape[axis] != shape[axis] or others:
            if not rules["channels"]:
                rule = "init.channels='average' or 'names' says how the modalities become others"
                return None, f" ({array.shape[axis]} channel(s) there, {shape[axis]} here: {rule})"
            array = _channels(array, axis, source, target, rules["channels"])
            how.append("channels averaged" if rules["channels"] == "average" else "channels by name")
    if array.shape == shape:
        return array, ", ".join(how)
    leaf = path.rpartition("/")[2]
    if leaf in _GRIDS and array.ndim == len(shape) == 4 and array.shape[3] == shape[3]:
        if not rules["positions"]:
            return None, " (init.positions='trilinear' interpolates them)"
        return resize(array, shape[:3]), ", ".join([*how, "interpolated"])
    if leaf == "kernel" and array.ndim == len(shape) == 5 and array.shape[3:] == shape[3:]:
        # Odd sizes have a middle; kernels of even ones are maps over cells, of which no other can be made.
        odd = all(n % 2 for n in (*array.shape[:3], *shape[:3]))
        if odd and all(a <= b for a, b in zip(array.shape, shape, strict=True)):
            if not rules["kernels"]:
                return None, " (init.kernels='trilinear' enlarges kernels)"
            return resize(array, shape[:3]), ", ".join([*how, "kernel enlarged"])
    return None, ""


def _channels(array: np.ndarray, axis: int, source: Source, target: Target, rule: str) -> np.ndarray:
    """A kernel that sees the image, for other modalities."""
    if rule == "average":
        count = len(target.modalities)
        mean = array.sum(axis=axis, keepdims=True, dtype=np.float64) / count
        return np.repeat(mean, count, axis=axis).astype(np.float32)
    if len(source.modalities) != array.shape[axis]:
        raise UserError(
            f"init.source {source.where}: the names of its modalities are not known; use init.channels=average"
        )
    common = [m for m in target.modalities if m in source.modalities]
    if not common:
        raise UserError(
            f"init.channels='names': {source.where} has the modalities {', '.join(source.modalities)}, this run has "
            f"{', '.join(target.modalities)}; none is common"
        )
    zero = np.zeros_like(np.take(array, 0, axis))
    parts = [np.take(array, source.modalities.index(m), axis) if m in common else zero for m in target.modalities]
    return np.stack(parts, axis)


def resize(array: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """The first three axes interpolated linearly to `shape`; voxels are cells, edges repeat, coarser grids average."""
    for axis, new in enumerate(shape):
        old = array.shape[axis]
        at = (np.arange(new) + 0.5) * old / new - 0.5
        weight = np.maximum(0.0, 1.0 - np.abs(at[:, None] - np.arange(old)) / max(1.0, old / new))
        weight /= weight.sum(axis=1, keepdims=True)
        array = np.moveaxis(np.tensordot(weight, array.astype(np.float64), (1, axis)), 0, axis)
    return array.astype(np.float32)


def _check_found(done: Start, target: Target) -> None:
    source = done.source
    if not done.params:
        there, here = (", ".join(list(names)[:3]) for names in (source.params, target.shapes))
        raise UserError(
            f"init.source {source.where}: not one of its {len(source.params)} parameters matches one of this model's "
            f"(there they begin: {there}; here: {here}). Is it another backbone? init.rules can rename them."
        )
    where = stages.places(str(target.model["name"]), target.shapes)
    encoder = [path for path, place in where.items() if place.part == "encoder"]
    if encoder and not any(path in done.params for path in encoder):
        raise UserError(
            f"init.source {source.where}: nothing of it fits the encoder of model.name='{target.model['name']}'. Is it "
            "of another backbone, or are init.rules or init.skip wrong?"
        )


def _say_options(source: Source, target: Target) -> None:
    """Notes options that change what the same weights compute."""
    shared = {k for k in source.model if k in target.model and k not in ("name", "levels", "remat", "bottleneck")}
    # As text: what was a tuple came back as a list from the checkpoint.
    there, here = (json.loads(json.dumps({k: m[k] for k in shared})) for m in (source.model, target.model))
    differ = [k for k in sorted(shared) if there[k] != here[k]]
    if differ:
        listed = ", ".join(f"model.{k}: {source.model[k]} there, {target.model[k]} here" for k in differ)
        warn_once(f"init.source {source.where}: {listed}")


def _size(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape)) or "scalar"


def table(done: Start, frozen: Collection[str] = ()) -> str:
    """What was matched, reshaped, missing and unused: a line a module, and every reshaped parameter.

    Args:
      frozen: parameters that do not train; of those the missing ones, and those that never trained, are told apart.
    """

    def modules(paths: Sequence[str]) -> dict[str, int]:
        counts: dict[str, int] = {}
        for path in paths:
            module = "/".join(path.split("/")[:-1][:2]) or path
            counts[module] = counts.get(module, 0) + 1
        return counts

    def random(kind: str, paths: Sequence[str], what: str) -> list[str]:
        learnt = [path for path in paths if path not in frozen]
        still = [path for path in paths if path in frozen]
        found = [f"  {kind}{module} ({n}), {what}" for module, n in modules(learnt).items()]
        return found + [f"  {kind}{module} ({n}), {what} AND FROZEN" for module, n in modules(still).items()]

    matched = [path for path in done.params if path not in done.reshaped]
    known = [path for path in matched if path not in done.untrained]
    lines = [f"  matched   {module} ({n})" for module, n in modules(known).items()]
    lines += random("matched   ", [path for path in matched if path in done.untrained], "never trained there")
    lines += [f"  reshaped  {path}  {what}" for path, what in done.reshaped.items()]
    lines += random("missing   ", done.missing, "at random")
    lines += [f"  unused    {module} ({n})" for module, n in modules(done.unused).items()]
    counts = {"matched": matched, "reshaped": done.reshaped, "missing": done.missing, "unused": done.unused}
    values = sum(math.prod(array.shape) for array in done.params.values())
    if not set(done.untrained).isdisjoint(frozen):
        lines.append(
            "  what was never trained there is as it was drawn, at random, and stays so where it is frozen: train it "
            "(peft.train=('heads', 'decoder')), or begin from a run that trained it (masked: decoder='backbone')"
        )
    total = ", ".join(f"{len(v)} {k}" for k, v in counts.items())
    return "\n".join([f"init        {done.source.where}: {total} ({values:,} values)", *lines])
