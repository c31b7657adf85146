"""What a compiled program sends, against what its collectives must send; the roofline by hand."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import scaling
from medjax.errors import UserError

REPO = Path(__file__).resolve().parents[1]

# Gradient of replicated weights over split rows: an all-reduce of the weights. Weights split as well: gathered, and
# the gradient scattered (which this CPU's compiler does by an all-reduce). Halves of rows shifted by one device.
PROGRAM = """
import os
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
import json, jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
from benchmarks import scaling

mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
rows, everywhere = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())

def sent(function, shapes, ins, outs):
    arguments = [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes]
    compiled = jax.jit(function, in_shardings=ins, out_shardings=outs).lower(*arguments).compile()
    return scaling.collectives(compiled.as_text())

gradient = jax.grad(lambda w, x: jnp.sum(jnp.tanh(x @ w)))
shift = jax.shard_map(lambda x: jax.lax.ppermute(x, "data", [(i, (i + 1) % 4) for i in range(4)]), mesh=mesh,
                      in_specs=P("data"), out_specs=P("data"))
print(json.dumps([
    sent(gradient, [(128, 64), (32, 128)], (everywhere, rows), everywhere),
    sent(lambda x: x * 2, [(128, 64)], (rows,), everywhere),
    sent(shift, [(128, 64)], (rows,), rows),
    sent(lambda x: x * 2, [(128, 64)], (rows,), rows),
]))
"""


def test_what_collectives_send() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=REPO, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    size = 128 * 64 * 4
    assert json.loads(done.stdout.splitlines()[-1]) == [
        {"all-reduce": 2 * 3 / 4 * size},
        {"all-gather": 3 / 4 * size},
        {"collective-permute": size / 4},
        {},
    ]


@pytest.mark.parametrize(
    ("line", "sent"),
    [
        # As TPU's compiler writes them; groups by the axes of the mesh, by rows of an iota, listed.
        ("%a = bf16[3,32]{1,0:T(8,128)} all-reduce(%f), replica_groups=mesh['axis_0'=8] {'axis_0'}, to_apply=%add",
         {"all-reduce": 2 * 7 / 8 * 192}),
        ("%a = f32[64]{0} all-reduce(%f), replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_1'}, to_apply=%add",
         {"all-reduce": 256.0}),
        ("%a = (f32[8]{0}, f32[4]{0}) all-reduce(%f, %g), replica_groups=[2,4]<=[8]", {"all-reduce": 1.5 * 48}),
        ("%a = f32[2]{0} reduce-scatter(%f), replica_groups={{0,1,2,3}}", {"reduce-scatter": 24.0}),
        ("%a = (f32[2]{0}, f32[8]{0}) all-gather-start(%f), replica_groups={{0,1,2,3}}", {"all-gather": 24.0}),
        ("%b = f32[8]{0} all-gather-done(%a)", {}),
        ("%a = (f32[2]{0}, f32[2]{0}, u32[], u32[]) collective-permute-start(%f), source_target_pairs={{0,1}}",
         {"collective-permute": 8.0}),
    ],
)  # fmt: skip
def test_lines_of_compiled_programs(line: str, sent: dict[str, float]) -> None:
    assert scaling.collectives(line) == pytest.approx(sent)


def test_the_roofline_by_hand() -> None:
    chip = scaling.Chip(flops=100.0, hbm=10.0, bytes=1.0, links=5.0, host=4)
    row = {
        "devices": 8,
        "flops": 1600,
        "accessed": 10.0,
        "sent": {"all-reduce": 5.0, "all-gather": 5.0},
        "batch_bytes": 80,
    }
    found = scaling.expected(row, chip)
    assert found == {"compute": 2.0, "memory": 1.0, "sent": 2.0, "step": 4.0, "input": 10.0}


# A plan of two stages in the place of the large ones, compiled for forced devices of this CPU by the program itself.
TINY = """
from benchmarks import scaling
scaling.PLANS["nnunet"] = {
    "data": {"patch": (16, 16, 16), "batch_size": 1}, "augment": {"mirror": (0,)},
    "model": {"name": "unet", "features": (8, 16), "convs": 1, "decoder_convs": 1},
    "tasks": {"tumour": {"type": "segmentation", "levels": 1}},
    "optim": {"name": "sgd", "lr": 0.01, "momentum": 0.9},
}
for mesh in ("data=4", "data=2", "fsdp=2"):
    scaling.main(["--plan=nnunet", f"--target=cpu:{mesh[-1]}", "--mesh", mesh, "--precision=float32"])
scaling.main(["--plan=nnunet", "--target=cpu:2", "--mesh", "data=2", "--trace"])
"""
KEYS = {"plan", "target", "devices", "mesh", "batch", "precision", "parameters", "flops", "state_bytes", "batch_bytes",
        "jax", "seconds"}  # fmt: skip


def test_a_plan_compiled_for_two_devices(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = subprocess.run([sys.executable, "-c", TINY], cwd=REPO, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    four, data, fsdp, traced = [json.loads(line) for line in done.stdout.splitlines()]
    assert set(traced) == KEYS
    assert set(data) == set(fsdp) == KEYS | {"bytes", "temporaries", "accessed", "sent"}
    assert [row["mesh"] for row in (data, fsdp, traced)] == [{"data": 2}, {"fsdp": 2}, {"data": 2}]
    for key in ("flops", "parameters", "batch", "batch_bytes"):
        assert data[key] == fsdp[key] == traced[key] > 0
    # What the step must do by hand: 2 examples of image, mask and the small columns; SGD keeps one more copy.
    assert data["batch"] == 2
    assert data["batch_bytes"] == 2 * (16**3 * (4 * 4 + 1) + 4 + 3 * 4 + 4 + 1 + 1)
    held = 2 * 4 * data["parameters"]
    assert held <= data["state_bytes"] <= held + 64
    assert fsdp["state_bytes"] < 0.7 * data["state_bytes"]
    # Half of the float32 gradients to and fro, and a few sums.
    assert data["sent"] == {"all-reduce": pytest.approx(4 * data["parameters"], rel=0.01)}
    assert fsdp["sent"]["all-gather"] > 0
    assert data["bytes"] >= data["state_bytes"] + data["temporaries"]
    # What two devices do says what four do.
    derived = scaling.at(data, 4)
    for key in ("flops", "batch", "batch_bytes", "mesh", "devices", "state_bytes"):
        assert derived[key] == four[key]
    assert derived["sent"] == pytest.approx(four["sent"], rel=1e-3)
    assert derived["bytes"] == pytest.approx(four["bytes"], rel=0.01)
    with pytest.raises(UserError, match="mesh data=N"):
        scaling.at(fsdp, 4)
    # And the table of such rows, with the data of the roofline.
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in (data, fsdp)))
    scaling.main([f"--table={file}", "--chip=h100", "--at", "2", "64"])
    lines = capsys.readouterr().out.splitlines()
    assert [line[:24] for line in lines[2:5]] == [
        "| nnunet | 2: data 2 | 2", "| nnunet | 64: data 64 |", "| nnunet | 2: fsdp 2 | 2",
    ]  # fmt: skip
    assert lines[-1] == scaling.stated("h100")


@pytest.mark.parametrize("chip", scaling.CHIPS)
def test_the_page_states_the_roofline(chip: str) -> None:
    assert scaling.stated(chip) in (REPO / "docs" / "scaling.md").read_text()


def test_the_roofline_in_words() -> None:
    assert scaling.stated("v5p") == (
        "v5p: 459 TFLOP/s (bfloat16, dense), 2.77 TB/s and 95 GB of memory, 300 GB/s to other devices, 4 devices a host"
    )
