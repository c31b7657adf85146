"""The house rules: imports run one way, TensorFlow stays in its room, importing is light."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
PACKAGE = REPO / "medjax"

# Ground floor first: a room may import rooms of lower floors only (and its own). See docs/design.md, "Rooms".
FLOORS = {
    "": 0, "errors": 0, "config": 1, "runtime": 1, "processes": 1, "ops": 1, "report": 2, "faults": 2, "parallel": 2,
    "checkpoint": 2, "logging": 2,
    "optim": 2, "pictures": 2, "data": 2, "augment": 2, "models": 2, "losses": 2, "metrics": 2, "tasks": 3,
    "convert": 3, "peft": 3, "transfer": 3, "semi": 4, "predict": 4, "pretext": 4, "measures": 4, "evaluate": 5,
    "job": 6, "balance": 6, "step": 7, "train": 8, "main": 9, "plan": 9, "compare": 3, "select": 9, "merge": 5,
}  # fmt: skip
# Rooms of one floor that may still not see each other, or only what is named.
ONLY = {
    "ops": set(),
    "augment": {"ops"},
    "losses": {"ops"},
    "metrics": {"ops"},
    "models": {"ops"},
    "data": {"ops", "config", "logging", "pictures"},
    "tasks": {"models", "losses", "metrics", "augment"},
    "config": set(),
    "processes": {"config"},
    "faults": {"processes"},
    "optim": set(),
    "parallel": set(),
    "checkpoint": set(),
    "logging": set(),
    "compare": {"config", "logging", "metrics", "pictures"},
}


def room(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def imports(file: Path) -> list[tuple[str, int]]:
    """(module, line) of every import in a file, wherever it stands."""
    found = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found += [(a.name, node.lineno) for a in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            if node.module == "medjax":
                found += [(f"medjax.{a.name}", node.lineno) for a in node.names]
            else:
                found.append((node.module, node.lineno))
    return found


def modules() -> list[tuple[str, Path]]:
    return [
        (room(".".join(("medjax", *f.relative_to(PACKAGE).with_suffix("").parts))), f) for f in PACKAGE.rglob("*.py")
    ]


def violations(files: list[tuple[str, Path]]) -> list[str]:
    wrong = []
    for here, file in files:
        here = "" if here == "__init__" else here
        for module, line in imports(file):
            if module.split(".")[0] == "medjax":
                there = room(module)
                if there == here or there in ("errors", ""):
                    continue
                if there not in FLOORS:
                    wrong.append(f"{file}:{line}: room '{there}' has no floor; add it to this test and docs/design.md")
                elif FLOORS[there] > FLOORS[here] or there not in ONLY.get(here, {there}):
                    wrong.append(f"{file}:{line}: '{here}' imports '{there}'")
            elif module.split(".")[0] in ("tensorflow", "tensorflow_datasets", "tf_keras"):
                if here != "data":
                    wrong.append(f"{file}:{line}: TensorFlow outside medjax/data")
            elif module.split(".")[0] == "orbax" and here != "checkpoint":
                wrong.append(f"{file}:{line}: Orbax outside checkpoint.py")
            elif module.split(".")[0] in ("clu", "wandb", "tensorboard") and here != "logging":
                wrong.append(f"{file}:{line}: a metric writer outside logging.py")
    return wrong


def test_imports_run_one_way() -> None:
    assert violations(modules()) == []


@pytest.mark.parametrize(
    ("where", "line", "message"),
    [
        ("ops/x.py", "from medjax.data import nifti", "'ops' imports 'data'"),
        ("models/x.py", "import tensorflow as tf", "TensorFlow outside"),
        ("losses/x.py", "from medjax import train", "'losses' imports 'train'"),
        ("train.py", "import orbax.checkpoint", "Orbax outside"),
    ],
)
def test_the_walk_finds_violations(tmp_path: Path, where: str, line: str, message: str) -> None:
    file = tmp_path / Path(where).name
    file.write_text(f"def f():\n    {line}\n")
    found = violations([(room("medjax." + where.replace("/", ".").removesuffix(".py")), file)])
    assert len(found) == 1
    assert message in found[0]


def test_recipes_import_little() -> None:
    for file in (REPO / "configs").rglob("*.py"):
        for module, _ in imports(file):
            light = ("ml_collections", "medjax.config", "medjax.errors", "configs", "importlib", "os", "__future__")
            assert module in light, f"{file} imports {module}"


def test_the_contracts_of_the_design_name_modules_that_have_them() -> None:
    text = (REPO / "docs" / "design.md").read_text()
    named = re.findall(r"^class (\w+)[:(].*# (data\.\w+)$", text, re.MULTILINE)
    assert [name for name, _ in named] == ["Volume", "Case"]
    for name, module in named:
        assert f"\nclass {name}" in (REPO / "medjax" / f"{module.replace('.', '/')}.py").read_text(), module


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPO, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


BLOCK = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in ('tensorflow', 'tensorflow_datasets', 'clu', 'tensorboard', 'nilearn'):
            raise ImportError(f'{name} is blocked')
sys.meta_path.insert(0, Block())
"""


def test_everything_imports_without_tensorflow() -> None:
    names = [
        ".".join(("medjax", *f.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")
        for f in PACKAGE.rglob("*.py")
    ]
    code = BLOCK + f"import importlib\nfor name in {names}: importlib.import_module(name)\nprint('done')"
    assert run_python(code).strip() == "done"


def test_import_and_help_are_light() -> None:
    code = (
        "import time; t = time.perf_counter(); import medjax, sys; d = time.perf_counter() - t\n"
        "assert 'jax' not in sys.modules and 'numpy' not in sys.modules; print(d)"
    )
    assert float(run_python(code)) < 2.0
    code = BLOCK.replace("'nilearn'", "'nilearn', 'jax', 'flax', 'numpy', 'scipy'") + (
        "from medjax import main\ntry: main.main(['--help'])\nexcept SystemExit as e: sys.exit(e.code)"
    )
    assert "--config" in run_python(code)
