"""Timestep units by family, checked against the pipelines' own source; token grids read from the inputs."""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

import bigain_fx as bgx
from bigain_fx import families
from bigain_fx.families import FRACTION, REVERSED, REVERSED_STEPS, STEPS, UNITS, GridReader, Reading
from bigain_fx.passes.grammar import parse
from tests import toys
from tests.test_optimize import dit

DIFFUSERS = Path(diffusers.__file__).parent
SCHEDULE = bgx.KVDownsample(2, bgx.LinearAlpha())
GIVEN = bgx.KVDownsample(2, bgx.LinearAlpha(t_noisy=0.5, t_clean=0.25))
TOLD = {
    REVERSED_STEPS: r"1000 - t\b",
    REVERSED: r"\(1000 - timestep\) / 1000|\b1(\.0)? - \(?(t|current_timestep)(\.float\(\))? / ",
    FRACTION: (
        r"\b(t|timestep|t\.flatten\(\)|t\.float\(\)|t\.expand\(.*\)) / "
        r"(1000\b(?!\.| -)|(self|components)\.scheduler|num_)"
    ),
    STEPS: (
        r"\bt(\.unsqueeze\(0\))?\.(expand|repeat)\(|\b(timestep=|current_timestep = |timesteps = |t_unet = )t\b|"
        r"(input|image|sample|latents?),\s+t,|\.unet\(\w+, t\b|torch\.tensor\(\[t\]|torch\.full\(.*, t\b"
    ),
}
"""What a pipeline does to its scheduler's step, looked for in this order."""
OTHERWISE = {
    "pipeline_score_sde_ve": "self.unet(sample, sigma_t)",
    "pipeline_stable_diffusion_latent_upscale": "torch.log(sigma)",
}
"""Pipelines of noise levels of their own, which nothing in their U-Nets tells."""


@cache
def pipelines() -> dict[str, dict[str, str]]:
    """Source of every pipeline (and of what Flux 3, which has none, loops over), by denoiser class and file name."""
    found: dict[str, dict[str, str]] = defaultdict(dict)
    for path in [*DIFFUSERS.glob("pipelines/**/pipeline_*.py"), DIFFUSERS / "modular_pipelines/flux3/denoise.py"]:
        if not re.search(r"\b(unet|transformer|controlnet|current_model)\(", text := path.read_text()):
            continue  # it runs other pipelines
        parts = re.findall(
            r"^\s+(?:unet|transformer|controlnet)\s*: (.*)|ComponentSpec\(\"transformer\", (\w+)", text, re.MULTILINE
        )
        for name in re.findall(r"\b[A-Z]\w+", " ".join(map(" ".join, parts))):
            found[name][path.stem] = text
    return found


def told(text: str) -> tuple[float, float] | None:
    return next((units for units, pattern in TOLD.items() if re.search(pattern, text)), None)


@pytest.mark.parametrize("name", UNITS)
def test_the_units_are_what_the_pipelines_pass(name: str) -> None:
    texts = dict(pipelines()[name])
    for stem in texts.keys() & OTHERWISE.keys():
        assert OTHERWISE[stem] in texts.pop(stem)
    assert texts, "no pipeline takes it"
    units = UNITS[name]
    if callable(units):
        assert "scm_timestep" in texts.pop("pipeline_sana_sprint")
        assert "timestep * self.transformer.config.timestep_scale" in texts["pipeline_sana"]
        units = STEPS
    assert {stem: told(text) for stem, text in texts.items()} == dict.fromkeys(texts, units)


def test_families_whose_units_are_not_known() -> None:
    known = {"OmniGenTransformer2DModel", "CosmosTransformer3DModel", "UNetSpatioTemporalConditionModel"}
    assert known <= set(pipelines())
    assert not known & set(UNITS)


def named(name: str, **config: Any) -> nn.Module:
    """A module of a class of that name."""
    module: nn.Module = type(name, (nn.Module,), {})()
    module.config = SimpleNamespace(**config)
    return module


@pytest.mark.parametrize(
    ("model", "ends"),
    [
        (named("UNet2DConditionModel"), (999, 0)),
        (named("FluxTransformer2DModel", guidance_embeds=True), (0.999, 0)),
        (named("ZImageTransformer2DModel"), (0.001, 1)),
        (named("MochiTransformer3DModel"), (1, 1000)),
        (named("SanaTransformer2DModel", guidance_embeds=False, timestep_scale=0.001), (0.999, 0)),
        (named("SanaTransformer2DModel", guidance_embeds=True, timestep_scale=1.0), (0.999, 0)),
        (named("SanaTransformer2DModel"), (999, 0)),
        (type("Mine", (type(named("QwenImageTransformer2DModel")),), {})(), (0.999, 0)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else str(value),
)  # fmt: skip
def test_ends_are_filled_in(model: nn.Module, ends: tuple[float, float]) -> None:
    method, merge = families.resolve((SCHEDULE, bgx.LaplacianMerge()), model)
    assert merge == bgx.LaplacianMerge()
    assert isinstance(method, bgx.KVDownsample)
    assert method.alpha == bgx.LinearAlpha(0.8, 1.2, *ends)
    assert families.resolve((GIVEN,), model) == (GIVEN,)
    assert families.resolve((bgx.ToDo(), bgx.KVDownsample(2, 0.9)), None) == (bgx.ToDo(), bgx.KVDownsample(2, 0.9))


@pytest.mark.parametrize(("model", "family"), [(named("Nobodys"), "Nobodys"), (None, "the model")])
def test_an_unknown_family_must_name_its_units(model: nn.Module | None, family: str) -> None:
    with pytest.raises(bgx.MethodError, match=f"in which {family} takes its timestep are not known; name them, as in"):
        families.resolve((SCHEDULE,), model)
    assert families.resolve((GIVEN,), model) == (GIVEN,)


def test_a_schedule_without_ends_is_written_and_read_as_before() -> None:
    assert str(SCHEDULE) == "bigain-td:2:0.8..1.2"
    assert parse("bigain-td:2:0.8..1.2") == (SCHEDULE,)
    with pytest.raises(bgx.MethodError, match="t_noisy=999, t_clean=None: give both ends, or neither"):
        bgx.LinearAlpha(t_noisy=999)


INPUTS = {
    "hidden_states": torch.randn(2, 4, 16, 16), "timestep": torch.tensor([900, 900]),
    "class_labels": torch.tensor([1, 2]),
}  # fmt: skip


@torch.no_grad()
def test_a_denoiser_knows_its_units() -> None:
    model, named = dit(), bgx.KVDownsample(2, bgx.LinearAlpha(t_noisy=999, t_clean=0))
    fast, same, other = (bgx.optimize(model, method=method, backend="eager") for method in (SCHEDULE, named, GIVEN))
    output = fast(**INPUTS).sample
    assert fast.methods == fast.report.methods == (named,)
    assert torch.equal(output, same(**INPUTS).sample)
    assert not torch.equal(output, other(**INPUTS).sample)
    compiled = torch.compile(
        model, backend="bigain", dynamic=False, fullgraph=True, options={"method": SCHEDULE, "backend": "eager"}
    )
    torch.testing.assert_close(compiled(**INPUTS).sample, output)
    with pytest.raises(bgx.MethodError, match="in which Separate takes its timestep"):
        bgx.optimize(toys.Separate().eval(), method=SCHEDULE)


# --------------------------------------------------------------------------------------- grids


TOKENS = torch.randn(2, 24, toys.C)


def ids(*sizes: tuple[int, int], extra: int = 0, offset: float = 0, scale: float = 1) -> Tensor:
    """``(N, 3 + extra)``: index of the image, row, column, zeros."""
    axes = [[torch.arange(side) * scale + offset for side in size] for size in sizes]
    images = [torch.cartesian_prod(torch.tensor([float(i)]), *(a.float() for a in pair)) for i, pair in enumerate(axes)]
    return nn.functional.pad(torch.cat(images), (0, extra))


def shuffled(rows: int, columns: int) -> Tensor:
    return ids((rows, columns))[torch.randperm(rows * columns)]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"img_ids": ids((4, 6))}, (4, 6)),
        ({"img_ids": ids((4, 6)).to(torch.bfloat16)}, (4, 6)),
        ({"img_ids": ids((4, 6), extra=1).long().expand(2, -1, -1)}, (4, 6)),
        ({"img_ids": ids((6, 4), offset=512.0)}, (6, 4)),
        ({"img_ids": ids((6, 4), scale=0.5)}, (6, 4)),
        ({"img_ids": ids((1, 5))}, (1, 5)),
        ({"img_ids": ids((5, 1))}, (5, 1)),
        ({"img_ids": ids((1, 1))}, (1, 1)),
        ({"img_ids": ids((4, 6), (4, 6))}, ((4, 6), (4, 6))),
        ({"img_ids": ids((4, 6), (2, 3), (1, 5), extra=1).expand(2, -1, -1)}, ((4, 6), (2, 3), (1, 5))),
        ({"img_ids": ids((4, 6), (2, 3)).flip(0)}, "rows of equal columns"),
        ({"img_ids": torch.cat([ids((4, 6), (2, 3)), ids((2, 3))])}, ((4, 6), (2, 3), (2, 3))),
        ({"img_ids": torch.cat([ids((4, 6)), shuffled(4, 6) + torch.tensor([1, 0, 0])])}, "each image or frame"),
        ({"img_ids": torch.cat([ids((4, 6)), ids((2, 6))])}, "rows of equal columns"),
        ({"img_ids": torch.zeros(24, 3)}, "rows of equal columns"),
        ({"img_ids": shuffled(4, 6)}, "rows of equal columns"),
        ({"img_ids": ids((4, 6))[:-1]}, "rows of equal columns"),
        ({"img_ids": ids((4, 6))[:, [0, 2, 1]]}, "rows of equal columns"),
        ({"img_ids": ids((300, 2)).to(torch.bfloat16)}, "rows of equal columns"),
        ({"img_ids": torch.stack([ids((4, 6)), ids((6, 4))])}, "from sample to sample"),
        ({"img_ids": ids((4, 6)).to("meta")}, "on the meta device"),
        ({"img_ids": torch.zeros(24, 2)}, r"of shape \(24, 2\)"),
        ({"img_ids": torch.zeros(0, 3)}, r"of shape \(0, 3\)"),
        ({"img_shapes": [[(1, 4, 6)]] * 2}, (4, 6)),
        ({"img_shapes": [(1, 4, 6)] * 2}, (4, 6)),
        ({"img_shapes": [[(1, 4, 6), (1, 4, 6)]]}, ((4, 6), (4, 6))),
        ({"img_shapes": [[(1, 4, 6), (1, 2, 3)]] * 2}, ((4, 6), (2, 3))),
        ({"img_shapes": [[(3, 4, 6)]]}, "frames of a video"),
        ({"img_shapes": [[(1, 4, 6), (3, 4, 6)]]}, "frames of a video"),
        ({"img_shapes": [[(1, 4, 6)], [(1, 6, 4)]]}, "from sample to sample"),
        ({"img_shapes": (64, 64)}, "for each image; pass grid="),
        ({"img_shapes": [(4, 6)]}, "for each image; pass grid="),
        ({"img_ids": None, "img_shapes": None, "sample": TOKENS}, None),
    ],
)  # fmt: skip
def test_the_grid_that_the_inputs_tell(arguments: dict[str, Any], expected: Any) -> None:
    read = GridReader()(arguments)
    if isinstance(expected, str):
        assert read.grid is None
        assert re.search(expected, read.reason), read.reason
        assert "pass grid=" in read.reason
    else:
        assert read == Reading(expected)


def test_ids_are_read_once_and_again_when_written_to(monkeypatch: pytest.MonkeyPatch) -> None:
    reads = 0
    read_ids = families._read_ids

    def counting(tensor: Tensor) -> Reading:
        nonlocal reads
        reads += 1
        return read_ids(tensor)

    monkeypatch.setattr(families, "_read_ids", counting)
    read, first, second = GridReader(), ids((4, 6)), ids((6, 4))
    for _ in range(50):
        assert read({"img_ids": first}).grid == (4, 6)
        assert read({"img_ids": second}).grid == (6, 4)
    assert reads == 2
    first.copy_(ids((2, 12)))
    assert read({"img_ids": first}).grid == (2, 12)
    assert reads == 3
    with torch.inference_mode():
        third = ids((4, 6))
        assert read({"img_ids": third}).grid == (4, 6)
        third.copy_(second)
        assert read({"img_ids": third}).grid == (6, 4)
    del first, second
    assert len(read._known) == 0


class Packed(toys.Separate):
    """Tokens come packed, as Flux takes them: the graph knows no rows and columns."""

    def forward(self, hidden_states: Tensor, img_ids: Tensor | None = None, sides: Any = None) -> Tensor:
        return hidden_states + self.branch(self.norm(hidden_states), hidden_states)


def packed(**options: Any) -> bgx.OptimizedDenoiser:
    torch.manual_seed(0)
    return bgx.optimize(Packed().eval(), method=bgx.LaplacianMerge(0.5), backend="eager", **options)


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if record.name == "bigain_fx"]


@torch.no_grad()
def test_grids_of_one_size_never_share_a_graph(caplog: pytest.LogCaptureFixture) -> None:
    fast = packed()
    wide, tall = ids((4, 6)), ids((6, 4))
    outputs = []
    for image in (wide, tall, wide.clone(), tall.clone()):
        outputs.append(fast(TOKENS, image))
        assert fast.report.sites[0].grid == ((4, 6) if torch.equal(image, wide) else (6, 4))
        assert fast.report.sites[0].action == "merge"
    assert len(fast._graphs) == 2
    assert torch.equal(outputs[0], outputs[2])
    assert torch.equal(outputs[1], outputs[3])
    assert not torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[1], packed(grid=(6, 4))(TOKENS, None))
    (warning,) = said(caplog)
    assert warning.endswith("hidden_states (2, 24, 16) float32, img_ids (24, 3) float32, grid [6, 4]")


@torch.no_grad()
def test_a_grid_may_be_a_function_of_the_arguments() -> None:
    fast = packed(grid=lambda arguments: arguments.get("sides"))
    for sides in ((4, 6), (6, 4), (2, 12)):
        fast(TOKENS, sides=sides)
        assert fast.report.sites[0].grid == sides
    fast(TOKENS, ids((3, 8)))
    assert fast.report.sites[0].grid == (3, 8)
    fast(TOKENS)
    assert "pass grid=" in fast.report.sites[0].reason


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ((6, 4), r"grid=\(6, 4\) contradicts the inputs, whose grid is \(4, 6\)"),
        (lambda arguments: (6, 4), r"grid=\(6, 4\) contradicts the inputs"),
        ([(6, 4)], r"grid=\[\(6, 4\)\] contradicts the inputs, whose grid is \(4, 6\)"),
        ([(2, 6), (2, 6)], r"contradicts the inputs, whose grid is \(4, 6\)"),
        (lambda arguments: 24, r"grid=24 must be two positive integers"),
        ([], r"grid=\[\] must be two positive integers \(rows, columns\), in image tokens, or a list of such pairs"),
        ([(4, 6), (0, 2)], "two positive integers"),
        ([(4, 6), 8], "two positive integers"),
        ((4.0, 6), r"grid=\(4\.0, 6\) must be two positive integers"),
    ],
)
def test_a_wrong_grid_is_refused(grid: Any, message: str) -> None:
    with pytest.raises(bgx.GridError, match=message):
        packed(grid=grid)(TOKENS, ids((4, 6)))


STACKED = torch.cat([ids((4, 6)), ids((4, 6))])
"""Two images at the same positions."""


@pytest.mark.parametrize(
    ("arguments", "grid", "message"),
    [
        ({"img_ids": ids((4, 6), (4, 6))}, (8, 6), r"contradicts the inputs, whose grid is \(\(4, 6\), \(4, 6\)\)"),
        ({"img_ids": ids((4, 6), (4, 6))}, (4, 6), "whose grid is"),
        ({"img_ids": ids((4, 6), (2, 3))}, ((2, 3), (4, 6)), "whose grid is"),
        ({"img_shapes": [[(1, 4, 6), (1, 4, 6)]]}, (8, 6), r"whose grid is \(\(4, 6\), \(4, 6\)\)"),
        ({"img_ids": STACKED}, (8, 6), r"images or frames begin at the tokens \[0, 24\]; give the grid of each"),
        ({"img_ids": STACKED}, [(2, 6), (6, 6)], r"begin at the tokens \[0, 24\]"),
        ({"img_ids": torch.stack([STACKED, STACKED + 1])}, (8, 6), r"begin at the tokens \[0, 24\]"),
        ({"img_ids": ids((4, 6))[:, [0, 2, 1]]}, (4, 6), r"begin at the tokens \[0, 6, 12, 18\]"),
        ({"img_ids": ids(*[(2, 3)] * 6)[:-1]}, (5, 7), r"begin at the tokens \[0, 6, 12, 18\] and so on"),
        ({"img_shapes": [[(2, 4, 6)]]}, (8, 6), r"images or frames begin at the tokens \[0, 24\]"),
        ({"img_shapes": [[(1, 4, 6)] * 2, [(1, 6, 4)] * 2]}, (8, 6), r"begin at the tokens \[0, 24\]"),
    ],
)
def test_a_grid_that_fits_by_accident_is_refused(arguments: dict[str, Any], grid: Any, message: str) -> None:
    """It has as many tokens as the inputs, but these tell of images that begin elsewhere."""
    with pytest.raises(bgx.GridError, match=message):
        families.grid_for(grid, arguments, GridReader()(arguments))


@pytest.mark.parametrize(
    ("arguments", "grid"),
    [
        ({"img_ids": ids((4, 6), (4, 6))}, [(4, 6), [4, 6]]),
        ({"img_ids": STACKED}, [(4, 6), (4, 6)]),
        ({"img_ids": STACKED}, ((4, 6), (3, 8))),
        ({"img_ids": torch.zeros(48, 3)}, [(4, 6), (4, 6)]),
        ({"img_ids": ids((4, 6), (4, 6)).to("meta")}, [(4, 6), (4, 6)]),
        ({"img_shapes": [[(2, 4, 6)]]}, [(4, 6), (4, 6)]),
        ({}, [(4, 6), (4, 6)]),
    ],
)
def test_grids_of_several_images_are_given(arguments: dict[str, Any], grid: Any) -> None:
    given = tuple(tuple(sides) for sides in grid)
    assert families.grid_for(grid, arguments, GridReader()(arguments)) == Reading(given)


def test_ids_that_tell_no_grid_are_said(caplog: pytest.LogCaptureFixture) -> None:
    fast = packed()
    with caplog.at_level(logging.WARNING, "bigain_fx"):
        for _ in range(2):
            fast(TOKENS, torch.cat([ids((2, 6)), ids((2, 6))]))
    warning, nothing = said(caplog)
    assert warning == (
        "Packed: img_ids does not run through the image in rows of equal columns, one after another; pass grid="
    )
    assert "bigain-tm:0.5 changed nothing: no grid" in nothing
    assert fast.report.sites[0].action == "kept"


def test_a_grid_for_a_video_is_an_error() -> None:
    """LTX takes packed tokens of all frames: any grid of as many tokens would merge across frames."""
    with pytest.raises(bgx.GridError, match=r"grid=\(24, 12\): the tokens are those of num_frames=3"):
        families.grid_for((24, 12), {"num_frames": 3, "height": 8, "width": 12}, Reading())
    assert families.grid_for((8, 12), {"num_frames": 1}, Reading()).grid == (8, 12)
