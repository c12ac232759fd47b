"""Stock pipelines with ``bgx.optimize`` in place of their denoisers: images, reports, and how many graphs it takes."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import MultiControlNetModel, StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from torch import Tensor

import bigain_fx as bgx
from bigain_fx.passes.images import as_grids
from tests import pipes
from tests.pipes import BY_NAME, PIPES, SMALL, WIDE, Pipe, built, optimized, run

METHOD = (bgx.LaplacianMerge(0.5), bgx.KVDownsample(2))
FAST = ("sd", "flux", "dit")


def each(cases: Sequence[Pipe]) -> Any:
    """Parametrize over pipelines; all but a few of each kind of denoiser are slow."""
    marked = [pytest.param(case, marks=[] if str(case) in FAST else pytest.mark.slow, id=str(case)) for case in cases]
    return pytest.mark.parametrize("case", marked)


class Graphs:
    """Counts the graphs that are captured, from what the package logs of each."""

    def __init__(self, caplog: pytest.LogCaptureFixture) -> None:
        self.caplog, self.seen = caplog, 0
        caplog.set_level(logging.INFO, "bigain_fx")

    def new(self) -> int:
        """How many since it was asked last."""
        seen = sum("attentions rewritten" in record.getMessage() for record in self.caplog.records)
        found, self.seen = seen - self.seen, seen
        return found


@pytest.fixture
def graphs(caplog: pytest.LogCaptureFixture) -> Graphs:
    return Graphs(caplog)


def check_images(images: Tensor, dense: Tensor) -> None:
    """Another picture, and one that has something of the dense pipeline's."""
    assert images.shape == dense.shape
    assert torch.isfinite(images).all()
    assert (images - dense).abs().max() > 1e-3, "the method changed nothing"
    assert (images - dense).norm() < 0.5 * dense.norm()


def check_closer(images: Tensor, expected: Tensor, other: Tensor) -> None:
    """``images`` are ``expected`` and not ``other``: ten times closer than those two are to one another."""
    assert (images - expected).norm() < 0.1 * (expected - other).norm()


def check_rewritten(case: Pipe, pipe: Any) -> None:
    """The report of each part names the attentions of ``case``, and no other."""
    for part, sites in case.sites.items():
        assert tuple(site.name for site in getattr(pipe, part).report.rewritten) == sites


@each(PIPES)
def test_without_a_method_it_is_the_pipeline(case: Pipe) -> None:
    dense, pipe = built(case), optimized(case, built(case), ())
    for guidance in (True, False):
        expected = run(case, dense, guidance=guidance)
        assert expected.std() > 0.05
        torch.testing.assert_close(run(case, pipe, guidance=guidance), expected, atol=1e-4, rtol=0)


@each(PIPES)
def test_images_reports_and_graphs(case: Pipe, graphs: Graphs) -> None:
    """A size and a change of guidance are a graph more of each part; the same call again is none."""
    dense, pipe, parts = built(case), optimized(case, built(case), METHOD), len(case.sites)
    check_images(run(case, pipe), run(case, dense))
    assert graphs.new() == parts
    check_rewritten(case, pipe)
    for part in case.sites:
        assert {site.action for site in getattr(pipe, part).report.rewritten} == {"merge+kv"}
    first = run(case, pipe)
    assert torch.equal(run(case, pipe), first)
    assert graphs.new() == 0
    check_images(run(case, pipe, guidance=False), run(case, dense, guidance=False))
    assert graphs.new() == parts * case.guidance_graphs
    if case.sizes:
        check_images(run(case, pipe, size=WIDE), run(case, dense, size=WIDE))
        assert graphs.new() == parts
        for part in case.sites:
            grids = {as_grids(site.grid)[0] for site in getattr(pipe, part).report.rewritten}
            assert {rows * 2 for rows, _ in grids} == {columns for _, columns in grids}
    assert torch.equal(run(case, pipe, size=SMALL), first), "the first graph still serves its size"
    assert graphs.new() == 0


def test_images_to_edit_have_grids_of_their_own(graphs: Graphs) -> None:
    """Of another size, or turned, an image to edit is another graph; another image of that size is not."""
    case = BY_NAME["kontext"]
    dense, pipe = built(case), optimized(case, built(case), METHOD)
    for size, grid in {(24, 8): (12, 4), (8, 24): (4, 12), (16, 16): (8, 8)}.items():
        image = pipes.picture(size)
        check_images(run(case, pipe, image=image), run(case, dense, image=image))
        assert {site.grid for site in pipe.transformer.report.rewritten} == {((8, 8), grid)}
        assert graphs.new() == 1
        run(case, pipe, image=1 - image)
        assert graphs.new() == 0


@each([case for case in PIPES if "num_images_per_prompt" in case.options])
def test_several_images_of_a_prompt(case: Pipe, graphs: Graphs) -> None:
    options = {"guidance": False, "num_images_per_prompt": 2}
    dense, pipe = built(case), optimized(case, built(case), METHOD)
    images = run(case, pipe, **options)
    check_images(images, run(case, dense, **options))
    assert len(images) == 2
    assert not torch.equal(images[0], images[1])
    assert graphs.new() == len(case.sites)


@each([case for case in PIPES if "callback_on_step_end" in case.options])
def test_callbacks(case: Pipe) -> None:
    """They see every step, and what they put in place of the latents is used."""
    steps: list[int] = []

    def zero(pipe: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        steps.append(step)
        return {"latents": torch.zeros_like(given["latents"])} if step + 1 == pipe.num_timesteps else {}

    dense, pipe = built(case), optimized(case, built(case), METHOD)
    options = {"guidance": False, "callback_on_step_end": zero, "steps": 3}
    images = run(case, pipe, **options)
    assert steps == list(range(pipe.num_timesteps))
    torch.testing.assert_close(images, run(case, dense, **options))


DTYPES = [torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["dit", *(pytest.param(name, marks=pytest.mark.slow) for name in ("sd", "flux"))])
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    """The cast may come before ``optimize`` or after it, and after a call too."""
    case = BY_NAME[name]
    dense = run(case, built(case).to(dtype))
    exact = run(case, optimized(case, built(case).to(dtype), ()))
    torch.testing.assert_close(exact, dense, atol=0.05, rtol=0)
    before = run(case, optimized(case, built(case).to(dtype), METHOD))
    check_images(before, dense)
    check_closer(exact, dense, before)
    pipe = optimized(case, built(case), METHOD)
    run(case, pipe)
    pipe.to(dtype)
    assert {getattr(pipe, part).dtype for part in case.sites} == {dtype}
    assert torch.equal(run(case, pipe), before)
    check_rewritten(case, pipe)


@pytest.mark.parametrize("name", ["sd", "pixart"])
def test_autocast(name: str, graphs: Graphs) -> None:
    """A graph of its own; outside of autocast the first one serves again."""
    case = BY_NAME[name]
    dense, exact, pipe = built(case), optimized(case, built(case), ()), optimized(case, built(case), METHOD)
    first = run(case, pipe)
    graphs.new()
    with torch.autocast("cpu", torch.bfloat16):
        expected = run(case, dense)
        compressed = run(case, pipe)
        assert graphs.new() == 1
        uncompressed = run(case, exact)
    check_images(compressed, expected)
    torch.testing.assert_close(uncompressed, expected, atol=0.05, rtol=0)
    check_closer(uncompressed, expected, compressed)
    check_rewritten(case, pipe)
    graphs.new()
    assert torch.equal(run(case, pipe), first)
    assert graphs.new() == 0


@pytest.mark.parametrize(
    "when",
    ["after optimize", *(pytest.param(when, marks=pytest.mark.slow) for when in ("before optimize", "after a call"))],
)
def test_channels_last(when: str, graphs: Graphs) -> None:
    case = BY_NAME["sd"]
    expected = run(case, optimized(case, built(case), METHOD))
    pipe = built(case)
    if when == "before optimize":
        pipe.unet.to(memory_format=torch.channels_last)
    optimized(case, pipe, METHOD)
    if when == "after a call":
        run(case, pipe)
    graphs.new()
    pipe.unet.to(memory_format=torch.channels_last)
    assert pipe.unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(run(case, pipe), expected, atol=1e-4, rtol=0)
    assert graphs.new() == (when != "after a call")


def test_inputs_of_another_layout_are_a_graph_of_their_own(graphs: Graphs) -> None:
    case = BY_NAME["sd"]
    pipe, latents = optimized(case, built(case), METHOD), pipes.normal(1, 4, *SMALL)
    expected = run(case, pipe, latents=latents)
    assert graphs.new() == 1
    for new in (1, 0):
        found = run(case, pipe, latents=latents.to(memory_format=torch.channels_last))
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
        assert graphs.new() == new
    assert torch.equal(run(case, pipe, latents=latents), expected)
    assert graphs.new() == 0


@pytest.mark.parametrize("name", ["sd", "flux"])
def test_model_offload_hooks(name: str) -> None:
    """Without an accelerator diffusers refuses by itself; asked for the CPU, it hangs the same hooks on the module."""
    case = BY_NAME[name]
    pipe = optimized(case, built(case), METHOD)
    expected = run(case, pipe)
    pipe.enable_model_cpu_offload(device="cpu")
    (part,) = case.sites
    assert hasattr(getattr(pipe, part), "_hf_hook")
    assert torch.equal(run(case, pipe), expected)
    pipe.remove_all_hooks()
    assert torch.equal(run(case, pipe), expected)


def test_a_model_that_was_offloaded_first_works_or_says_so() -> None:
    """It says so, and when to do it instead."""
    case = BY_NAME["sd"]
    pipe = built(case)
    pipe.enable_model_cpu_offload(device="cpu")
    with pytest.raises(bgx.InputError, match=r"which no graph can hold.* enable_model_cpu_offload") as caught:
        optimized(case, pipe, METHOD)
    assert "\n" not in str(caught.value)


def test_a_saved_pipeline_loads_as_the_original(tmp_path: Path) -> None:
    case = BY_NAME["sd"]
    pipe = optimized(case, built(case), METHOD)
    run(case, pipe)
    pipe.save_pretrained(tmp_path)
    again = pipes.quiet(StableDiffusionPipeline.from_pretrained(tmp_path))
    assert type(again.unet) is type(pipe.unet.original)
    torch.testing.assert_close(run(case, again), run(case, built(case)))


@pytest.mark.parametrize("how", ["from_pipe", "components"])
def test_a_pipeline_made_from_another_shares_the_optimized_module(how: str) -> None:
    pipe = optimized(BY_NAME["sd"], built(BY_NAME["sd"]), METHOD)
    if how == "from_pipe":
        other = StableDiffusionImg2ImgPipeline.from_pipe(
            pipe, unet=pipe.unet
        )  # it drops what is of no class that it names
    else:
        other = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    assert other.unet is pipe.unet
    assert torch.isfinite(run(BY_NAME["img2img"], pipes.quiet(other))).all()


def test_several_controlnets(graphs: Graphs) -> None:
    case = BY_NAME["controlnet"]

    def make() -> Any:
        pipe = built(case)
        pipe.controlnet = MultiControlNetModel([pipe.controlnet, pipes.controlnet()])
        return pipe

    options = {"image": [pipes.picture(SMALL), 1 - pipes.picture(SMALL)], "controlnet_conditioning_scale": [1.0, 0.5]}
    pipe = make()
    pipe.unet = bgx.optimize(pipe.unet, method=METHOD, backend="eager")
    nets = [bgx.optimize(net, method=METHOD, backend="eager") for net in pipe.controlnet.nets]
    pipe.controlnet = MultiControlNetModel(nets)
    check_images(run(case, pipe, **options), run(case, make(), **options))
    assert graphs.new() == 3


def test_a_controlnet_that_stops_halfway_is_one_graph_more(graphs: Graphs) -> None:
    """Its scale is 1 while it is on, 0 after."""
    case, options = BY_NAME["controlnet"], {"control_guidance_end": 0.5, "steps": 4}
    pipe = optimized(case, built(case), ())
    torch.testing.assert_close(run(case, pipe, **options), run(case, built(case), **options), atol=1e-4, rtol=0)
    assert graphs.new() == 3
    run(case, pipe, **options | {"control_guidance_end": 0.25})
    assert graphs.new() == 0


def test_the_scale_of_a_controlnet_is_an_input_from_its_second_value_on(graphs: Graphs) -> None:
    case = BY_NAME["controlnet"]
    dense, pipe = built(case), optimized(case, built(case), ())
    for scale, new in {0.5: 2, 0.25: 1, 1.0: 0, 0.75: 0, 0.0: 0, 2.0: 0}.items():
        options = {"controlnet_conditioning_scale": scale}
        torch.testing.assert_close(run(case, pipe, **options), run(case, dense, **options), atol=1e-4, rtol=0)
        assert graphs.new() == new, scale


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd", "controlnet", "flux", "dit"])
def test_under_inductor(name: str) -> None:
    """As eager, without a graph break or a recompilation, the second call included."""
    case = BY_NAME[name]
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    pipe = optimized(case, built(case), METHOD, backend="inductor")
    images = run(case, pipe)
    torch.testing.assert_close(run(case, pipe), images)
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == len(case.sites)
    assert not counters["graph_break"]
    check_rewritten(case, pipe)
    expected = run(case, optimized(case, built(case), METHOD))
    torch.testing.assert_close(images, expected, atol=1e-2, rtol=0)
    check_closer(images, expected, run(case, built(case)))
