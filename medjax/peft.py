"""Which parameters train, and what stands for the change of those that do not (`config.peft`; `optim.rules` with lr 0).

A model's parameters are divided into three trees: those that train; those that are frozen and kept with the run; and
those that are frozen and known from elsewhere (`config.init`), which a checkpoint refers to instead of holding them.
`combine` makes of them the parameters the network takes. Where nothing is frozen that is the first tree itself.

| `peft.type` | trains (besides `peft.train`) | source |
|---|---|---|
| `lora` | of each kernel W the factors of a change, W + alpha / rank · A B | Hu et al. 2022 |
| `adapter` | bottlenecks after the blocks (`models/adapters.py`) | Houlsby et al. 2019 |
| `prompt` | tokens of its own for each block of a ViT (`models/adapters.py`) | Jia et al. 2022 |
| `bitfit` | biases | Ben Zaken et al. 2022 |
| `norm` | scales and biases of normalisations | Frankle et al. 2021 |
| `probe` | nothing more | |

A kernel [kx, ky, kz, C, F] is factored as a matrix with the taps on the side that has fewer channels: a convolution to
`rank` channels, then a map to F; or where F < C a map of the C to `rank` channels, then the convolution. Of the ways
to divide five axes into rows and columns it is the one with the fewest parameters at a rank whose factors are layers
again, and any pattern in space can be learnt. A kernel that would be smaller than its factors trains in full.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from ml_collections import ConfigDict

from medjax import optim
from medjax.errors import UserError, check_regex, warn_once
from medjax.models import stages

TYPES = ("", "lora", "adapter", "bitfit", "norm", "prompt", "probe")
_A, _B, _SCALE = "_lora_a", "_lora_b", "_lora_scale"  # beside a kernel: its factors, and what their product counts


class Factors(NamedTuple):
    """Shapes of a kernel's factors A [rows, rank] and B [rank, columns]."""

    a: tuple[int, int]
    b: tuple[int, int]


@dataclass(frozen=True)
class Division:
    """Which of a model's parameters train.

    Attributes:
      kind: `peft.type`. shapes: of all parameters, by path. trained: those that train. factors: kernels of which the
        factors of a change train. dropped: those that have none because a rule freezes them. scale: what the factors'
        product counts. referred: frozen ones that checkpoints leave out.
    """

    kind: str
    shapes: Mapping[str, tuple[int, ...]]
    trained: frozenset[str]
    factors: Mapping[str, Factors] = field(default_factory=dict)
    dropped: Mapping[str, Factors] = field(default_factory=dict)
    scale: float = 1.0
    referred: frozenset[str] = frozenset()

    @property
    def whole(self) -> bool:
        """Whether every parameter trains."""
        return len(self.trained) == len(self.shapes)

    @property
    def frozen(self) -> set[str]:
        """Parameters that do not train."""
        return set(self.shapes) - self.trained

    def referring(self, known: Collection[str]) -> Division:
        """The same where frozen parameters are known from elsewhere; only `config.peft` leaves them out."""
        return dataclasses.replace(self, referred=frozenset(self.frozen & set(known)) if self.kind else frozenset())

    def split(self, params: Any, key: Array) -> tuple[Any, Any, Any]:
        """A model's parameters -> (those that train, frozen ones, frozen ones that are referred to); None if there are
        none. A is normal with variance 1 / rows and B zero, so that the network begins as it was."""
        if self.whole:
            return params, None, None
        leaves = flat(params)
        trained = {path: leaf for path, leaf in leaves.items() if path in self.trained}
        frozen = {path: leaf for path, leaf in leaves.items() if path not in self.trained}
        for number, (path, factors) in enumerate(sorted(self.factors.items())):
            draw = jax.random.normal(jax.random.fold_in(key, number), (math.prod(factors.a),))
            trained[path + _A] = draw.reshape(factors.a) / math.sqrt(factors.a[0])
            trained[path + _B] = jnp.zeros(factors.b)
            frozen[path + _SCALE] = jnp.float32(self.scale)
        referred = {path: frozen.pop(path) for path in self.referred}
        return nest(trained), nest(frozen) or None, nest(referred) or None

    @property
    def bases(self) -> dict[str, str]:
        """Path of a factor -> the kernel's of which it is one."""
        return {path + part: path for path in (*self.factors, *self.dropped) for part in (_A, _B)}

    def everything(self) -> Any:
        """Shapes of all parameters and factors as one tree, for rules that must cover them; dropped factors too."""
        shapes: dict[str, tuple[int, ...]] = dict(self.shapes)
        for path, factors in {**self.factors, **self.dropped}.items():
            shapes |= {path + _A: factors.a, path + _B: factors.b}
        return nest({path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in shapes.items()})

    def count(self) -> tuple[int, int]:
        """How many numbers train, and how many parameters the network has."""
        factors = sum(math.prod(f.a) + math.prod(f.b) for f in self.factors.values())
        trained = factors + sum(math.prod(self.shapes[path]) for path in self.trained)
        return trained, sum(math.prod(shape) for shape in self.shapes.values())

    def describe(self) -> str:
        """'12,345 of 1,234,567 parameters (1.0 %): lora of 14 kernels, 6 parameters in full'."""
        count, total = self.count()
        parts = [f"{self.kind} of {len(self.factors)} kernels"] if self.factors else [self.kind] if self.kind else []
        parts.append(f"{len(self.trained)} of {len(self.shapes)} in full")
        return f"{count:,} of {total:,} parameters ({100 * count / total:.2g} %): {', '.join(parts)}"


def divide(config: ConfigDict, shapes: Mapping[str, tuple[int, ...]]) -> Division:
    """Divides a model's parameters by `config.peft` and by the rules of the optimizer that freeze.

    Raises:
      UserError: an unknown type, a target or a pattern that matches nothing.
    """
    peft = config.peft
    if peft.type not in TYPES:
        raise UserError(f"config: peft.type '{peft.type}' is not known; known: {', '.join(filter(None, TYPES))}")
    if peft.rank < 1 or peft.tokens < 1:
        raise UserError(f"config: peft.rank ({peft.rank}) and peft.tokens ({peft.tokens}) must be at least 1")
    if not peft.alpha > 0:
        raise UserError(f"config: peft.alpha={peft.alpha} must be above 0: a change that counts nothing learns nothing")
    _check_use(config)
    whole = Division(peft.type, dict(shapes), frozenset(shapes))
    if peft.type:
        kernels = _kernels(peft, shapes) if peft.type == "lora" else []
        factors = {path: _factors(shapes[path], peft.rank) for path in kernels}
        factors = {p: f for p, f in factors.items() if math.prod(f.a) + math.prod(f.b) < math.prod(shapes[p])}
        chosen = set(_besides(str(config.model.name), peft.train, shapes))
        chosen |= (set(kernels) - set(factors)) | set(_of_type(peft.type, shapes))
        factors = {p: f for p, f in factors.items() if p not in chosen}
        whole = dataclasses.replace(
            whole, trained=frozenset(chosen), factors=factors, scale=float(peft.alpha) / peft.rank
        )
    rates, _ = optim.rule_factors(config.optim.rules, whole.everything(), whole.bases)
    still = {path for path, rate in flat(rates).items() if not rate} | statistics(shapes)
    kept = {path: f for path, f in whole.factors.items() if not still & {path + _A, path + _B}}
    dropped = {path: f for path, f in whole.factors.items() if path not in kept}
    division = dataclasses.replace(whole, trained=whole.trained - still, factors=kept, dropped=dropped)
    if not division.trained and not division.factors:
        raise UserError("config: no parameter trains; see peft.train and optim.rules")
    return division


def _check_use(config: ConfigDict) -> None:
    """Refuses keys of `config.peft` that its type has no use for; notes a change of nothing learnt."""
    peft = config.peft
    if not peft.type:
        if peft.targets or tuple(peft.train) != ("heads",):
            warn_once("config: peft.type is empty, so everything trains; peft.targets and peft.train are not used")
        return
    if peft.targets and peft.type not in ("lora", "adapter", "prompt"):
        raise UserError(
            f"config: peft.targets are of lora, adapter and prompt; leave them out (--config.peft.targets='()') with "
            f"peft.type '{peft.type}', or say in peft.train what trains besides"
        )
    if not config.init.source:
        warn_once(
            f"config: peft.type '{peft.type}' without init.source: what it freezes stays as it was drawn, at random"
        )


def statistics(shapes: Collection[str]) -> set[str]:
    """Means and variances of normalisations that keep those of another training; they are measured, not learnt."""
    ends = ("/mean", "/variance")
    pairs = {p.rpartition("/")[0] for p in shapes if p.endswith(ends[0])}
    return {module + end for module in pairs for end in ends if module + ends[1] in shapes}


def _kernels(peft: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """The kernels that `peft.targets` match; without targets all of the backbone."""
    known = [path for path, shape in shapes.items() if path.endswith("/kernel") and len(shape) in (2, 5)]
    if not peft["targets"]:
        return [path for path in known if path.startswith("backbone/")]
    return list(dict.fromkeys(path for target in peft["targets"] for path in _match(target, known, "peft.targets")))


def _match(pattern: str, paths: Iterable[str], key: str) -> list[str]:
    paths = list(paths)
    check_regex(pattern, key)
    found = [path for path in paths if re.fullmatch(pattern, path)]
    if not found:
        near = difflib.get_close_matches(pattern, paths, n=1, cutoff=0.0)
        what = "kernel of a dense or convolutional layer" if key == "peft.targets" else "parameter"
        raise UserError(f"config: {key} '{pattern}' matches no {what}; the nearest is '{near[0] if near else ''}'")
    return found


def _factors(shape: tuple[int, ...], rank: int) -> Factors:
    *taps, inputs, outputs = shape
    size = math.prod(taps)
    rows, columns = (size * inputs, outputs) if inputs <= outputs else (inputs, size * outputs)
    return Factors((rows, rank), (rank, columns))


def _besides(model: str, train: Sequence[str], shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Paths that `peft.train` names: parts of the network, or regexes."""
    where = stages.places(model, shapes) if set(train) & {"encoder", "decoder"} else {}
    found = []
    for entry in train:
        if entry == "heads":
            found += [path for path in shapes if not path.startswith("backbone/")]
        elif entry in stages.PARTS:
            found += [path for path, place in where.items() if place.part == entry]
        else:
            found += _match(entry, shapes, "peft.train")
    return found


def _of_type(kind: str, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Parameters of the backbone that a type trains as they are."""
    leaves: dict[str, Callable[[str, str], bool]] = {
        "adapter": lambda module, leaf: "/adapter" in module,
        "prompt": lambda module, leaf: leaf == "prompt",
        "bitfit": lambda module, leaf: leaf == "bias",
        "norm": lambda module, leaf: leaf in ("scale", "bias") and f"{module}/scale" in shapes,
    }
    if kind not in leaves:
        return []
    found = [p for p in shapes if p.startswith("backbone/") and leaves[kind](*p.rsplit("/", 1))]
    if not found:
        raise UserError(f"config: peft.type '{kind}' finds nothing to train in this backbone")
    return found


# --- putting together ------------------------------------------------------------------------------------------------


def combine(*trees: Any) -> Any:
    """The parameters a network takes, from parts of them and factors of changes; a tree alone is returned as it is."""
    given = [tree for tree in trees if tree is not None]
    if len(given) == 1:
        return given[0]
    merged: dict[str, Any] = {}
    for tree in given:
        merged |= flat(tree)
    for path in [path for path in merged if path.endswith(_A)]:
        kernel = path.removesuffix(_A)
        a, b, scale = (merged.pop(kernel + part) for part in (_A, _B, _SCALE))
        merged[kernel] = merged[kernel] + scale * change(a, b, merged[kernel].shape)
    return nest(merged)


def change(a: Array, b: Array, shape: Sequence[int]) -> Array:
    """A B laid out as the kernel it changes."""
    *taps, inputs, outputs = shape
    product = jnp.matmul(a, b, precision="highest")
    if a.shape[0] != inputs:  # taps with the inputs
        return product.reshape(shape)
    product = product.reshape(inputs, *taps, outputs)
    return jnp.moveaxis(product, 0, -2)


def flat(tree: Any) -> dict[str, Any]:
    """Leaves by path, 'backbone/encoder0/block0/conv/kernel'."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def nest(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flat` for trees of dictionaries."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, last = path.split("/")
        node = tree
        for part in parents:
            node = node.setdefault(part, {})
        node[last] = leaf
    return tree


def digest(params: Mapping[str, np.ndarray], paths: Iterable[str]) -> str:
    """SHA-256 of some parameters, bit for bit."""
    found = hashlib.sha256()
    for path in sorted(paths):
        array = np.asarray(params[path], order="C")
        found.update(f"{path} {array.dtype} {array.shape}".encode())
        found.update(array.tobytes())
    return found.hexdigest()


# --- depth -----------------------------------------------------------------------------------------------------------


def by_depth(
    config: ConfigDict, division: Division, duration: Callable[[str, str], int]
) -> tuple[Any | None, Any | None]:
    """What `optim.layer_decay`, `optim.decoder_first` and `optim.unfreeze` ask for, as trees like all parameters.

    Layer-wise decay d (Clark et al. 2020; Bao et al. 2022): of n encoder stages, stage i from the image learns at
    d^(n - i) of the rate; decoder and heads at the rate itself. Of a ViT the embedding is stage 0, block i (from 0)
    stage i + 1, and its last normalisation learns with the last block.

    Args:
      duration: (text, key) -> steps.

    Returns:
      (factors of the learning rate, first steps at which a parameter changes); None where nothing is asked for.
    """
    decay, first = config.optim.layer_decay, duration(config.optim.decoder_first, "optim.decoder_first")
    if decay == 1 and not first and not config.optim.unfreeze:
        return None, None
    if not 0 < decay <= 1:
        raise UserError(f"config: optim.layer_decay={decay} must be in (0, 1]")
    everything = division.everything()
    where = stages.places(str(config.model.name), flat(everything))
    number = stages.stage_count(where)
    begins = [duration(text, "optim.unfreeze") for text in config.optim.unfreeze] or [0] * number
    if len(begins) != number:
        raise UserError(
            f"config: optim.unfreeze needs one duration an encoder stage, from the image on: {number} of model.name="
            f"'{config.model.name}', not {len(begins)}"
        )
    total = duration(config.train.total, "train.total")
    for key, last in (("decoder_first", first), ("unfreeze", max(begins))):
        if last >= total > 0:
            raise UserError(
                f"config: optim.{key}: {last} steps of standing still in a run of {total} (train.total): an encoder "
                "stage would never learn; shorten it, or freeze the stage by optim.rules"
            )

    def factor(place: stages.Place) -> float:
        return decay ** (number - place.stage) if place.part == "encoder" else 1.0

    def begin(place: stages.Place) -> int:
        return max(first, begins[place.stage]) if place.part == "encoder" else 0

    rates = nest({path: factor(place) for path, place in where.items()}) if decay != 1 else None
    starts = nest({path: begin(place) for path, place in where.items()}) if first or any(begins) else None
    return rates, starts
