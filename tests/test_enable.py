"""Whole pipelines: every denoiser is optimized in its place, and put back, whatever happens to it between."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDPMScheduler,
    DiffusionPipeline,
    KandinskyV22CombinedPipeline,
    MultiControlNetModel,
    PriorTransformer,
    StableDiffusionPipeline,
    UnCLIPScheduler,
)
from torch import Tensor, nn

import bigain_fx as bgx
from tests import pipes, toys
from tests.pipes import BY_NAME, built, optimized, run

METHOD = bgx.LaplacianMerge(0.5)
EAGER: dict[str, Any] = {"method": METHOD, "backend": "eager"}


def check_same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["sd", "controlnet", "flux", "dit"])
def test_it_is_optimize_of_each_denoiser(name: str) -> None:
    case = BY_NAME[name]
    pipe, dense = built(case), run(case, built(case))
    originals = {part: getattr(pipe, part) for part in case.sites}
    assert bgx.enable(pipe, **EAGER) is pipe
    assert bgx.summary(pipe).reports == dict.fromkeys(case.sites)
    found = run(case, pipe)
    check_same(found, run(case, optimized(case, built(case), METHOD)))
    assert (found - dense).abs().max() > 1e-3
    summary = bgx.summary(pipe)
    assert {part: tuple(site.name for site in report.rewritten) for part, report in summary.reports.items() if report} \
        == case.sites  # fmt: skip
    for part in case.sites:
        assert f"{part}: {getattr(pipe, part).report}" in str(summary)
    assert bgx.disable(pipe) is pipe
    assert {part: getattr(pipe, part) for part in case.sites} == originals
    assert torch.equal(run(case, pipe), dense)
    assert (
        str(bgx.summary(pipe))
        == f"{type(pipe).__name__}: nothing is enabled; bigain_fx.enable(pipe, method=...) does that"
    )


def test_what_is_not_called_yet_is_said() -> None:
    pipe = bgx.enable(built(BY_NAME["sd"]), **EAGER)
    assert str(bgx.summary(pipe)) == "unet: not called yet: it is captured and compiled at its first call"


def test_enabled_again_it_has_the_new_method_and_the_same_original() -> None:
    case = BY_NAME["sd"]
    pipe = built(case)
    original = pipe.unet
    bgx.enable(bgx.enable(pipe, **EAGER), method=bgx.KVDownsample(2), backend="eager", max_graphs=2)
    assert pipe.unet.original is original
    check_same(run(case, pipe), run(case, optimized(case, built(case), bgx.KVDownsample(2))))
    assert pipe.unet.methods == (bgx.KVDownsample(2),)
    bgx.disable(bgx.disable(pipe))
    assert pipe.unet is original


def test_a_method_for_each_part() -> None:
    pipe = built(BY_NAME["controlnet"])
    bgx.enable(pipe, method={"unet": METHOD, "controlnet": ()}, backend="eager")
    assert pipe.unet.methods == (METHOD,)
    assert pipe.controlnet.methods == ()
    only = bgx.enable(built(BY_NAME["controlnet"]), method={"controlnet": METHOD}, backend="eager")
    assert list(bgx.summary(only).reports) == ["controlnet"]
    with pytest.raises(
        bgx.InputError, match=r"method is for 'vae'; the denoisers of .*ControlNet.* are unet, controlnet"
    ):
        bgx.enable(pipe, method={"unet": METHOD, "vae": METHOD})
    assert pipe.unet.methods == (METHOD,)


def test_several_controlnets() -> None:
    pipe = built(BY_NAME["controlnet"])
    nets = [pipe.controlnet, pipes.controlnet()]
    pipe.controlnet = MultiControlNetModel(nets)
    bgx.enable(pipe, **EAGER)
    assert [net.original for net in pipe.controlnet.nets] == nets
    assert list(bgx.summary(pipe).reports) == ["unet", "controlnet.0", "controlnet.1"]
    bgx.enable(pipe, method={"controlnet": bgx.ToDo(2)}, backend="eager")
    assert [net.methods for net in (pipe.unet, *pipe.controlnet.nets)] == [(METHOD,), *[(bgx.ToDo(2),)] * 2]
    bgx.disable(pipe)
    assert [*pipe.controlnet.nets] == nets


class Two(DiffusionPipeline):
    """A pipeline of two models, which calls neither."""

    def __init__(self, transformer: Any, transformer_2: Any) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, transformer_2=transformer_2)


def test_two_transformers() -> None:
    transformers = [built(BY_NAME["dit"]).transformer for _ in range(2)]
    pipe = bgx.enable(Two(*transformers), **EAGER)
    assert [pipe.transformer.original, pipe.transformer_2.original] == transformers
    assert list(bgx.summary(pipe).reports) == ["transformer", "transformer_2"]
    bgx.disable(pipe)
    assert [pipe.transformer, pipe.transformer_2] == transformers


def test_pipelines_in_a_pipeline() -> None:
    """Kandinsky's parts are called by two pipelines that it holds: each is one denoiser, in two places."""
    prior = PriorTransformer(num_attention_heads=2, attention_head_dim=4, embedding_dim=8, num_layers=1).eval()
    empty = ("prior_image_encoder", "prior_text_encoder", "prior_tokenizer", "prior_image_processor")
    unet = pipes.unet()
    pipe = KandinskyV22CombinedPipeline(
        unet=unet, scheduler=DDPMScheduler(), movq=pipes.vae(), prior_prior=prior, prior_scheduler=UnCLIPScheduler(),
        **dict.fromkeys(empty),
    )  # fmt: skip
    bgx.enable(pipe, **EAGER)
    assert list(bgx.summary(pipe).reports) == ["unet", "prior_prior"]
    assert pipe.decoder_pipe.unet is pipe.unet
    assert pipe.unet.original is unet
    assert pipe.prior_pipe.prior is pipe.prior_prior
    assert pipe.prior_prior.original is prior
    bgx.disable(pipe)
    assert [pipe.unet, pipe.decoder_pipe.unet, pipe.prior_prior, pipe.prior_pipe.prior] == [unet, unet, prior, prior]


@pytest.mark.parametrize("refused", ["train", "compiled", "hooked", "method"])
def test_nothing_is_half_done(refused: str) -> None:
    pipe = built(BY_NAME["controlnet"])
    message = {"train": "is in train mode", "compiled": "model._orig_mod", "hooked": "no graph can hold",
               "method": "must be a LaplacianMerge"}[refused]  # fmt: skip
    if refused == "train":
        pipe.controlnet.train()
    elif refused == "compiled":
        pipe.controlnet = torch.compile(pipe.controlnet)
    elif refused == "hooked":
        pipe.controlnet.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")
    before = dict(pipe.components)
    method: Any = {"unet": METHOD, "controlnet": 0.7 if refused == "method" else METHOD}
    kind = bgx.MethodError if refused == "method" else bgx.InputError
    with pytest.raises(kind, match=f"^controlnet: .*{message}") as caught:
        bgx.enable(pipe, method=method, backend="eager")
    assert "\n" not in str(caught.value)
    assert all(pipe.components[name] is part for name, part in before.items())


@pytest.mark.parametrize("call", [bgx.disable, bgx.summary, lambda pipe: bgx.enable(pipe, method=METHOD)])
@pytest.mark.parametrize("given", [toys.Separate(), None, "sd"])
def test_what_is_no_pipeline_is_refused(call: Any, given: Any) -> None:
    with pytest.raises(bgx.InputError, match=r"pipe=.* is no pipeline; for a denoiser there is bigain_fx.optimize"):
        call(given)


def test_a_pipeline_without_a_denoiser_is_refused() -> None:
    with pytest.raises(bgx.InputError, match="pipe=Two has no denoiser: no part of it takes a timestep"):
        bgx.enable(Two(pipes.vae(), nn.Linear(2, 2)), method=METHOD)


@pytest.mark.parametrize("first", ["offload", "enable"])
def test_a_pipeline_that_offloads_goes_on_to(first: str) -> None:
    """The hooks are on what is in the pipeline, never left on what was; an error leaves them as well."""
    case = BY_NAME["sd"]
    pipe, dense, merged = built(case), run(case, built(case)), run(case, optimized(case, built(case), METHOD))
    original = pipe.unet
    if first == "offload":
        pipe.enable_model_cpu_offload(device="cpu")
        with pytest.raises(TypeError, match="no_such"):
            bgx.enable(pipe, **EAGER, no_such=1)
        assert hasattr(pipe.unet, "_hf_hook")
    bgx.enable(pipe, **EAGER)
    if first == "enable":
        pipe.enable_model_cpu_offload(device="cpu")
    assert hasattr(pipe.unet, "_hf_hook")
    assert not hasattr(original, "_hf_hook")
    check_same(run(case, pipe), merged)
    bgx.enable(pipe, **EAGER)
    bgx.disable(pipe)
    assert pipe.unet is original
    assert hasattr(original, "_hf_hook")
    assert torch.equal(run(case, pipe), dense)
    pipe.remove_all_hooks()
    assert not hasattr(original, "_hf_hook")


def test_moved_and_saved_it_is_the_original(tmp_path: Path) -> None:
    case = BY_NAME["sd"]
    pipe = bgx.enable(built(case), **EAGER)
    run(case, pipe)
    assert pipe.to(torch.float64).unet.original.dtype == torch.float64
    assert pipe.to(torch.float32).unet.original.dtype == torch.float32
    pipe.save_pretrained(tmp_path)
    again = pipes.quiet(StableDiffusionPipeline.from_pretrained(tmp_path))
    assert type(again.unet) is type(pipe.unet.original)
    torch.testing.assert_close(run(case, again), run(case, bgx.disable(pipe)))
