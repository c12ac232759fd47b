"""Stock diffusers pipelines with the optimized denoiser in place: one graph, no breaks, no recompiles."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DiTPipeline, StableDiffusionPipeline
from diffusers.models import AutoencoderKL

import bigain_fx as bgx
from tests.test_optimize import dit, unet

SCHEDULED = (bgx.LaplacianMerge(0.5), bgx.KVDownsample(2, bgx.LinearAlpha()))


def vae() -> AutoencoderKL:
    return AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(8,), norm_num_groups=4, sample_size=8,
    ).eval()  # fmt: skip


def stable_diffusion() -> Any:
    pipe = StableDiffusionPipeline(
        vae=vae(), text_encoder=None, tokenizer=None, unet=unet(), scheduler=DDIMScheduler(clip_sample=False),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(pipe: Any, steps: int) -> torch.Tensor:
    torch.manual_seed(0)
    dtype = pipe.unet.dtype
    prompt, negative = torch.randn(1, 5, 16).to(dtype), torch.randn(1, 5, 16).to(dtype)
    images: torch.Tensor = pipe(
        prompt_embeds=prompt, negative_prompt_embeds=negative, num_inference_steps=steps, guidance_scale=5.0, height=8,
        width=8, output_type="latent", latents=torch.randn(1, 4, 8, 8).to(dtype),
    ).images  # fmt: skip
    return images


@pytest.mark.parametrize("backend", ["eager_graph", pytest.param("inductor", marks=pytest.mark.slow)])
def test_guided_sampling_is_one_graph(backend: str) -> None:
    """Twenty guided steps with the alpha schedule, under no_grad and then under inference_mode."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    pipe = stable_diffusion()
    dense = run(pipe, 20)
    compile_with: Any = (lambda gm, inputs: gm.forward) if backend == "eager_graph" else backend
    pipe.unet = bgx.optimize(pipe.unet, method=SCHEDULED, backend=compile_with)
    with torch.no_grad():
        first = run(pipe, 20)
    with torch.inference_mode():
        second = run(pipe, 20)
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    assert torch.equal(first, second)
    assert len(pipe.unet.report.rewritten) == 3
    assert 1e-3 < (first - dense).norm() / dense.norm() < 1


def test_a_class_conditional_pipeline() -> None:
    pipe: Any = DiTPipeline(transformer=dit(1000), vae=vae(), scheduler=DDIMScheduler(clip_sample=False))
    pipe.set_progress_bar_config(disable=True)
    pipe.transformer = bgx.optimize(pipe.transformer, method=SCHEDULED, backend="eager")
    images = pipe(class_labels=[1, 2], num_inference_steps=3, output_type="np").images
    assert images.shape[0] == 2
    assert {site.action for site in pipe.transformer.report.sites} == {"merge+kv"}


def test_the_pipeline_saves_the_original(tmp_path: Any) -> None:
    pipe = stable_diffusion()
    original = pipe.unet
    pipe.unet = bgx.optimize(original, method=SCHEDULED, backend="eager")
    pipe.unet.save_pretrained(tmp_path)
    again = type(original).from_pretrained(tmp_path)
    for name, tensor in original.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_twenty_guided_steps_through_onnx_runtime(dtype: torch.dtype, tmp_path: Path) -> None:
    """The loop is the same, so what differs is the denoiser, twenty times over, near-ties of plans included."""
    pipe = stable_diffusion().to(dtype)
    original = pipe.unet
    inputs = {
        "sample": torch.randn(2, 4, 8, 8), "timestep": torch.tensor(1), "encoder_hidden_states": torch.randn(2, 5, 16)
    }  # fmt: skip
    bgx.export_onnx(original, (), tmp_path / "unet.onnx", kwargs=inputs, method=SCHEDULED, dtype=dtype)
    pipe.unet = bgx.optimize(original, method=SCHEDULED, backend="eager")
    expected = run(pipe, 20)
    pipe.unet = bgx.OrtDenoiser(tmp_path / "unet.onnx")
    found = run(pipe, 20)
    assert found.dtype == dtype
    assert torch.isfinite(found).all()
    error = (found.double() - expected.double()).norm() / expected.double().norm()
    assert -20 * error.log10() >= 30


def test_a_class_conditional_pipeline_through_onnx_runtime(tmp_path: Path) -> None:
    pipe: Any = DiTPipeline(transformer=dit(1000), vae=vae(), scheduler=DDIMScheduler(clip_sample=False))
    pipe.set_progress_bar_config(disable=True)
    inputs = {"timestep": torch.tensor([1, 1]), "class_labels": torch.tensor([1, 1000])}
    sample, path = torch.randn(2, 4, 16, 16), tmp_path / "dit.onnx"
    bgx.export_onnx(pipe.transformer, (sample,), path, kwargs=inputs, method=SCHEDULED)
    images = []
    for denoiser in (bgx.optimize(pipe.transformer, method=SCHEDULED, backend="eager"), bgx.OrtDenoiser(path)):
        pipe.transformer = denoiser
        generator = torch.Generator().manual_seed(0)
        call = pipe(class_labels=[1], num_inference_steps=3, output_type="np", generator=generator)
        images.append(torch.from_numpy(call.images))
    assert (images[0] - images[1]).abs().max() < 1e-3
