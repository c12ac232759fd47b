"""The joint-attention transformers that the issue names, tiny and random, and `NAMED`, every model that it names.

All of these scale and shift the norm that their attention reads: the metric is what it reads.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AuraFlowTransformer2DModel,
    ChromaTransformer2DModel,
    CogView3PlusTransformer2DModel,
    CogView4Transformer2DModel,
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    ZImageTransformer2DModel,
)
from torch import Tensor, nn

from tests.zoo import Case, Site, fused_site, lively, site
from tests.zoo_dits import DITS, GRID, HEADS, LATENT, TEXT, noisy
from tests.zoo_unets import UNETS

TOKENS = GRID[0] * GRID[1]


def streams(pattern: str, count: int, offset: int, *, x_offset: int = 0) -> tuple[Site, ...]:
    """Sites named by ``pattern`` and a number, with ``offset`` rows of text before the image among q, k and v."""
    return tuple(site(pattern.format(index), GRID, x_offset=x_offset, offset=offset) for index in range(count))


def text(channels: int = 12) -> dict[str, Any]:
    return {"encoder_hidden_states": torch.randn(2, TEXT, channels)}


# ------------------------------------------------------------------------------------- SD3, AuraFlow, CogView


def sd3(**options: Any) -> nn.Module:
    return lively(
        SD3Transformer2DModel(
            **HEADS,
            sample_size=16,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            joint_attention_dim=12,
            caption_projection_dim=32,
            pooled_projection_dim=10,
            pos_embed_max_size=24,
            **options,
        )
    )


def sd3_inputs() -> dict[str, Any]:
    return noisy() | text() | {"pooled_projections": torch.randn(2, 10)}


REGISTERS = 8  # learned tokens that AuraFlow puts before the text


def auraflow() -> nn.Module:
    return lively(
        AuraFlowTransformer2DModel(
            **HEADS,
            sample_size=16,
            num_mmdit_layers=1,
            num_single_dit_layers=2,
            joint_attention_dim=12,
            caption_projection_dim=32,
            pos_embed_max_size=256,
        )
    )


AURAFLOW_SITES = (
    *streams("joint_transformer_blocks.{}.attn", 1, REGISTERS + TEXT),
    *streams("single_transformer_blocks.{}.attn", 2, REGISTERS + TEXT, x_offset=REGISTERS + TEXT),
)


def cogview(kind: type[Any], **options: Any) -> nn.Module:
    return lively(
        kind(
            **HEADS,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            text_embed_dim=12,
            time_embed_dim=16,
            condition_dim=4,
            pos_embed_max_size=16,
            sample_size=16,
            **options,
        )
    )


def cogview_inputs() -> dict[str, Any]:
    sizes = {name: torch.tensor([[64.0, 96.0]] * 2) for name in ("original_size", "target_size")}
    return noisy() | text() | sizes | {"crop_coords": torch.zeros(2, 2)}


# q, k and v read the text and the image, joined
COGVIEW_SITES = streams("transformer_blocks.{}.attn1", 2, TEXT, x_offset=TEXT)

# ------------------------------------------------------------------------------------- Flux, Flux 2, Chroma, Qwen-Image


def positions(axes: int, rows_axis: int = 1) -> dict[str, Tensor]:
    """``img_ids`` (N, axes) with rows and columns from ``rows_axis`` on, ``txt_ids`` (T, axes)."""
    ids = torch.zeros(*GRID, axes)
    ids[..., rows_axis] += torch.arange(GRID[0])[:, None]
    ids[..., rows_axis + 1] += torch.arange(GRID[1])
    txt = torch.zeros(TEXT, axes)
    if axes == 4:
        txt[:, 3] = torch.arange(TEXT)
    return {"img_ids": ids.view(-1, axes), "txt_ids": txt}


def packed() -> dict[str, Any]:
    return {"hidden_states": torch.randn(2, TOKENS, 8), "timestep": torch.tensor([0.1, 0.9])} | text()


def flux() -> nn.Module:
    return lively(
        FluxTransformer2DModel(
            **HEADS,
            in_channels=8,
            num_layers=1,
            num_single_layers=2,
            joint_attention_dim=12,
            pooled_projection_dim=10,
            axes_dims_rope=(4, 6, 6),
        )
    )


def flux_inputs() -> dict[str, Any]:
    return packed() | positions(3) | {"pooled_projections": torch.randn(2, 10)}


FLUX_SITES = (
    *streams("transformer_blocks.{}.attn", 1, TEXT),
    *streams("single_transformer_blocks.{}.attn", 2, TEXT, x_offset=TEXT),
)


def flux_fused() -> nn.Module:
    model = flux()
    model.fuse_qkv_projections()  # type: ignore[operator]
    return model


FLUX_FUSED_SITES = (
    fused_site("transformer_blocks.0.attn.to_qkv", 32, GRID, offset=TEXT),
    *(
        fused_site(f"single_transformer_blocks.{index}.attn.to_qkv", 32, GRID, x_offset=TEXT, offset=TEXT)
        for index in range(2)
    ),
)


def flux2() -> nn.Module:
    return lively(
        Flux2Transformer2DModel(
            **HEADS,
            in_channels=8,
            num_layers=1,
            num_single_layers=2,
            joint_attention_dim=12,
            timestep_guidance_channels=16,
            axes_dims_rope=(4, 4, 4, 4),
        )
    )


# a single block projects q, k, v and the input of its MLP at once
FLUX2_SITES = (
    *streams("transformer_blocks.{}.attn", 1, TEXT),
    *(
        fused_site(f"single_transformer_blocks.{index}.attn.to_qkv_mlp_proj", 32, GRID, x_offset=TEXT, offset=TEXT)
        for index in range(2)
    ),
)


def chroma() -> nn.Module:
    return lively(
        ChromaTransformer2DModel(
            **HEADS,
            in_channels=8,
            num_layers=1,
            num_single_layers=2,
            joint_attention_dim=12,
            axes_dims_rope=(4, 6, 6),
            approximator_num_channels=16,
            approximator_hidden_dim=16,
            approximator_layers=1,
        )
    )


def chroma_inputs() -> dict[str, Any]:
    mask = torch.ones(2, TEXT + TOKENS)
    mask[1, 3:TEXT] = 0
    return packed() | positions(3) | {"attention_mask": mask}


def qwen(**options: Any) -> nn.Module:
    return lively(
        QwenImageTransformer2DModel(
            **HEADS,
            in_channels=8,
            out_channels=2,
            num_layers=2,
            joint_attention_dim=12,
            axes_dims_rope=(4, 6, 6),
            **options,
        )
    )


def qwen_inputs() -> dict[str, Any]:
    mask = torch.ones(2, TEXT, dtype=torch.bool)
    mask[1, 3:] = False
    return packed() | {"encoder_hidden_states_mask": mask, "img_shapes": [[(1, *GRID)], [(1, *GRID)]]}


# ------------------------------------------------------------------------------------- Z-Image


def zimage() -> nn.Module:
    return lively(
        ZImageTransformer2DModel(
            in_channels=4,
            dim=32,
            n_layers=2,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=12,
            axes_dims=[4, 6, 6],
            axes_lens=[64, 32, 32],
        )
    )


def zimage_inputs() -> dict[str, Any]:
    images = [torch.randn(4, 1, *LATENT) for _ in range(2)]
    return {"x": images, "t": torch.tensor([0.1, 0.9]), "cap_feats": [torch.randn(TEXT, 12) for _ in range(2)]}


# the image comes first, then the caption, padded to 32 rows
ZIMAGE_SITES = (*streams("noise_refiner.{}.attention", 1, 0), *streams("layers.{}.attention", 2, 0))

JOINT: tuple[Case, ...] = (
    Case("sd3", sd3, sd3_inputs, sites=streams("transformer_blocks.{}.attn", 2, 0)),
    Case(
        "sd3.5",
        lambda: sd3(dual_attention_layers=(0,), qk_norm="rms_norm"),
        sd3_inputs,
        sites=(*streams("transformer_blocks.{}.attn", 2, 0), *streams("transformer_blocks.{}.attn2", 1, 0)),
    ),
    Case("auraflow", auraflow, lambda: noisy(steps=(0.1, 0.9)) | text(), sites=AURAFLOW_SITES),
    Case("cogview3", lambda: cogview(CogView3PlusTransformer2DModel), cogview_inputs, sites=COGVIEW_SITES),
    Case(
        "cogview4",
        lambda: cogview(CogView4Transformer2DModel, rope_axes_dim=(16, 16)),
        cogview_inputs,
        sites=COGVIEW_SITES,
    ),
    Case("flux", flux, flux_inputs, sites=FLUX_SITES),
    Case("flux-fused", flux_fused, flux_inputs, sites=FLUX_FUSED_SITES),
    Case("flux2", flux2, lambda: packed() | positions(4) | {"guidance": torch.tensor([4.0, 4.0])}, sites=FLUX2_SITES),
    Case("chroma", chroma, chroma_inputs, sites=FLUX_SITES),
    Case("qwen-image", qwen, qwen_inputs, sites=streams("transformer_blocks.{}.attn", 2, TEXT)),
    Case("z-image", zimage, zimage_inputs, sites=ZIMAGE_SITES, kept={"context_refiner.*": "no image"}),
)

NAMED: tuple[Case, ...] = (*UNETS, *DITS, *JOINT)
