"""Measures as formulas over masks: `100 * (volume(LV, ED) - volume(LV, ES)) / volume(LV, ED)`.

A formula is arithmetic (`+ - * / **`, parentheses, numbers) over other measures, by name, and over

| call | what |
|---|---|
| `volume(LABEL, FRAME)` | ml |
| `enclosed(LABEL, WALL, FRAME)` | ml in the slices where the wall is met by a quarter or more of the rays from the middle of LABEL |
| `thickness(WALL, CAVITY, FRAME)` | mm along rays from the middle of the cavity in each slice: [slices, angles] (`medjax.metrics.walls`) |
| `radius(WALL, CAVITY, FRAME)` | mm of cavity along the same rays |
| `area(LABEL, FRAME)` | mm² of each slice |
| `attribute(COLUMN)` | a number of the patient: height, weight, age |
| `bsa(HEIGHT, WEIGHT)` | body surface in m², of cm and kg: √(height · weight / 3600) (Mosteller, NEJM 1987) |
| `mean sd median min max (x)`, `quantile(x, q)` | over what is defined of an array |
| `slices(x)` | means over the angles: one value a slice |
| `sqrt log abs min max` | of numbers; the logarithm is natural |

Labels are those the task scores, regions included; in quotes where they are no single word. FRAME is left out where
`measures.frames` names none. What is undefined (a ratio to a volume of 0, the wall of a mask without a ring) is NaN.
"""  # noqa: E501

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from medjax.data.cases import nearest
from medjax.errors import UserError
from medjax.metrics import walls

Value = Any  # a float, or an array


class Call(NamedTuple):
    """Something measured in the masks of one frame, or an attribute: function, labels (or column), frame ('': none)."""

    function: str
    names: tuple[str, ...]
    frame: str


_MASKS = {"volume": 1, "area": 1, "enclosed": 2, "thickness": 2, "radius": 2}  # function -> labels it takes
_DEFINED = ("volume", "area", "enclosed")  # of an empty mask too: 0
SLICED = ("area", "enclosed", "thickness", "radius")
"""What is measured slice by slice: it needs voxels that are clearly longest along one axis (`walls.slice_axis`)."""
_ENCLOSED = 0.25  # share of rays; what lies in a slice without a wall is not of the chamber
_OPERATORS: dict[type, Callable[[Value, Value], Value]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: np.divide,
    ast.Pow: np.power,
}


def _over(reduce: Callable[[np.ndarray], Value]) -> Callable[[Value], Value]:
    """A reduction over what is defined; NaN where nothing is."""

    def apply(x: Value) -> float:
        values = np.asarray(x, np.float64)
        values = values[~np.isnan(values)]
        return float(reduce(values)) if values.size else math.nan

    return apply


def _least(one: Callable, two: Callable) -> Callable[..., Value]:
    return lambda *x: one(x[0]) if len(x) == 1 else two(*x)


def _slices(x: Value) -> np.ndarray:
    values = np.atleast_2d(np.asarray(x, np.float64))
    counted = ~np.isnan(values)
    sums, counts = np.where(counted, values, 0.0).sum(axis=-1), counted.sum(axis=-1)
    return np.divide(sums, counts, out=np.full(sums.shape, math.nan), where=counts > 0)


_FUNCTIONS: dict[str, tuple[Callable[..., Value], tuple[int, ...]]] = {
    "mean": (_over(np.mean), (1,)),
    "sd": (_over(np.std), (1,)),
    "median": (_over(np.median), (1,)),
    "min": (_least(_over(np.min), np.minimum), (1, 2)),
    "max": (_least(_over(np.max), np.maximum), (1, 2)),
    "quantile": (lambda x, q: _over(lambda v: np.quantile(v, q))(x), (2,)),
    "slices": (_slices, (1,)),
    "sqrt": (np.sqrt, (1,)),
    "log": (np.log, (1,)),
    "abs": (np.abs, (1,)),
    "bsa": (lambda height, weight: np.sqrt(height * weight / 3600.0), (2,)),
}


class Formulas:
    """The formulas of `config.measures.formulas`, parsed and checked.

    Args:
      texts: measure -> formula. labels: what masks can be measured of. frames: names of the frames; none: one a case.

    Attributes:
      calls: what is to be measured in the masks. names: of the measures, each after those it needs.
      partial: measures that some masks leave undefined: ratios, roots and logarithms of what is measured, walls.

    Raises:
      UserError: a formula that cannot be read, an unknown name, label or frame, measures that need each other, or one
        that is no single number.
    """

    def __init__(self, texts: Mapping[str, str], labels: Iterable[str], frames: Iterable[str]) -> None:
        self._texts, self._labels, self._frames = dict(texts), tuple(labels), tuple(frames)
        self._trees = {name: self._parse(name, text) for name, text in self._texts.items()}
        calls: dict[Call, None] = {}
        for name, tree in self._trees.items():
            self._check(name, tree, calls)
        self.calls = tuple(calls)
        self.names = tuple(self._ordered())
        total: set[str] = set()
        for name in self.names:
            if self._total(self._trees[name], total):
                total.add(name)
        self.partial = frozenset(self.names) - total
        # A rehearsal: what is an array in the end is told before anything is measured.
        self({call: np.ones((2, 4)) if call.function in ("thickness", "radius") else np.ones(2)
              if call.function == "area" else 1.0 for call in self.calls})  # fmt: skip

    def __call__(self, measured: Mapping[Call, Value]) -> dict[str, float]:
        """The measures, from what was measured of a patient's masks for each of `calls` (absent: NaN)."""
        values: dict[str, float] = {}
        with np.errstate(all="ignore"):
            for name in self.names:
                value = np.asarray(self._value(name, self._trees[name], measured, values), np.float64)
                if value.ndim:
                    raise self._error(name, "is an array; take its mean, max, sd... so that it is one number")
                values[name] = float(value) if np.isfinite(value) else math.nan
        return {name: values[name] for name in self._texts}

    def _error(self, name: str, what: str) -> UserError:
        return UserError(f"config: measures.formulas.{name}='{self._texts[name]}': {what}")

    def _parse(self, name: str, text: str) -> ast.expr:
        try:
            return ast.parse(str(text).strip(), mode="eval").body
        except SyntaxError as error:
            raise self._error(name, f"cannot be read ({error.msg})") from None

    def _check(self, name: str, node: ast.AST, calls: dict[Call, None]) -> None:
        if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
            self._check(name, node.left, calls)
            self._check(name, node.right, calls)
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
            self._check(name, node.operand, calls)
        elif isinstance(node, ast.Constant) and type(node.value) in (int, float):
            return
        elif isinstance(node, ast.Name):
            if node.id not in self._texts:
                raise self._error(name, f"no measure '{node.id}'{nearest(node.id, self._texts)}")
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.keywords:
            if node.func.id in (*_MASKS, "attribute"):
                calls[self._call(name, node)] = None
                return
            if node.func.id not in _FUNCTIONS:
                known = (*_MASKS, "attribute", *_FUNCTIONS)
                raise self._error(name, f"no function '{node.func.id}' (known: {', '.join(known)})")
            if len(node.args) not in (wanted := _FUNCTIONS[node.func.id][1]):
                raise self._error(name, f"{node.func.id} takes {' or '.join(map(str, wanted))}, not {len(node.args)}")
            for argument in node.args:
                self._check(name, argument, calls)
        else:
            raise self._error(name, f"'{ast.unparse(node)}' is neither a number, a measure nor a function of them")

    def _call(self, name: str, node: ast.Call) -> Call:
        function, words = ast.unparse(node.func), []
        for argument in node.args:
            word = argument.id if isinstance(argument, ast.Name) else getattr(argument, "value", None)
            if not isinstance(word, str):
                raise self._error(name, f"{function} takes names, not '{ast.unparse(argument)}'")
            words.append(word)
        if function == "attribute":
            if len(words) != 1:
                raise self._error(name, "attribute takes the name of one column")
            return Call(function, tuple(words), "")
        n = _MASKS[function]
        if len(words) != n + bool(self._frames):
            two = ("label", "wall") if function == "enclosed" else ("wall", "cavity")
            wanted = [*(("label",) if n == 1 else two), *(("frame",) if self._frames else ())]
            raise self._error(name, f"{function} takes {', '.join(wanted)}, not {len(words)} names")
        frame = words[n] if self._frames else ""
        for word in words[:n]:
            if word not in self._labels:
                raise self._error(name, f"no label '{word}' (there are: {', '.join(self._labels)})")
        if frame and frame not in self._frames:
            raise self._error(name, f"no frame '{frame}' in measures.frames ({', '.join(self._frames)})")
        return Call(function, tuple(words[:n]), frame)

    def _ordered(self) -> list[str]:
        """Names, each after those it needs."""
        done: list[str] = []

        def visit(name: str, path: tuple[str, ...]) -> None:
            if name in path:
                raise self._error(name, f"needs itself, by way of {' -> '.join(path[path.index(name) :])} -> {name}")
            if name in done:
                return
            for other in _needs(self._trees[name]):
                visit(other, (*path, name))
            done.append(name)

        for name in self._trees:
            visit(name, ())
        return done

    def _total(self, node: Any, total: Collection[str]) -> bool:
        """Whether masks cannot leave a formula undefined, by the names of those measures that they cannot either."""
        if not self._of_masks(node):
            return True  # the same of reference and prediction
        if isinstance(node, ast.Name):
            return node.id in total
        if isinstance(node, ast.Call):
            function = ast.unparse(node.func)
            if function in _MASKS:
                return function in _DEFINED
            return function not in ("sqrt", "log") and all(self._total(x, total) for x in node.args)
        if isinstance(node, ast.BinOp):
            if isinstance(node.op, ast.Div | ast.Pow) and self._of_masks(node.right):
                return False
            if isinstance(node.op, ast.Pow):  # 0 and negative values have the powers 1, 2, 3...
                power = node.right.value if isinstance(node.right, ast.Constant) else 0
                return power in range(1, 100) and self._total(node.left, total)
            return self._total(node.left, total) and self._total(node.right, total)
        return self._total(node.operand, total)

    def _of_masks(self, node: Any) -> bool:
        """Whether a formula measures a mask, itself or by the measures it names."""
        called = {ast.unparse(one.func) for one in ast.walk(node) if isinstance(one, ast.Call)}
        return not called.isdisjoint(_MASKS) or any(self._of_masks(self._trees[other]) for other in _needs(node))

    def _value(self, name: str, node: Any, measured: Mapping[Call, Value], values: Mapping[str, float]) -> Value:
        if isinstance(node, ast.BinOp):
            left, right = (self._value(name, side, measured, values) for side in (node.left, node.right))
            if np.ndim(left) and np.ndim(right) and np.shape(left) != np.shape(right):
                raise self._error(
                    name, f"arrays of {np.shape(left)} and {np.shape(right)}: frames of one patient on different grids"
                )
            return _OPERATORS[type(node.op)](left, right)
        if isinstance(node, ast.UnaryOp):
            value = self._value(name, node.operand, measured, values)
            return -value if isinstance(node.op, ast.USub) else value
        if isinstance(node, ast.Constant):
            return float(node.value)  # type: ignore[arg-type]
        if isinstance(node, ast.Name):
            return values[node.id]
        if node.func.id in (*_MASKS, "attribute"):
            return measured.get(self._call(name, node), math.nan)
        function = _FUNCTIONS[node.func.id][0]
        return function(*(self._value(name, argument, measured, values) for argument in node.args))


def _needs(node: Any) -> list[str]:
    """Measures that a formula names; what is measured in masks takes labels instead."""
    if isinstance(node, ast.Name):
        return [node.id]
    if isinstance(node, ast.Call):
        direct = ast.unparse(node.func) in (*_MASKS, "attribute")
        return [] if direct else [name for argument in node.args for name in _needs(argument)]
    return [name for child in ast.iter_child_nodes(node) for name in _needs(child)]


def measure(
    calls: Iterable[Call],
    frame: str,
    mask_of: Callable[[str], np.ndarray],
    spacing: Sequence[float],
    voxel: float | None = None,
) -> dict[Call, Value]:
    """What those of `calls` that are about `frame` give in the masks of one case.

    Args:
      mask_of: label -> bool [X, Y, Z], on the grid with voxel edges `spacing` in mm.
      voxel: mm³ of a voxel; None: the product of `spacing`, which is too large where the grid is sheared.
    """
    voxel = float(np.prod(spacing)) if voxel is None else voxel
    found: dict[Call, Value] = {}
    rays: dict[tuple[str, ...], walls.Wall] = {}
    for call in calls:
        if call.function == "attribute" or call.frame != frame:
            continue
        if call.function == "volume":
            found[call] = float(np.count_nonzero(mask_of(call.names[0])) * voxel / 1000.0)
        elif call.function == "area":
            axis = walls.slice_axis(spacing)
            others = tuple(a for a in range(3) if a != axis)
            pixel = float(np.prod([spacing[a] for a in others]))
            found[call] = np.count_nonzero(mask_of(call.names[0]), axis=others) * pixel
        else:
            pair = call.names[::-1] if call.function == "enclosed" else call.names
            if pair not in rays:
                ring, cavity = (mask_of(label) for label in pair)
                rays[pair] = walls.wall(ring, cavity, spacing)
            if call.function == "enclosed":
                others = tuple(a for a in range(3) if a != walls.slice_axis(spacing))
                counts = np.count_nonzero(mask_of(call.names[0]), axis=others)
                found[call] = float(counts[rays[pair].closed >= _ENCLOSED].sum() * voxel / 1000.0)
            else:
                found[call] = getattr(rays[pair], call.function)
    return found
