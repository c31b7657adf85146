"""What large plans need on many devices: the real train step compiled ahead of time for machines that are not here.

    python -m benchmarks.scaling --plan=nnunet --target=tpu:v5p:2x2x2 --mesh data=8 --batch=16       # one compilation
    python -m benchmarks.scaling --all=tpu --to=scaling.jsonl                                        # those of the page
    python -m benchmarks.scaling --table=scaling.jsonl

One JSON line a compilation: bytes of a device (the compiler's `memory_analysis()`), FLOPs of the step, bytes that the
compiler reads and writes, bytes each device sends (from the collectives of the compiled program), bytes of the batch.
Targets: `tpu:TOPOLOGY` through libtpu (`pip install libtpu`; no TPU is needed), `cpu:N` on N forced devices of this
CPU, whose figures for activations are an estimate: other convolutions, other fusion.

The roofline of the table: a step takes the longest of FLOPs / peak and bytes / HBM bandwidth, plus what is sent / link
bandwidth with nothing overlapped. It is a bound from below for compute, from above for communication.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from medjax.errors import UserError


class Chip(NamedTuple):
    """One device.

    Attributes:
      flops: peak bfloat16 FLOP/s, dense. hbm: bytes/s of its memory. bytes: of its memory. links: bytes/s it sends to
        others, all links together, one direction. host: devices of a host.
    """

    flops: float
    hbm: float
    bytes: float
    links: float
    host: int


# From the makers' pages: cloud.google.com/tpu/docs/v5e and v5p; nvidia.com H100 SXM, with one 400 Gb/s card a GPU.
CHIPS = {
    "v5e": Chip(197e12, 819e9, 16e9, 100e9, 4),
    "v5p": Chip(459e12, 2765e9, 95e9, 300e9, 4),
    "h100": Chip(989e12, 3350e9, 80e9, 50e9, 8),
}


def stated(name: str) -> str:
    """What the roofline takes for a device, in words."""
    c = CHIPS[name]
    return (
        f"{name}: {c.flops / 1e12:.0f} TFLOP/s (bfloat16, dense), {c.hbm / 1e12:.2f} TB/s and {c.bytes / 1e9:.0f} GB "
        f"of memory, {c.links / 1e9:.0f} GB/s to other devices, {c.host} devices a host"
    )


_CNN: dict[str, Any] = {"optim": {"name": "sgd", "lr": 0.01, "momentum": 0.99}, "augment": {"mirror": (0, 1, 2)}}
_REGIONS = {"whole": ("oedema", "core", "rim"), "core": ("core", "rim"), "enhancing": ("rim",)}
_HALVES = ((2, 2, 2),) * 4
_SEGMENTATION = {"tumour": {"type": "segmentation", "levels": 5, "regions": _REGIONS, "batch_dice": True}}

# What is compiled: nnU-Net's plan for BraTS (Isensee et al. 2021), ResEnc-L's for BraTS 2021-like volumes (Isensee et
# al. 2024), and a ViT-L (Dosovitskiy et al. 2021) masked autoencoder with 16³ patches.
PLANS: dict[str, dict[str, Any]] = {
    "nnunet": {
        "data": {"patch": (128, 160, 112), "batch_size": 2},
        "model": {
            "name": "nnunet",
            "features": (32, 64, 128, 256, 320, 320),
            "factors": (*_HALVES, (2, 2, 1)),
            "levels": 5,
        },
        "tasks": _SEGMENTATION,
        **_CNN,
    },
    "resenc_l": {
        "data": {"patch": (160, 192, 160), "batch_size": 3},
        "model": {"name": "resenc", "features": (32, 64, 128, 256, 320, 320), "levels": 5},
        "tasks": _SEGMENTATION,
        **_CNN,
    },
    "vit_l_mae": {
        "data": {"patch": (160, 160, 160), "batch_size": 8},
        "model": {"name": "vit", "features": 1024, "depth": 24, "heads": 16, "mlp": 4096, "patch": (16, 16, 16)},
        "tasks": {"mae": {"type": "masked", "ratio": 0.75, "features": 512, "depth": 8, "heads": 16}},
        "optim": {"name": "adamw", "lr": 1e-4, "betas": (0.9, 0.95)},
        "augment": {"mirror": (0,)},
    },
}
LABELS = {"oedema": 1, "core": 2, "rim": 3}
MODALITIES = ("t1", "t1c", "t2", "flair")

# The machine code is never run: none of it is optimised. What is read here, buffers and collectives, comes before it.
_QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"

# (plan, mesh, examples of the step): one device; the plan's batch on each of 8 and 256; and what saves memory.
CASES: list[tuple[str, dict[str, int], int]] = [
    *((plan, {"data": n}, n * PLANS[plan]["data"]["batch_size"]) for plan in PLANS for n in (1, 8, 64, 256)),
    ("nnunet", {"data": 1, "space": 4}, 2),  # each part of the first axis a multiple of 32, what the network halves by
    ("resenc_l", {"data": 1, "space": 5}, 3),
    ("nnunet", {"data": 1, "fsdp": 8}, 16),
    ("vit_l_mae", {"data": 1, "fsdp": 8}, 64),
    ("vit_l_mae", {"data": 32, "fsdp": 8}, 2048),
]
# Topologies of so many devices.
TPU = {1: "v5p:1x1x1", 4: "v5p:2x2x1", 8: "v5p:2x2x2", 64: "v5p:4x4x4", 256: "v5p:8x8x4"}


# ---- one compilation


def devices(target: str) -> list[Any]:
    """The devices of a target, compile-only for a TPU topology."""
    import jax

    kind, _, what = target.partition(":")
    if kind == "cpu":
        return jax.devices("cpu")
    from jax.experimental import topologies

    name, _, shape = what.partition(":")
    if math.prod(map(int, shape.split("x"))) == 1:
        # One chip of the smallest slice that there is.
        whole = topologies.get_topology_desc(f"{name}:2x2x1", platform="tpu")
        return list(whole.devices)[:1]
    return list(topologies.get_topology_desc(what, platform="tpu").devices)


def build(plan: str, batch: int, precision: str) -> tuple[Any, Any]:
    """(config, job) of a plan, without any data."""
    from medjax import config as config_lib
    from medjax import job as job_lib
    from medjax import models, tasks
    from medjax.models.model import build_model

    config = config_lib.defaults()
    config_lib.merge(config, {**PLANS[plan], "train": {"total": "250000 steps", "precision": precision}})
    options = {"model": models.options, "tasks": tasks.options}
    config_lib.resolve(config, [f"data.batch_size={batch}"], lambda room, kind: options[room](kind))
    built = tasks.build(config.tasks, LABELS)
    cases: Any = range(1000)
    about: Any = SimpleNamespace(modalities=MODALITIES)
    cohort: Any = SimpleNamespace(labels=LABELS)
    return config, job_lib.Job(cohort, {"train": cases}, about, built, build_model(config, built), 250000)


def compile_case(
    plan: str, mesh_shape: Mapping[str, int], batch: int, target: str, precision: str, trace: bool = False
) -> dict[str, Any]:
    """Compiles (with `trace`: only traces) the train step of a plan for a target; one row of results."""
    import jax
    import numpy as np

    from medjax import parallel, report
    from medjax import step as step_lib

    config, job = build(plan, batch, precision)
    n = math.prod(mesh_shape.values())
    shape = tuple(mesh_shape.get(axis, 1) for axis in parallel.AXES)
    mesh = parallel.mesh_of(np.array(devices(target)[:n], dtype=object).reshape(shape))
    tx, _, _ = step_lib.make_state(config, job)
    state = step_lib.abstract_state(config, job, mesh)
    rows = parallel.batch_sharding(mesh)
    patch = tuple(config.data.patch)
    arrays = {
        "image": ((*patch, len(MODALITIES)), np.float32),
        "modality": ((len(MODALITIES),), np.bool_),
        "spacing": ((3,), np.float32),
        "example": ((), np.int32),
        "valid": ((), np.bool_),
    }
    for name, task in job.tasks.items():
        arrays[f"{name}/mask"] = ((), np.bool_)
        if "mask" in task.targets:
            arrays[f"{name}/target"] = (patch, np.uint8)
    inputs = {k: jax.ShapeDtypeStruct((batch, *s), t, sharding=rows) for k, (s, t) in arrays.items()}
    began = time.perf_counter()
    traced = step_lib.make_train_step(config, job, tx, mesh).trace(state, inputs)  # type: ignore[attr-defined]
    flops = report.flops(traced.jaxpr)
    row: dict[str, Any] = {
        "plan": plan, "target": target, "devices": n, "mesh": dict(mesh_shape), "batch": batch, "precision": precision,
        "parameters": sum(math.prod(x.shape) for x in jax.tree.leaves(state.params)),
        "flops": flops, "state_bytes": _shard_bytes(state),
        "batch_bytes": sum(math.prod(v.shape) * v.dtype.itemsize for v in inputs.values()), "jax": jax.__version__,
    }  # fmt: skip
    if trace:
        return row | {"seconds": round(time.perf_counter() - began, 1)}
    try:
        compiled = traced.lower(lowering_platforms=(target.partition(":")[0],)).compile()
    except Exception as error:  # the compiler's own word that it does not fit
        words = " ".join(str(error).split())
        found = re.search(r"Used ([0-9.]+)([MGT]) of ([0-9.]+)([MGT]) hbm", words)
        row |= {"error": words[:300], "seconds": round(time.perf_counter() - began, 1)}
        if found:
            row["bytes"] = float(found[1]) * {"M": 2**20, "G": 2**30, "T": 2**40}[found[2]]
        return row
    memory = compiled.memory_analysis()
    cost = compiled.cost_analysis() or {}
    row |= {
        "bytes": memory.argument_size_in_bytes + memory.temp_size_in_bytes
        + memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "accessed": cost.get("bytes accessed"),
        "sent": collectives(compiled.as_text()),
        "seconds": round(time.perf_counter() - began, 1),
    }  # fmt: skip
    return row


def _shard_bytes(tree: Any) -> int:
    """Bytes of one device's part of a tree of shapes with shardings."""
    import jax

    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


_ITEM = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8,
         "u64": 8, "f64": 8}  # fmt: skip
_COLLECTIVE = re.compile(
    r"= (?P<shape>\(?.*?)\s"
    r"(?P<name>all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?P<start>-start)?\("
)


def collectives(text: str) -> dict[str, float]:
    """Bytes that each device sends in one run of a compiled program (HLO text), by kind of collective.

    As rings do it: of an all-reduce over g devices 2 (g - 1) / g of its bytes, of a gather (g - 1) / g of the gathered,
    of a scatter (g - 1) times the part that stays; a permutation sends its operand once.
    """
    sent: dict[str, float] = {}
    for line in text.splitlines():
        found = _COLLECTIVE.search(line)
        if not found:
            continue
        shapes = [
            math.prod(map(int, filter(None, dims.split(",")))) * _ITEM[kind]
            for kind, dims in re.findall(r"([a-z]+[0-9]*)\[([0-9,]*)\]", found["shape"])
            if kind in _ITEM
        ]
        name, g = found["name"], _group(line)
        size = float(sum(shapes))
        if found["start"] and name in ("all-gather", "collective-permute", "reduce-scatter"):
            # The started operation's result holds its operands too; what counts is the last half.
            size = float(max(shapes)) if name == "all-gather" else float(min(shapes or [0]))
            if name == "collective-permute":
                size = float(shapes[0])
        share = {"all-reduce": 2 * (g - 1) / g, "all-gather": (g - 1) / g, "reduce-scatter": g - 1.0}
        sent[name] = sent.get(name, 0.0) + size * share.get(name, 1.0 if name == "collective-permute" else (g - 1) / g)
    return sent


def _group(line: str) -> int:
    """Devices of one replica group of a collective's line."""
    if listed := re.search(r"replica_groups=\{\{([0-9,]+)\}", line):
        return len(listed[1].split(","))
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]", line):
        return int(iota[2])
    if named := re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", line):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", named[1])}
        return math.prod(sizes[name] for name in re.findall(r"'(\w+)'", named[2]))
    return 2  # a permutation


# ---- the page


def expected(row: Mapping[str, Any], chip: Chip) -> dict[str, float]:
    """Seconds of a step by the roofline, and its parts; bytes/s of input that a host needs for it."""
    n = row["devices"]
    compute = row["flops"] / n / chip.flops
    memory = (row.get("accessed") or 0.0) / chip.hbm
    sent = sum(row["sent"].values()) / chip.links
    step = max(compute, memory) + sent
    hosts = max(1, n // chip.host)
    return {
        "compute": compute,
        "memory": memory,
        "sent": sent,
        "step": step,
        "input": row["batch_bytes"] / hosts / step,
    }


def at(row: Mapping[str, Any], n: int) -> dict[str, Any]:
    """The row of another number of devices, of a mesh that splits the batch alone, with as many examples a device.

    Each device runs the same program; only its sums of gradients go round a longer or shorter ring.
    """
    d = row["devices"]
    if row["mesh"].get("data") != d or d == 1:
        raise UserError(f"scaling: only rows of a mesh data=N with N > 1 stand for other numbers, not {row['mesh']}")
    longer = (1 - 1 / n) / (1 - 1 / d)
    many = {k: row[k] * n // d for k in ("flops", "batch", "batch_bytes")}
    return {**row, **many, "devices": n, "mesh": {"data": n}, "sent": {k: v * longer for k, v in row["sent"].items()}}


def table(rows: Sequence[Mapping[str, Any]], chip: str) -> str:
    """The results as Markdown."""
    lines = [
        "| plan | devices: mesh | batch | GB a device | TFLOP a device | GB sent | compute / HBM / sent, ms | step, ms "
        "| input a host, GB/s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        mesh = " × ".join(f"{k} {v}" for k, v in row["mesh"].items() if v > 1) or "1"
        lead = f"| {row['plan']} | {row['devices']}: {mesh} | {row['batch']} | "
        if "error" in row:
            size = f"{row['bytes'] / 1e9:.1f}" if "bytes" in row else "-"
            lines.append(lead + f"{size}: does not fit | | | | | |")
            continue
        e = expected(row, CHIPS[chip])
        parts = " / ".join(f"{1e3 * e[k]:.0f}" for k in ("compute", "memory", "sent"))
        lines.append(
            lead
            + f"{row['bytes'] / 1e9:.2f} | {row['flops'] / row['devices'] / 1e12:.2f} | "
            + f"{sum(row['sent'].values()) / 1e9:.3f} | {parts} | {1e3 * e['step']:.0f} | {e['input'] / 1e9:.2f} |"
        )
    lines += ["", stated(chip)]
    return "\n".join(lines)


def run_all(kind: str, to: Path, limit: float) -> None:
    """Compiles every case in a process of its own; those that `to` already has are left out."""
    done = [json.loads(line) for line in to.read_text().splitlines()] if to.exists() else []
    for plan, mesh, batch in CASES:
        n = math.prod(mesh.values())
        if kind == "tpu" and n not in TPU:
            continue
        target = f"tpu:{TPU[n]}" if kind == "tpu" else f"cpu:{n}"
        if any((r["plan"], r["mesh"], r["batch"], r["target"]) == (plan, mesh, batch, target) for r in done):
            continue
        command = [
            sys.executable,
            "-m",
            "benchmarks.scaling",
            f"--plan={plan}",
            f"--target={target}",
            f"--batch={batch}",
        ]
        command += ["--mesh", *(f"{k}={v}" for k, v in mesh.items())]
        print("$", " ".join(command), flush=True)
        try:
            found = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=limit, check=False)
        except subprocess.TimeoutExpired:
            print(f"not compiled in {limit:.0f} s", flush=True)
            continue
        if found.returncode == 0:
            line = found.stdout.splitlines()[-1]
            print(line, flush=True)
            with to.open("a") as file:
                file.write(line + "\n")


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--plan", choices=list(PLANS))
    p.add_argument("--target", default="cpu:1", help="tpu:v5p:2x2x2, or cpu:8")
    p.add_argument("--mesh", nargs="+", default=["data=1"], metavar="AXIS=N")
    p.add_argument("--batch", type=int, default=0, help="examples of the step; default: the plan's a device")
    p.add_argument("--precision", default="bfloat16")
    p.add_argument(
        "--trace", action="store_true", help="do not compile: parameters, FLOPs and bytes of state and batch"
    )
    p.add_argument("--all", choices=("tpu", "cpu"), help="every case of the page, one after the other")
    p.add_argument("--to", type=Path, default=Path("scaling.jsonl"))
    p.add_argument("--limit", type=float, default=1200.0, help="seconds of one compilation")
    p.add_argument("--table", type=Path, help="only print the table of a file of results")
    p.add_argument(
        "--at", type=int, nargs="+", default=[], metavar="N", help="of the table: data rows for N devices too"
    )
    p.add_argument("--chip", choices=list(CHIPS), default="v5p", help="of the roofline")
    args = p.parse_args(argv)
    if args.table:
        rows = [json.loads(line) for line in args.table.read_text().splitlines()]
        measured = [(row["plan"], row["mesh"]) for row in rows]
        for row in [r for r in rows if r["mesh"].get("data") == r["devices"] > 1 and "error" not in r]:
            new = [at(row, n) for n in args.at if (row["plan"], {"data": n}) not in measured]
            rows[rows.index(row) + 1 : rows.index(row) + 1] = new
        print(table(rows, args.chip))
        return
    if args.all:
        return run_all(args.all, args.to, args.limit)
    if not args.plan:
        p.error("say --plan=NAME, --all or --table")
    try:
        mesh = {k: int(v) for k, _, v in (text.partition("=") for text in args.mesh)}
    except ValueError:
        p.error(f"--mesh {' '.join(args.mesh)}: write AXIS=NUMBER, e.g. --mesh data=4 fsdp=2")
    n = math.prod(mesh.values())
    os.environ["JAX_PLATFORMS"] = "cpu"
    if args.target.startswith("cpu"):
        flags = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={n} {_QUICK}".strip()
    else:
        # libtpu looks for a TPU's metadata server otherwise.
        os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5p-8", "TPU_WORKER_HOSTNAMES": "localhost"}
    batch = args.batch or PLANS[args.plan]["data"]["batch_size"] * mesh.get("data", 1) * mesh.get("fsdp", 1)
    print(json.dumps(compile_case(args.plan, mesh, batch, args.target, args.precision, args.trace)))


if __name__ == "__main__":
    main()
