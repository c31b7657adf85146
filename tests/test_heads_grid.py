"""Heads that speak of every voxel need the image's own grid: on an encoder alone they are refused in words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from test_train import load
from tiny import write_cohort, write_recipe

from medjax import job as job_lib
from medjax import models
from medjax.errors import UserError
from medjax.models.heads import DenseHead, HeatHead, PooledHead
from medjax.models.model import Model


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("resnet", {"features": (4, 4), "factors": ((1, 1, 1), (2, 2, 2)), "stem_stride": (2, 2, 2), "depth": 10}),
        ("vit", {"features": 8, "depth": 1, "heads": 2, "patch": (4, 4, 4)}),
    ],
)
@pytest.mark.parametrize("head", [DenseHead(2), HeatHead(2, features=2)])
def test_a_head_of_voxels_needs_the_image_grid(name: str, options: dict[str, Any], head: Any) -> None:
    backbone = models.build({"name": name, **models.options(name), **options}, jnp.float32)
    x = jnp.zeros((1, 16, 16, 16, 1))

    def shapes(heads: dict[str, Any]) -> Any:
        return jax.eval_shape(lambda: Model(backbone, heads).init(jax.random.key(0), x, train=True))

    with pytest.raises(UserError) as caught:
        shapes({"grade": PooledHead(2), "organ": head})
    for words in ("task 'organ'", "16×16×16", "model.decoder='unet'", "unetr"):
        assert words in str(caught.value)
    shapes({"grade": PooledHead(2)})  # a head of whole volumes is at home on an encoder


def test_a_run_refuses_it_before_any_case_is_read(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "tiny.py", write_cohort(tmp_path / "cohort"))
    small = "{'name':'resnet','depth':10,'features':(4,4,4,4),'stem_stride':(2,2,2)}"
    text = recipe.read_text().replace("config.tasks =", f"config.model = ConfigDict({small})\n    config.tasks =")
    (tmp_path / "encoder.py").write_text(text)
    with pytest.raises(UserError, match="it is an encoder alone"):
        job_lib.open_job(load(tmp_path / "encoder.py"))
    job_lib.open_job(load(tmp_path / "encoder.py", "model.decoder=unet"))
