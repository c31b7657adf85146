"""Configurations: defaults, recipes, overrides; every key is known or refused.

A recipe is a Python file with `get_config(arg) -> ConfigDict` that sets only what differs from `defaults()`. Then
`load` merges it, fills in the options of the chosen model, tasks and optimizer, and applies `--config.key=value`. A
key nobody knows is an error that names the nearest known one. This file imports `ml_collections` only, so a
recipe may import it.
"""

from __future__ import annotations

import ast
import difflib
import importlib.util
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict, FieldReference, config_dict

from medjax.errors import UserError, warn_once

# Nodes whose keys are the user's own: the names of tasks, of modalities, of labels.
OPEN = re.compile(
    r"tasks|tasks\.[^.]+\.regions"
    r"|measures\.(frames|formulas)|eval\.(confirm|tasks)(\.[^.]+)?"
    r"|data\.(images|targets|labels|classes|options|preprocess\.normalize|sampling\.classes)"
)

# Where the options of a chosen kind live: path of the node -> key that names the kind.
KINDS = {"model": "name", "tasks.*": "type"}

# Options that are one number, or one for each stage, whichever of the two their default is.
STAGED = re.compile(r"model\.(convs|decoder_convs|blocks|dilations)")


_MOST_STEPS = 2**31 - 1


def _whole(least: int) -> Callable[[Any], bool]:
    return lambda v: isinstance(v, int) and not isinstance(v, bool) and v >= least


def _real(good: Callable[[float], bool]) -> Callable[[Any], bool]:
    return lambda v: isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v) and good(v)


def _several(n: int, good: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda v: isinstance(v, tuple | list) and len(v) == n and all(map(good, v))


_COUNT = ("a whole number from 1 on", _whole(1))
_FROM_0 = ("a whole number from 0 on", _whole(0))
_SHARE = ("a number from 0 to 1", _real(lambda v: 0 <= v <= 1))
_DECAY = ("a number from 0 on, less than 1", _real(lambda v: 0 <= v < 1))

# Key -> what it must be, in words and as a test.
LIMITS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "data.patch": ("three whole numbers from 1 on, such as (64, 64, 64)", _several(3, _whole(1))),
    "data.batch_size": _COUNT,
    "data.buckets": _FROM_0,
    "data.workers": _FROM_0,
    "data.foreground": _SHARE,
    "optim.accumulate": _COUNT,
    "optim.betas": ("two numbers from 0 on, less than 1, such as (0.9, 0.999)", _several(2, _DECAY[1])),
    "optim.momentum": _DECAY,
    "optim.ema": _DECAY,
    "semi.ema": _DECAY,
    "optim.power": ("a number from 0 on", _real(lambda v: v >= 0)),
    "train.eval_cases": _FROM_0,
    "train.patience": _FROM_0,
    "train.nan_limit": _FROM_0,
    "eval.windows": _COUNT,
}


def defaults() -> ConfigDict:
    """Every key of a run with its default. Durations are texts: '500 steps', '20 epochs' or '8000 examples'."""
    c = ConfigDict()
    c.name = "run"
    c.seed = 0

    c.data = ConfigDict()
    c.data.cohort = ""  # a folder, a manifest (.csv, .json), or 'synthetic_brain'; docs/bring_your_own_data.md
    c.data.layout = ""  # nnunet, msd, bids, manifest, folder, files; empty: told by what is there
    c.data.options = ConfigDict()  # arguments of the generator, for a synthetic cohort
    c.data.images = ConfigDict()  # modality -> manifest's column, pattern '{case}/t1.nii.gz', or BIDS name 'T1w'
    c.data.modalities = ()  # order of the channels; empty: the source's own, else by name
    c.data.targets = ConfigDict()  # task -> column, columns (a vector), pattern, BIDS name, table of findings; 'label'
    c.data.classes = ConfigDict()  # task -> class names in order, for columns of words
    c.data.labels = ConfigDict()  # label name -> value in the mask; nnU-Net's and the Decathlon's dataset.json has them
    c.data.findings = ConfigDict({"id": "", "coordinates": "RAS", "unlisted": "unknown"})  # medjax/data/tables.py
    c.data.table = ""  # table joined to a folder's cases: its columns become attributes, and may be targets
    c.data.id = "id"  # column of the case's name; for patterns also a template, such as '{patient}-{frame}'
    c.data.group = ""  # patient, which no split cuts through: a column, a template, or a regex for case ids
    c.data.exclude = ()  # ids or patients that are left out
    c.data.extra = ConfigDict({"folder": "", "modality": ""})  # volumes without targets to train on as well
    c.data.skip_unreadable = False  # leave out cases whose files cannot be used, and list them; else the first raises
    c.data.split = ConfigDict({"file": "", "column": "", "folds": 0, "fold": 0, "test": 0.0, "stratify": ""})
    c.data.labelled = 0  # training patients whose labels (for the tasks) are used, 5 of them among 10; 0: all
    c.data.unlabelled = True  # whether training cases without labels stay
    c.data.preprocess = ConfigDict(
        {
            "orientation": "RAS",
            "spacing": None,  # mm along (x, y, z), 'median' of the training cases, or None: each file's own
            "order": 3,  # images by cubic B-spline, or 1: linearly
            "anisotropy": 0.0,  # slices are resampled on their own where voxels are longer than this ratio; nnU-Net: 3
            "crop": None,  # or 'nonzero'
            "enhance": (),  # steps before: 'n4', 'nlm', 'median', 'clahe', 'nyul', 'window:lung', 'body', or tables
            "normalize": "zscore",  # or a table by modality: zscore, zscore_nonzero, ct, percentile, none
            "nonfinite": "error",  # or 'zero': read NaN and Inf as 0, and say how many
            "missing": "error",  # or 'zero': let a case lack modalities
        }
    )
    c.data.store = ""  # folder of the prepared store, made if need be; empty: prepared cases stay in memory
    c.data.workers = 0  # threads that read and prepare; 0: one a usable CPU
    c.data.foreground = 0.5  # share of examples whose patch is centred on labelled tissue
    c.data.sampling = ConfigDict(
        {
            "classes": "present",  # any class a case has; 'balanced': each as often over time; {label or task: weight}
            "balance": "",  # attribute of the cases (site, sex...) whose values are taken equally often
            "weight": "",  # attribute that says how often a case is taken, relative to the others
            "labelled": 0.0,  # share of the examples that come from cases with a label; 0: as the cases come
        }
    )
    c.data.patch = (64, 64, 64)
    c.data.buckets = 0  # whole volumes in place of patches, padded to so many shapes (compilations); 0: patches
    c.data.batch_size = 2  # examples of one optimizer step, over all devices and accumulation rounds

    c.augment = ConfigDict()
    c.augment.mirror = ()  # axes flipped with p ½: 0 left/right, 1 posterior/anterior, 2 inferior/superior
    c.augment.swap = ()  # label values that trade places where axis 0 is flipped: ((left, right), ...)
    c.augment.label_interpolation = "auto"  # of warped masks: 'nearest', 'linear', or as the policy has it
    c.augment.policy = ""  # 'nnunet' or 'synthseg', instead of the tables below; docs/augmentation.md
    c.augment.transforms = ()  # or a list in your own order: (("rotate", {"p": 0.2, "degrees": 30.0}), ...)
    c.augment.affine = ConfigDict({"p": 0.0, "rotate": 15.0, "scale": 0.15})  # degrees; relative
    c.augment.brightness = ConfigDict({"p": 0.0, "std": 0.2})
    c.augment.contrast = ConfigDict({"p": 0.0, "low": 0.75, "high": 1.25})
    c.augment.gamma = ConfigDict({"p": 0.0, "low": 0.7, "high": 1.5})
    c.augment.noise = ConfigDict({"p": 0.0, "std": 0.1})

    c.model = ConfigDict({"name": "unet"})
    c.tasks = ConfigDict()

    c.init = ConfigDict(  # weights to begin from, at step 0; medjax/transfer.py, docs/transfer.md
        {
            "source": "",  # folder of a run ('{seed}': this run's), of its checkpoints, or params.npz of medjax.convert
            "which": "best",  # of a run's checkpoints, or 'latest'
            "rules": (),  # ((regex, replacement), ...): names there -> names here, '' leaves out; the first that fits
            "skip": (),  # regexes of parameters here that begin at random all the same
            "channels": "",  # where modalities differ: 'average', or 'names'; empty: an error if their number does
            "kernels": "",  # where kernels are larger here: 'trilinear' (UpKern); empty: an error
            "positions": "trilinear",  # where a transformer's grid differs; empty: an error
        }
    )

    c.peft = ConfigDict(  # training few parameters, saved as a change of `init.source`; medjax/peft.py
        {
            "type": "",  # 'lora', 'adapter', 'prompt', 'bitfit', 'norm', 'probe'; empty: everything trains
            "targets": (),  # regexes: kernels (lora), modules (adapter, prompt); empty: the whole backbone
            "rank": 4,  # of a kernel's change (lora); channels of an adapter
            "alpha": 4.0,  # a kernel's change counts alpha / rank
            "tokens": 8,  # of a prompt, for each block
            "train": ("heads",),  # trains besides, in full: 'encoder', 'decoder', 'heads', or regexes of parameters
        }
    )

    c.optim = ConfigDict()
    c.optim.name = "sgd"  # SGD with Nesterov momentum, or 'adamw'
    c.optim.lr = 0.01
    c.optim.momentum = 0.99
    c.optim.betas = (0.9, 0.999)
    c.optim.weight_decay = 3e-5
    c.optim.schedule = "poly"  # 'poly', 'cosine' or 'constant'
    c.optim.power = 0.9
    c.optim.warmup = "0 steps"
    c.optim.clip = 12.0  # global gradient norm; 0: off
    c.optim.accumulate = 1  # rounds a batch is cut into
    c.optim.balance = "fixed"  # of several tasks: their weights as given, or learnt: 'uncertainty', 'gradnorm'
    c.optim.gradnorm = ConfigDict({"alpha": 1.5, "rate": 0.025})  # pull of the slower tasks; step of the weights
    c.optim.ema = 0.0  # decay of the averaged weights; 0: off
    c.optim.swa = ConfigDict({"start": "", "interval": "1 epochs"})  # or their equal mean from then on; '': off
    # (regex, {'lr': factor, 'decay': factor}): the first that matches a parameter's path rules it; lr 0 freezes it.
    c.optim.rules = ((r".*/kernel", {"lr": 1.0, "decay": 1.0}), (r".*", {"lr": 1.0, "decay": 0.0}))
    c.optim.layer_decay = 1.0  # learning rate of each encoder stage relative to the next deeper one
    c.optim.decoder_first = "0 steps"  # the encoder stands still for so long
    c.optim.unfreeze = ()  # ('300 steps', '200 steps', ...): encoder stages from the image on stand still for so long

    c.semi = ConfigDict(
        {
            "method": "",  # learns without labels too: mean_teacher, fixmatch, cps; docs/semi_supervised.md
            "weight": 1.0,  # of its loss, after the ramp
            "rampup": "400 steps",  # the weight rises as exp(-5 (1 - t)²) until then
            "threshold": None,  # mean_teacher: share of the greatest entropy; else least confidence. None: as published
            "cases": "unlabelled",  # whose outputs it compares: 'unlabelled' or 'all'
            "ema": 0.99,  # mean_teacher: decay of the average that teaches and is evaluated, in place of optim.ema
            "uncertainty": "threshold",  # mean_teacher: uncertain voxels are left out; 'entropy': weigh less; 'none'
            "loss": "mse",  # mean_teacher: 'dice' compares structures of few voxels as large ones
            "passes": 1,  # of the teacher, with dropout if more than one
            "noise": 0.1,  # standard deviation of the teacher's noise, cut at twice that
            # The student's view of what is compared: augment.transforms done after config.augment.
            "strong": (
                ("brightness", {"p": 0.5}),
                ("contrast", {"p": 0.5}),
                ("gamma", {"p": 0.5}),
                ("noise", {"p": 0.5, "std": 0.2}),
                ("cutout", {"p": 0.5, "boxes": 2}),
            ),
        }
    )

    c.train = ConfigDict()
    c.train.total = "1000 steps"
    c.train.log_every = "20 steps"
    c.train.checkpoint_every = "100 steps"
    c.train.eval_every = "250 steps"
    c.train.eval_cases = 0  # validation cases scored while training; 0: all
    c.train.patience = 0  # evaluations without a better score before stopping; 0: never
    c.train.precision = "float32"  # or 'bfloat16': computation; parameters stay float32
    c.train.nan_limit = 10  # updates in a row skipped for a loss or gradient not finite before the run ends; 0: never
    c.train.stall_seconds = 1800.0  # without a step before the stacks are printed, three times before it ends; 0: never

    c.eval = ConfigDict()
    c.eval.splits = ("val", "test")
    c.eval.overlap = 0.5
    c.eval.mirror = ()  # axes averaged over at prediction
    c.eval.windows = 1  # windows a network call
    # Masks that keep only what findings confirm: {'outline': {'by': 'nodules', 'score': 0.3}}; docs/tasks.md
    c.eval.confirm = ConfigDict()
    # How a trained task's answers are read: {'grade': {'temperature': 1.7}}; docs/tasks.md
    c.eval.tasks = ConfigDict()
    c.eval.predictions = True  # write NIfTI on each input's own grid
    c.eval.pictures = True

    c.measures = ConfigDict()  # docs/measures.md
    c.measures.task = ""  # whose masks are measured; empty: the only task that has masks
    c.measures.frames = ConfigDict()  # frame -> name of its case, '{patient}_frame{ED:02}', or a column, 'phase=ED'
    c.measures.formulas = ConfigDict()  # measure -> formula over the masks of a patient; none: nothing is measured
    c.measures.report = ()  # measures that are summed up and drawn; empty: all
    # Class of the patients (a column), learnt from the training patients' reference masks by these measures.
    c.measures.diagnosis = ConfigDict({"column": "", "measures": (), "shrinkage": 0.8})

    # Devices along each axis; -1: all that are left. The rows of a batch lie over data x fsdp, parameters over fsdp,
    # volumes along their first axis over space; docs/cluster.md.
    c.mesh = ConfigDict({"data": -1, "fsdp": 1, "space": 1})
    # (regex, place): the first that matches a parameter's path rules it: 'fsdp' (the longest axis that it divides),
    # 'replicate', or a mesh axis or None for each axis.
    c.mesh_rules = ((r".*", "fsdp"),)
    c.parallel = "jit"  # or 'pmap': the step as one program a device
    c.wandb = ConfigDict({"project": "", "entity": ""})
    return c


def unknown_key(key: str, known: Iterable[str], where: str = "") -> UserError:
    """The error for a key nobody knows, with the nearest known one."""
    known = sorted(known)
    near = difflib.get_close_matches(key.split(".")[-1], known, n=1, cutoff=0.5)
    path = f"{where}.{key}" if where else key
    hint = f"did you mean '{f'{where}.' if where else ''}{near[0]}'?" if near else f"known here: {', '.join(known)}"
    return UserError(f"config: unknown key '{path}': {hint}")


def parse_arg(arg: str | None, **known: Any) -> ConfigDict:
    """Reads a recipe's argument, such as 'debug' or 'debug,width=8', strictly.

    Args:
      arg: the text after the colon of `--config=recipe.py:arg`; comma-separated `key` or `key=value`.
      **known: every key the recipe knows, with its default; its type rules the value. A bare key means True.

    Returns:
      The values. Raises UserError for an unknown key or a value of the wrong type.
    """
    values = dict(known)
    for part in filter(None, (p.strip() for p in (arg or "").split(","))):
        key, eq, text = part.partition("=")
        if key not in known:
            raise unknown_key(key, known, "argument")
        kind = type(known[key])
        try:
            if kind is bool:
                values[key] = not eq or {"true": True, "1": True, "false": False, "0": False}[text.lower()]
            else:
                values[key] = kind(text)
        except (KeyError, ValueError):
            raise UserError(f"config: argument '{part}': '{text}' is not of type {kind.__name__}") from None
    return ConfigDict(values)


def merge(base: ConfigDict, recipe: Mapping, where: str = "") -> None:
    """Writes `recipe` over `base` in place; keys unknown to `base` are refused save in the open nodes."""
    for key, value in recipe.items():
        path = f"{where}.{key}" if where else key
        open_here = bool(OPEN.fullmatch(where)) or _kind_key(where) is not None
        if key not in base and not open_here:
            raise unknown_key(key, base.keys(), where)
        if isinstance(value, Mapping | ConfigDict):
            if key not in base or not isinstance(base[key], ConfigDict):
                with base.ignore_type():
                    base[key] = ConfigDict()
            merge(base[key], value, path)
        else:
            with base.ignore_type():
                base[key] = value


def _kind_key(where: str) -> str | None:
    for pattern, key in KINDS.items():
        if re.fullmatch(pattern.replace(".", r"\.").replace("*", "[^.]+"), where):
            return key
    return None


def fill(config: ConfigDict, options: Callable[[str, str], Mapping[str, Any]]) -> None:
    """Adds the defaults of the chosen kinds of model and task, and refuses options they do not have.

    Args:
      options: `(room, kind) -> {option: default}` with room 'model' or 'tasks'; raises UserError for an unknown kind.
    """
    nodes = [("model", "model", config.model)] + [(f"tasks.{n}", "tasks", t) for n, t in config.tasks.items()]
    for where, room, node in nodes:
        key = KINDS["model" if room == "model" else "tasks.*"]
        if not isinstance(node, ConfigDict):
            raise UserError(f"config: {where}={node!r}: needs a table of options with a '{key}'")
        if key not in node:
            raise UserError(f"config: '{where}' needs a '{key}'")
        known = options(room, node[key])
        for name in node:
            if name != key and name not in known:
                raise unknown_key(name, known, where)
        for name, value in known.items():
            if name not in node:
                node[name] = ConfigDict(value) if isinstance(value, Mapping) else value


def load(recipe: str, overrides: Iterable[str], options: Callable[[str, str], Mapping[str, Any]]) -> ConfigDict:
    """The resolved, locked configuration of a run.

    Args:
      recipe: 'path/to/recipe.py' or 'path/to/recipe.py:argument'.
      overrides: 'optim.lr=0.1'-like texts.
      options: see `fill`.
    """
    path, _, arg = recipe.partition(":")
    file = Path(path)
    if not file.is_file():
        raise UserError(f"config: no such file '{path}'; recipes lie in configs/, e.g. --config=configs/brain_seg.py")
    spec = importlib.util.spec_from_file_location(f"medjax_recipe_{file.stem}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise UserError(f"config: '{path}' has no get_config(arg)")
    config = defaults()
    config.name = file.stem
    merge(config, module.get_config(arg or None))
    return resolve(config, overrides, options)


def resolve(config: ConfigDict, overrides: Iterable[str], options: Callable) -> ConfigDict:
    """Fills in kinds, applies overrides ('key.path=value'), checks and locks `config`.

    Where an override chooses another backbone, what `config.model` said of its own is left out with a note: options of
    one backbone mean something else, or nothing, to another.
    """
    pairs = []
    for text in overrides:
        key, eq, value = text.partition("=")
        if not eq:
            raise UserError(f"config: '--config.{text}' needs a value: --config.{key}=VALUE")
        pairs.append((key, value))
    # A kind decides which options exist, so kinds first.
    pairs.sort(key=lambda kv: kv[0].rpartition(".")[2] != (_kind_key(kv[0].rpartition(".")[0]) or ""))
    kinds = [kv for kv in pairs if _kind_key(kv[0].rpartition(".")[0]) == kv[0].rpartition(".")[2]]
    backbone = config.model.get("name")
    for key, value in kinds:
        _assign(config, key, value)
    if backbone is not None and config.model.name != backbone:
        given = {key for key, _ in pairs}
        _leave_options(config.model, backbone, {key.split(".")[1] for key in given if key.startswith("model.")})
    fill(config, options)
    for key, value in pairs[len(kinds) :]:
        _assign(config, key, value)
    fill(config, options)  # tasks that an override has added, or given as a table
    check(config)
    config.lock()
    return config


def _leave_options(model: ConfigDict, backbone: str, given: set[str]) -> None:
    """Deletes the options of `backbone` from a node that now names another; those not in `given` are said."""
    own = [key for key in model if key != "name"]
    for key in own:
        del model[key]
    if left := [f"model.{key}" for key in own if key not in given]:
        warn_once(
            f"model.name={model.name} in place of the recipe's {backbone}: the defaults of {model.name} hold "
            f"for all that --config.model.KEY=VALUE does not give, without the recipe's {', '.join(left)}"
        )


def check(config: ConfigDict) -> None:
    """Raises UserError for a value that is not what `LIMITS` says of its key."""
    for key, (words, good) in LIMITS.items():
        value: Any = config
        for part in key.split("."):
            value = value[part]
        if not good(value):
            raise UserError(f"config: {key}={_show(value)}: needs {words}")


def _assign(config: ConfigDict, path: str, text: str) -> None:
    """Sets one key from text, read as JSON or a Python literal, by the type the key has now."""
    *parents, last = path.split(".")
    node: Any = config
    for i, name in enumerate(parents):
        if not isinstance(node, ConfigDict) or name not in node:
            raise unknown_key(name, node.keys() if isinstance(node, ConfigDict) else (), ".".join(parents[:i]))
        node = node[name]
    where = ".".join(parents)
    if not isinstance(node, ConfigDict) or (last not in node and not OPEN.fullmatch(where)):
        raise unknown_key(last, node.keys() if isinstance(node, ConfigDict) else (), where)
    old = node.get(last)
    value: Any = text
    if not isinstance(old, str):
        try:
            value = ast.literal_eval({"true": "True", "false": "False", "null": "None"}.get(text.lower(), text))
        except (ValueError, SyntaxError):
            value = text
    if isinstance(old, float) and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if isinstance(old, tuple):
        value = (value,) if isinstance(value, int | float) else value
    if isinstance(value, list):
        value = tuple(value)
    if isinstance(old, ConfigDict) and isinstance(value, Mapping):
        if not OPEN.fullmatch(path) and _kind_key(path) is None and isinstance(_default(path), ConfigDict):
            merge(old, value, path)  # the keys it does not name stay
            return
        value = ConfigDict(value)
    # What may be absent, or takes a name as well as a table, may change its type.
    free = old is None or _default(path, "") is None or _takes_name(path, old, value)
    free = free or (STAGED.fullmatch(path) is not None and isinstance(old, int) and isinstance(value, tuple))
    if not free and type(value) is not type(old):
        kind = "a table" if isinstance(old, ConfigDict) else type(old).__name__
        raise UserError(f"config: --config.{path}={text}: needs {kind}, e.g. --config.{path}={_show(old)}")
    with node.ignore_type():
        node[last] = value


def _default(path: str, missing: Any = None) -> Any:
    """The default of `path`; `missing` where it has none of its own."""
    node: Any = defaults()
    for name in path.split("."):
        if not isinstance(node, ConfigDict) or name not in node:
            return missing
        node = node[name]
    return node


def _takes_name(path: str, old: Any, value: Any) -> bool:
    """Whether a text may stand where the recipe has a table: where the default is one, or what is there the user's."""
    where = path.rpartition(".")[0]
    own = OPEN.fullmatch(where) is not None and where != "tasks"
    return isinstance(old, ConfigDict) and isinstance(value, str) and (own or isinstance(_default(path), str))


def _show(value: Any) -> str:
    return str(value.to_dict()) if isinstance(value, ConfigDict) else str(value)


def to_json(config: ConfigDict) -> str:
    """The configuration as readable JSON (tuples become lists)."""

    def plain(value: Any) -> Any:
        if isinstance(value, FieldReference):
            value = value.get()
        if isinstance(value, ConfigDict | config_dict.FrozenConfigDict | Mapping):
            return {str(k): plain(v) for k, v in value.items()}
        return [plain(v) for v in value] if isinstance(value, list | tuple) else value

    return json.dumps(plain(config), indent=2)


def from_json(text: str | Mapping) -> ConfigDict:
    """Inverse of `to_json`, from the text or what it parses to; lists come back as tuples, as a config has them."""

    def tuples(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: tuples(v) for k, v in value.items()}
        return tuple(tuples(v) for v in value) if isinstance(value, list) else value

    return ConfigDict(tuples(json.loads(text) if isinstance(text, str) else text))


def difference(old: Mapping, new: Mapping, where: str = "") -> list[str]:
    """Readable lines for every key whose value differs between two configs."""
    lines = []
    for key in sorted({*old, *new}):
        a, b = old.get(key), new.get(key)
        path = f"{where}.{key}" if where else key
        if isinstance(a, Mapping | ConfigDict) and isinstance(b, Mapping | ConfigDict):
            lines += difference(a, b, path)
        elif a != b:
            lines.append(f"{path}: {_show(a)} -> {_show(b)}")
    return lines


def steps(duration: str, *, batch_size: int, n_examples: int, key: str = "duration") -> int:
    """'500 steps', '20 epochs' or '8000 examples' as a number of optimizer steps (rounded up).

    Args:
      n_examples: cases in the training split; one epoch takes one example of each.
    """
    form = r"\s*((?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:e[+-]?[0-9]{1,3})?)\s*(steps?|epochs?|examples?)\s*"
    match = re.fullmatch(form, duration) if isinstance(duration, str) else None
    if not match:
        raise UserError(f"config: '{key}' is '{duration}'; write e.g. '500 steps', '20 epochs' or '8000 examples'")
    number, unit = Fraction(match[1]), match[2].rstrip("s")
    if unit != "step":
        number = number * (n_examples if unit == "epoch" else 1) / batch_size
    if number > _MOST_STEPS:
        raise UserError(f"config: '{key}' is '{duration}': more than {_MOST_STEPS} steps, which no run counts")
    return math.ceil(number)
