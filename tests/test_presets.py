"""The paper's settings: for the families that it used, and for no others."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from torch import nn

import bigain_fx as bgx
from bigain_fx.models import KNOWN
from tests import pipes, toys

DIT_BLOCKS = [*range(1, 6), *range(7, 12)]
"""Of 28, from 0: as the released code has them."""


def on_meta(name: str, **changes: Any) -> Any:
    kind, config = KNOWN[name]
    with torch.device("meta"):
        return getattr(diffusers, kind)(**config | changes).eval()


def test_dit_compresses_ten_of_its_blocks() -> None:
    model = on_meta("dit-xl-2", sample_size=16)
    method = bgx.preset(model)
    assert isinstance(method, bgx.LaplacianMerge)
    assert (method.ratio, method.cell, method.cell_layout) == (0.7, (2, 2), "block")
    inputs = torch.randn(1, 4, 16, 16, device="meta")
    labels = {"timestep": torch.ones(1, device="meta"), "class_labels": torch.ones(1, device="meta", dtype=torch.long)}
    report = bgx.inspect(model, (inputs,), labels, method=method)
    assert [site.name for site in report.rewritten] == [f"transformer_blocks.{block}.attn1" for block in DIT_BLOCKS]
    assert len(report.sites) == 28


@pytest.mark.parametrize("config", [{}, {"in_channels": 9}, {"block_out_channels": [320, 640, 1280, 1280]}], ids=str)
def test_stable_diffusion_2(config: dict[str, Any]) -> None:
    model = on_meta("sd2", **config)
    assert bgx.preset(model) == bgx.LaplacianMerge(0.7, window=None)
    assert bgx.preset(model, "kv") == bgx.KVDownsample(2, bgx.LinearAlpha(0.8, 1.2))
    assert bgx.preset(model, kind="kv-classify") == bgx.KVDownsample(2, 0.9)
    fast = bgx.optimize(model, method=bgx.preset(model, "kv"), backend="eager")
    assert fast.methods == (bgx.KVDownsample(2, bgx.LinearAlpha(0.8, 1.2, 999, 0)),)
    assert bgx.preset(fast) == bgx.preset(model), "an optimized denoiser is of its original's family"


@pytest.mark.parametrize("make", [pipes.unet, toys.Separate, lambda: on_meta("dit-xl-2", num_layers=12), lambda: None])
def test_others_have_none(make: Any) -> None:
    model: nn.Module | None = make()
    name = type(model).__name__
    with pytest.raises(bgx.InputError, match=f"model={name} is of no family .* Stable Diffusion 2 .* DiT-XL/2"):
        bgx.preset(model)


def test_the_kind_is_checked() -> None:
    with pytest.raises(bgx.InputError, match="kind='tome' must be 'merge' or 'kv' or 'kv-classify'"):
        bgx.preset(on_meta("sd2"), "tome")
