"""Left and right under mirroring: which labels have a side, what trades places with what, what is said about it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from medjax.augment import policy, spatial
from medjax.errors import UserError, warn_once

Pair = tuple[int, int]

_SIDE = re.compile(r"\b(left|right|lh|rh|l|r)\b")
_OTHER = {"left": "right", "lh": "rh", "l": "r"} | {"right": "left", "rh": "lh", "r": "l"}
_CAPITAL = re.compile(r"(?<=[a-z])(?=[A-Z])")  # where one begins a word: 'LeftKidney', 'kidneyL'
# The two sides of one organ that is not symmetric: the mirror image of a left ventricle is no right one.
_UNLIKE = re.compile(r"heart|cardi|\bventric|\batri|aort|coronar|pulmonary|liver|hepat|portal|colon")
_BRAIN = re.compile(r"lateral|horn|brain|cereb")


def sided(names: Iterable[str]) -> tuple[list[tuple[str, str]], list[str], list[str]]:
    """What names say about sides.

    Returns:
      `(pairs, lonely, unlike)`: (left, right) of one thing, such as 'left_kidney' and 'RightKidney'; those with a side
      whose other is not among `names`; and those whose other is, but is not their mirror image (heart, liver), or not
      known to be ('LK' and 'RK').
    """
    of = {name: _words(name) for name in names}
    named = {words: name for name, words in of.items()}
    pairs, lonely, unlike = [], [], []
    for name, words in of.items():
        other = _SIDE.sub(lambda match: _OTHER[match[1]], words)
        if other == words:
            # 'leftkidney': a side only beside its counterpart, for there is 'cleft' too.
            glued = words.replace("left", "right")
            initial = re.sub(r"^l(?=[a-z]+$)", "r", words)
            if glued != words and glued in named:
                pairs.append((name, named[glued]))
            elif initial != words and initial in named and words not in ("lv", "la"):
                unlike += [name, named[initial]]
        elif other not in named:
            lonely.append(name)
        elif _lopsided(words):
            unlike.append(name)
        elif words < other:
            pairs.append((name, named[other]))
    return pairs, lonely, unlike


def _words(name: str) -> str:
    return re.sub(r"[\W_]+", " ", _CAPITAL.sub(" ", name)).lower().strip()


def _lopsided(words: str) -> bool:
    """Whether it is of an organ whose left is told from its right in a mirrored volume too."""
    return bool(_UNLIKE.search(words)) and not _BRAIN.search(words)


def axis_of(orientation: str) -> int:
    """The axis that runs between left and right under axis codes such as 'RAS'."""
    return next(i for i, code in enumerate(orientation) if code in "LR")


def mirrored(config: Mapping[str, Any]) -> tuple[tuple[int, ...], tuple[tuple[Any, ...], ...]]:
    """(axes that `config.augment` flips, pairs that trade places where axis 0 is flipped)."""
    flips = [t for t in policy.parse(config)[0] if isinstance(t, spatial.Mirror)]
    axes = tuple(sorted({int(axis) for t in flips for axis in t.axes}))
    return axes, tuple(dict.fromkeys(pair for t in flips for pair in t.swap))


def pairs_of(swap: Sequence[tuple[Any, ...]], task: Any) -> list[Pair]:
    """The pairs of labels that hold for a task: the labels of findings have to be named with it."""
    own = [p[-2:] for p in swap if (p[0] == task.name if isinstance(p[0], str) else task.kind == "dense")]
    return [(int(a), int(b)) for a, b in own]


def check(config: Mapping[str, Any], tasks: Mapping[str, Any], orientation: str) -> None:
    """Raises UserError for pairs that cannot be meant, and for answers with a side where volumes are mirrored.

    Labels with a side that are mirrored and stay what they are are noted.

    Args:
      config: `config.augment`. tasks: of the run. orientation: `data.preprocess.orientation`.
    """
    axes, swap = mirrored(config)
    side = axis_of(orientation)
    if swap and side:
        raise UserError(
            f"config: augment.swap: labels trade places where axis 0 is flipped, and with data.preprocess.orientation="
            f"'{orientation}' that is not left and right. Begin the orientation with R or L"
        )
    for name in (p[0] for p in swap if isinstance(p[0], str)):
        if name not in tasks:
            raise UserError(f"config: augment.swap: no task '{name}' (there are: {', '.join(tasks)})")
        if tasks[name].kind == "case":
            raise UserError(
                f"config: augment.swap: task '{name}' is of whole cases, and only labels of masks and of findings "
                f"trade places. Leave it out; where its answers have a side, leave axis {side} out of augment.mirror"
            )
    label_maps = {name: task for name, task in tasks.items() if hasattr(task, "foreground")}
    if any(not isinstance(p[0], str) for p in swap) and not label_maps:
        raise UserError(
            "config: augment.swap: no task has label maps. Name the task whose labels are meant: (('landmarks', 1, 2),)"
        )
    for name, task in tasks.items():
        known = _known(task)
        for value in (v for pair in pairs_of(swap, task) for v in pair):
            if value not in known.values():
                raise UserError(
                    f"config: augment.swap: task '{name}' has no label {value} (there are: "
                    f"{', '.join(f'{n} {v}' for n, v in known.items()) or 'none'})"
                )
        if side in axes and (name in label_maps or task.kind == "findings"):
            _note(known, pairs_of(swap, task), f"augment.mirror flips axis {side}", "augment.mirror")
        elif side in axes and task.kind == "case":
            _refuse_sided(task, f"augment.mirror flips axis {side}", "augment.mirror")


def views(
    config: Mapping[str, Any], tasks: Mapping[str, Any], axes: Sequence[int], orientation: str
) -> dict[str, list[Pair]]:
    """Task -> the output channels that trade places where a volume is mirrored along axis 0 for its prediction.

    The network has learnt to call left what lies on the left, so in a mirrored volume it calls the right one left. What
    trades places is what did in training; of a run that was never mirrored from left to right, what the names say.

    Args:
      config: `config.augment` of the run. tasks: of the run. axes: those that are mirrored. orientation:
        `data.preprocess.orientation`.

    Raises:
      UserError: a region whose counterpart is no region; an answer of a whole case that has a side; a label with a side
        that the network has never seen mirrored, and that nothing trades places with.
    """
    side = axis_of(orientation)
    if side not in axes:
        return {}
    flipped, swap = mirrored(config)
    what, found = f"eval.mirror names axis {side}", {}
    for name, task in tasks.items():
        own = pairs_of(swap, task)
        if task.kind == "case":
            _refuse_sided(task, what, "eval.mirror")
        elif task.kind == "pretext":
            pass
        elif side in flipped:  # what is told here the network has learnt
            _note(_known(task), own, what, "eval.mirror")
            found[name] = _channels(task, own)
        else:
            found[name] = _by_names(task, own, side, what)
    return found


def _known(task: Any) -> dict[str, int]:
    """What a task tells apart: name -> value in masks, or label of findings."""
    if hasattr(task, "foreground"):
        return dict(task.foreground)
    return {name: i for i, name in enumerate(getattr(task, "names", ()), 1)}


def _by_names(task: Any, own: Sequence[Pair], side: int, what: str) -> list[Pair]:
    """The channels that trade places by the names of what a task tells apart, beside those of its `own` pairs."""
    known, regions = _known(task), getattr(task, "regions", {})
    whole = bool(regions) and not own and not any(sided(known))
    if whole:  # of nnU-Net's regions the values may have no names of their own
        known = {name: i for i, name in enumerate(regions)}
    pairs, lonely, unlike = sided(known)
    paired = {value for pair in own for value in pair}
    more = [(known[a], known[b]) for a, b in pairs if not paired & {known[a], known[b]}]
    alone = [name for name in (*lonely, *unlike) if known[name] not in paired]
    why = ""
    if alone:
        why = f"'{alone[0]}' of task '{task.name}' may have a side, and no other is sure to be its mirror image"
    elif more and side:
        why = f"'{pairs[0][0]}' of task '{task.name}' has a side, and labels trade places along axis 0 only"
    if why:
        raise UserError(
            f"config: {what}, left to right, which the network has not seen mirrored in training: {why}. Leave the "
            "axis out of eval.mirror"
        )
    return more if whole else _channels(task, [*own, *more])


def _channels(task: Any, pairs: Sequence[Pair]) -> list[Pair]:
    if not pairs or task.kind == "findings":
        return [(a - 1, b - 1) for a, b in pairs]
    if not task.regions:
        values = [0, *task.foreground.values()]
        return [(values.index(a), values.index(b)) for a, b in pairs]
    other = dict(pairs) | {b: a for a, b in pairs}
    covered = [frozenset(values) for values in task.classes.values()]
    there = [frozenset(other.get(v, v) for v in values) for values in covered]
    for region, mapped in zip(task.classes, there, strict=True):
        if mapped not in covered:
            raise UserError(
                f"config: eval.mirror: region '{region}' of task '{task.name}' has no counterpart on the other side; "
                "leave axis 0 out"
            )
    return [(i, covered.index(mapped)) for i, mapped in enumerate(there) if i < covered.index(mapped)]


def answer_of_one_side(task: Any) -> str:
    """The name (of an answer, or the task's) by which a task of whole cases has another answer in a mirrored volume.

    '' where there is none; of a left ventricle it is the same answer.
    """
    pairs, lonely, _ = sided((*task.names, task.name))
    return next(iter([*(a for a, _ in pairs), *(name for name in lonely if not _lopsided(_words(name)))]), "")


def _refuse_sided(task: Any, what: str, key: str) -> None:
    if name := answer_of_one_side(task):
        raise UserError(
            f"config: {what}, left to right, but '{name}' of task '{task.name}' has a side, and the answers of whole "
            f"cases do not trade places: a mirrored case would have the wrong one. Leave the axis out of {key}"
        )


def _note(labels: Mapping[str, int], swap: Sequence[Pair], what: str, key: str) -> None:
    """Says that labels with a side are mirrored and stay what they are."""
    pairs, lonely, _ = sided(labels)
    known = {frozenset(pair) for pair in swap}
    bare = [(a, b) for a, b in pairs if frozenset((labels[a], labels[b])) not in known]
    if bare:
        values = ", ".join(f"({labels[a]}, {labels[b]})" for a, b in bare)
        warn_once(
            f"{what}, left to right, but '{bare[0][0]}' and '{bare[0][1]}' do not trade places: the network cannot "
            f"tell one side from the other. Train with augment.swap=({values},), or leave the axis out of {key}"
        )
    elif lonely and not known:
        warn_once(
            f"{what}, left to right, but label '{lonely[0]}' is of one side: its mirror image is something else. "
            f"Leave the axis out of {key}"
        )
