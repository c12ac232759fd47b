"""Denoisers by name: the published configurations have the attentions that were counted by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import bigain_fx as bgx
from bigain_fx.models import example_inputs, load
from tests.test_optimize import dit, unet


@pytest.mark.parametrize(
    ("name", "size", "parameters", "attentions", "rewritten", "grid"),
    [
        # 16 transformer blocks; five of them at full resolution: two on the way down, three on the way up.
        ("sd2", None, 865_910_724, 32, 5, (64, 64)),
        # 70 transformer blocks; at half resolution two in each of two stages down, two in each of three up.
        pytest.param("sdxl", None, 2_567_463_684, 140, 10, (64, 64), marks=pytest.mark.slow),
        ("dit-xl-2", 64, None, 28, 28, (32, 32)),
        ("pixart", None, 610_856_096, 56, 28, (64, 64)),
        # one joint attention a block
        pytest.param("sd3", None, 2_028_328_000, 24, 24, (64, 64), marks=pytest.mark.slow),
        # 19 double blocks and 38 single ones
        pytest.param("flux", 64, 11_901_408_320, 57, 57, (32, 32), marks=pytest.mark.slow),
    ],
)
def test_known_configurations(
    name: str, size: int | None, parameters: int | None, attentions: int, rewritten: int, grid: tuple[int, int]
) -> None:
    workload = load(name, size=size, batch=1, device="meta")
    if parameters:
        assert sum(p.numel() for p in workload.model.parameters()) == parameters
    report = bgx.inspect(
        workload.model, workload.args, workload.kwargs, method=bgx.LaplacianMerge(0.7), grid=workload.grid
    )
    assert len(report.sites) == attentions
    assert len(report.rewritten) == rewritten
    assert {site.grid for site in report.rewritten} == {grid}
    assert {site.tokens - site.tokens_after for site in report.rewritten} == {int(0.7 * grid[0] * grid[1])}


def test_flux_inputs_are_packed_as_its_pipeline_packs_them() -> None:
    from diffusers import FluxPipeline, FluxTransformer2DModel

    model = FluxTransformer2DModel(
        in_channels=8, num_layers=1, num_single_layers=0, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=12, pooled_projection_dim=10, axes_dims_rope=(4, 6, 6), guidance_embeds=True,
    )  # fmt: skip
    inputs = example_inputs(model, 16, 3)
    assert inputs["hidden_states"].shape == (3, 64, 8)
    expected = FluxPipeline._prepare_latent_image_ids(3, 8, 8, torch.device("cpu"), torch.float32)
    assert torch.equal(inputs["img_ids"], expected)
    assert inputs["guidance"].shape == (3,)
    report = bgx.inspect(model.eval(), (), inputs, method=bgx.ToDo())
    assert {site.grid for site in report.rewritten} == {(8, 8)}, "the positions tell the grid"


@pytest.mark.parametrize(
    ("name", "layers", "blocks"),
    [("pixart", 3, {"transformer_blocks": 3}), ("flux", 2, {"transformer_blocks": 2, "single_transformer_blocks": 4})],
)
def test_fewer_layers(name: str, layers: int, blocks: dict[str, int]) -> None:
    workload = load(name, layers=layers, batch=1, device="meta")
    assert workload.name == f"{name}-{layers}layers"
    assert {key: len(getattr(workload.model, key)) for key in blocks} == blocks


def test_fewer_layers_of_a_unet() -> None:
    """The deepest stages go down to three, two of them on the way down, three up, and the middle; others stay."""
    workload = load("sdxl", layers=3, batch=1, device="meta")
    assert workload.name == "sdxl-3layers"
    depths = [
        len(module.transformer_blocks)  # type: ignore[arg-type]
        for module in workload.model.modules() if type(module).__name__ == "Transformer2DModel"
    ]  # fmt: skip
    assert sorted(depths) == [2] * 5 + [3] * 6


@pytest.mark.parametrize("pipeline", [False, True])
def test_a_folder(tmp_path: Path, pipeline: bool) -> None:
    model = unet()
    model.save_pretrained(tmp_path / "unet" if pipeline else tmp_path)
    workload = load(str(tmp_path), size=16, batch=3, dtype=torch.bfloat16)
    assert {p.dtype for p in workload.model.parameters()} == {torch.bfloat16}
    assert workload.kwargs["sample"].shape == (3, 4, 16, 16)
    report = bgx.inspect(workload.model, workload.args, workload.kwargs, method=bgx.ToDo())
    assert len(report.rewritten) == 3


def broken(folder: Path, text: str) -> str:
    folder.mkdir()
    (folder / "config.json").write_text(text)
    return str(folder)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: load("sd9"), "model='sd9' is neither a folder nor one of mnist-dit"),
        (lambda p: load("sd2", size=0, device="meta"), "size=0 must be a positive even number"),
        (lambda p: load("sd2", size=63, device="meta"), "size=63 must be a positive even number"),
        (lambda p: load("sd2", batch=0, device="meta"), "batch=0 must be an integer from 1"),
        (lambda p: load("sd2", layers=2, device="meta"), "layers=2: sd2 is not one of sdxl, dit-xl-2, pixart"),
        (lambda p: load("sd3", layers=25, device="meta"), "layers=25 must lie between 1 and 24, which sd3 has"),
        (lambda p: load(str(p)), "holds no config.json"),
        (lambda p: load(broken(p / "a", "{")), "cannot be loaded: "),
        (lambda p: load(broken(p / "b", "{}")), "cannot be loaded: '_class_name'"),
        (lambda p: load(broken(p / "c", json.dumps({"_class_name": "Nope"}))), "class 'Nope' is not in diffusers"),
        (lambda p: load(broken(p / "d", json.dumps({"_class_name": "UNet2DModel"}))), "cannot be loaded: "),
    ],
)  # fmt: skip
def test_bad_names_are_one_line_errors(tmp_path: Path, make: Any, message: str) -> None:
    with pytest.raises(bgx.InputError, match=message) as caught:
        make(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_class_without_known_inputs(tmp_path: Path) -> None:
    from diffusers import UNet2DModel

    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    UNet2DModel(sample_size=8, block_out_channels=(8,), norm_num_groups=4, **blocks).save_pretrained(tmp_path)
    with pytest.raises(bgx.InputError, match="UNet2DModel has no known example inputs"):
        load(str(tmp_path))


def test_a_saved_dit_refuses_another_size(tmp_path: Path) -> None:
    dit().save_pretrained(tmp_path)
    with pytest.raises(bgx.InputError, match="has positions for 16 only"):
        load(str(tmp_path), size=32)


def test_the_seed_is_the_workloads_and_no_one_elses() -> None:
    before = torch.get_rng_state()
    first, again, other = (load("mnist-dit", seed=seed).kwargs["hidden_states"] for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
