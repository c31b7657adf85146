"""plan.json, and the recipe that reads it: written side by side, both meant to be edited.

plan.json holds what was decided (its table `config`), by the keys of the configuration, and on what grounds; config.py
where the data are and how they are trained on. Light to import: a recipe does.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from medjax import config as config_lib
from medjax.errors import UserError, write_atomic

VERSION = 1
PLAN, RECIPE = "plan.json", "config.py"
_KEYS = ("version", "config", "folds", "memory", "fingerprint", "notes")

_TEXT = '''"""{name}, as planned by

    {command}

What was decided for these data (spacing, patch, batch size, network, normalisation, folds) is in plan.json beside this
file: edit it there. Where the data are and how they are trained on is here.

Arguments: `fold=N` ({folds}), `debug` (a narrow network, a few steps).
"""

from pathlib import Path

from ml_collections import ConfigDict

from medjax.config import parse_arg
from medjax.plan.recipe import planned


def get_config(arg=None):
    arg = parse_arg(arg, debug=False, fold=0)
    config = ConfigDict()
{config}
    return planned(config, Path(__file__).resolve().parent, fold=arg.fold, debug=arg.debug)
'''


def write(
    folder: Path, config: ConfigDict, plan: Mapping[str, Any], folds: Sequence[Mapping[str, str]], command: str
) -> None:
    """Writes plan.json, config.py and one split_N.csv a fold into `folder`; plan.json last."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot make the folder: {error.strerror}. Choose another --out.") from error
    for i, fold in enumerate(folds):
        table = io.StringIO()
        writer = csv.writer(table, lineterminator="\n")
        writer.writerow(("id", "split"))
        writer.writerows(fold.items())
        write_atomic(folder / f"split_{i}.csv", table.getvalue())
    rest = _without(changes(config), plan["config"])
    lines = [
        f"config.{key} = " + (f"ConfigDict({_source(v, 0)})" if isinstance(v, Mapping) else _source(v, 0))
        for key, v in rest.items()
    ]
    text = _TEXT.format(
        name=config.name,
        command=command.replace("\\", "\\\\").replace('"""', r"\"\"\""),
        folds=f"of {len(folds)}" if folds else "0: the data are split already",
        config="\n".join(f"    {row}" for line in lines for row in line.splitlines()),
    )
    write_atomic(folder / RECIPE, text)
    write_atomic(folder / PLAN, dumps(plan) + "\n")


def planned(config: ConfigDict, folder: Path, *, fold: int = 0, debug: bool = False) -> ConfigDict:
    """The recipe's `config` with what the plan.json in `folder` decided; called by a written config.py.

    Raises:
      UserError: naming the file and the key: damaged JSON, an unknown key, a value that cannot be.
    """
    file = folder / PLAN
    plan = read(file)
    overlay(config, plan["config"])
    folds = plan["folds"]
    if not 0 <= fold < max(1, folds):
        raise UserError(f"{file}: 'folds' is {folds}, so there is no fold={fold}")
    if folds:
        config.data.split = ConfigDict({"file": str(folder / f"split_{fold}.csv")})
    if debug:
        config.train.update({"total": "4 steps", "log_every": "1 steps", "eval_every": "4 steps", "eval_cases": 1})
        config.train.checkpoint_every = "4 steps"
        config.optim = ConfigDict({**config.get("optim", {}), "warmup": "1 steps"})
        if "features" in config.model:
            config.model.features = tuple(min(f, 4 * 2**i) for i, f in enumerate(config.model.features))
    return config


def read(file: Path) -> dict[str, Any]:
    """The table of a plan.json, checked; lists in its `config` come back as tuples. Raises UserError naming the key."""
    try:
        plan = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}; python -m medjax.plan writes it") from None
    except ValueError as error:
        raise UserError(f"{file}: not valid JSON ({error}). Correct the file, or plan anew.") from None
    if not isinstance(plan, dict):
        raise UserError(f"{file}: must hold one JSON object")
    for key in plan:
        if key not in _KEYS:
            raise UserError(f"{file}: unknown key '{key}' (known: {', '.join(_KEYS)})")
    if plan.get("version") != VERSION:
        raise UserError(f"{file}: version {plan.get('version')}; this medjax reads version {VERSION}. Plan anew.")
    if not isinstance(plan.get("folds"), int) or plan["folds"] < 0:
        raise UserError(f"{file}: 'folds' must be a number from 0 on")
    if not isinstance(plan.get("config"), dict):
        raise UserError(f"{file}: 'config' must be a table of settings")
    try:
        _check(plan["config"])
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    plan["config"] = config_lib.from_json(plan["config"]).to_dict()
    return plan


def dumps(plan: Mapping[str, Any]) -> str:
    """JSON that is pleasant to edit: tables are spread, lists of numbers stay on a line."""

    def text(value: Any, indent: int) -> str:
        if isinstance(value, Mapping) and value:
            pad = " " * (indent + 2)
            rows = ",\n".join(f"{pad}{json.dumps(k)}: {text(v, indent + 2)}" for k, v in value.items())
            return f"{{\n{rows}\n{' ' * indent}}}"
        if isinstance(value, list) and any(isinstance(v, Mapping | str) for v in value):
            pad = " " * (indent + 2)
            return "[\n" + ",\n".join(pad + text(v, indent + 2) for v in value) + f"\n{' ' * indent}]"
        return json.dumps(value, ensure_ascii=False)

    return text(plan, 0)


def overlay(config: ConfigDict, table: Mapping[str, Any]) -> None:
    """Writes a table of plain values over a recipe's own."""
    for key, value in table.items():
        if isinstance(value, Mapping) and isinstance(config.get(key), ConfigDict):
            overlay(config[key], value)
        else:
            with config.ignore_type():
                config[key] = ConfigDict(dict(value)) if isinstance(value, Mapping) else value


def _check(table: Mapping[str, Any]) -> None:
    """Raises UserError naming the key for what the configuration does not know, or what cannot be."""
    config_lib.merge(config_lib.defaults(), table)

    def number(v: Any) -> bool:
        return isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v)

    def whole(v: Any) -> bool:
        return isinstance(v, int) and not isinstance(v, bool) and v > 0

    def three(v: Any, good: Callable[[Any], bool]) -> bool:
        return isinstance(v, list) and len(v) == 3 and all(good(n) for n in v)

    def at(path: str) -> Any:
        value: Any = table
        for part in path.split("."):
            if not isinstance(value, Mapping) or part not in value:
                return None
            value = value[part]
        return value

    rules: dict[str, tuple[Callable[[Any], bool], str]] = {
        "data.preprocess.spacing": (lambda v: three(v, lambda n: number(n) and n > 0), "three numbers of mm"),
        "data.patch": (lambda v: three(v, whole), "three whole numbers of voxels"),
        "data.batch_size": (whole, "a whole number from 1 on"),
        "data.foreground": (lambda v: number(v) and 0 <= v <= 1, "a share from 0 to 1"),
        "model.features": (lambda v: isinstance(v, list) and len(v) > 0 and all(map(whole, v)), "a number a stage"),
        "model.factors": (_stages(three, lambda n: n in (1, 2)), "three numbers (1 or 2) for each stage but the first"),
        "model.kernels": (_stages(three, lambda n: whole(n) and n % 2 == 1), "three odd numbers for each stage"),
    }
    for path, (good, words) in rules.items():
        value = at(path)
        if value is not None and not good(value):
            raise UserError(f"config.{path} is {json.dumps(value)}; it needs {words}")
    features, factors, kernels, patch = (
        at(f"{k}") for k in ("model.features", "model.factors", "model.kernels", "data.patch")
    )
    if features is None or factors is None or not isinstance(factors[0], list):
        return
    for name, value, want in (("factors", factors, len(features) - 1), ("kernels", kernels, len(features))):
        if value is not None and isinstance(value[0], list) and len(value) != want:
            raise UserError(
                f"config.model.{name} has {len(value)} entries; with {len(features)} stages (config.model.features) it "
                f"needs {want}"
            )
    multiple = [math.prod(f[a] for f in factors) for a in range(3)]
    if patch and any(n % m for n, m in zip(patch, multiple, strict=True)):
        near = [max(m, round(n / m) * m) for n, m in zip(patch, multiple, strict=True)]
        raise UserError(
            f"config.data.patch is {patch}, not a multiple of {multiple}, the product of config.model.factors; the "
            f"nearest is {near}"
        )


def _stages(three: Callable[..., bool], good: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """A list of three numbers, or one for each stage."""
    return lambda v: three(v, good) or (isinstance(v, list) and len(v) > 0 and all(three(w, good) for w in v))


def changes(config: ConfigDict) -> dict[str, Any]:
    """What a recipe must say to give `config`: the keys that differ from the defaults, and the kinds chosen."""
    from medjax import models, tasks

    base = config_lib.defaults()
    base.model = ConfigDict({"name": config.model.name})
    base.tasks = ConfigDict({name: {"type": task.type} for name, task in config.tasks.items()})
    kinds = {"model": models.options, "tasks": tasks.options}
    config_lib.fill(base, lambda room, kind: kinds[room](kind))
    for node, key in ((base.model, "name"), *((task, "type") for task in base.tasks.values())):
        del node[key]
    return _changes(config, base)


def _changes(config: Mapping, base: Mapping) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            inner = _changes(value, base[key] if isinstance(base.get(key), ConfigDict) else {})
            if inner:
                found[key] = inner
        elif key not in base or base[key] != value:
            found[key] = value
    return found


def _source(value: Any, indent: int) -> str:
    """Python for a setting, as it stands `indent` levels deep."""
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, list | tuple):
        return f"({', '.join(_source(v, indent) for v in value)}{',' if len(value) == 1 else ''})"
    if not isinstance(value, Mapping):
        return repr(value)
    flat = "{" + ", ".join(f"{json.dumps(k)}: {_source(v, indent)}" for k, v in value.items()) + "}"
    if len(flat) + 4 * indent < 96 and (indent or len(value) == 1) and "\n" not in flat:
        return flat
    pad = "    " * indent
    rows = "".join(f"{pad}    {json.dumps(k)}: {_source(v, indent + 1)},\n" for k, v in value.items())
    return f"{{\n{rows}{pad}}}"


def _without(table: dict[str, Any], decided: Mapping[str, Any]) -> dict[str, Any]:
    """`table` less the keys that `decided` holds."""
    found: dict[str, Any] = {}
    for key, value in table.items():
        if not isinstance(value, dict):
            if key not in decided:
                found[key] = value
        elif key not in decided or isinstance(decided[key], Mapping):
            inner = _without(value, decided.get(key, {}))
            if inner or key not in decided:
                found[key] = inner
    return found
