"""ControlNets in diffusers, beyond those that `zoo_unets` holds."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import diffusers
import torch
from torch import nn

from tests.zoo import CROSS, Case, Part, Site, lively, site
from tests.zoo_more_joint import FLUX_LIKE, TEXT_FIRST, packed
from tests.zoo_more_kit import (
    GRID,
    HEAD,
    HEADS,
    NO_GRID,
    NO_IMAGE,
    ROPE,
    TEXT,
    TOKENS,
    WIDTH,
    case,
    make,
    noise,
    padded_mask,
    steps,
)
from tests.zoo_more_unets import DOWN, FINE, UNET, coarse, latent

CONTROL = {key: value for key, value in UNET.items() if key != "up_block_types"} | {
    "attention_head_dim": 2, "conditioning_embedding_out_channels": (4, 8),
}  # fmt: skip


def control() -> dict[str, Any]:
    return latent() | {"controlnet_cond": noise(2, 3, 2 * FINE[0], 2 * FINE[1])}


def union() -> dict[str, Any]:
    images = [noise(2, 3, 2 * FINE[0], 2 * FINE[1])]
    return latent() | {"controlnet_cond": images, "control_type": torch.eye(2)[[0, 0]], "control_type_idx": [0]}


def inside(prefix: str, sites: tuple[Site, ...]) -> tuple[Site, ...]:
    """``sites`` of a model that is the member ``prefix`` of another."""

    def moved(found: Part) -> Part:
        return replace(found, path=prefix + found.path)

    return tuple(
        replace(
            found, name=prefix + found.name, q=moved(found.q), k=moved(found.k), v=moved(found.v),
            norm=found.norm and prefix + found.norm,
        )
        for found in sites
    )  # fmt: skip


def twice(sites: tuple[Site, ...]) -> tuple[Site, ...]:
    """``sites`` of both models of a stack."""
    return inside("nets.0.", sites) + inside("nets.1.", sites)


def flux_control() -> dict[str, Any]:
    return packed() | {"controlnet_cond": noise(2, TOKENS, 8), "pooled_projections": noise(2, 14)}


def sd3_control() -> dict[str, Any]:
    return {
        "hidden_states": noise(2, 4, *FINE), "controlnet_cond": noise(2, 4, *FINE), "timestep": steps(),
        "encoder_hidden_states": noise(2, TEXT, 12), "pooled_projections": noise(2, 14),
    }  # fmt: skip


def qwen_control() -> dict[str, Any]:
    return {
        "hidden_states": noise(2, TOKENS, 8), "controlnet_cond": noise(2, TOKENS, 8), "timestep": steps() / 1000,
        "encoder_hidden_states": noise(2, TEXT, 12), "img_shapes": [[(1, *GRID)]] * 2,
    }  # fmt: skip


def hunyuan_control() -> dict[str, Any]:
    side = 6
    return {
        "hidden_states": noise(2, 4, 2 * side, 2 * side), "timestep": steps(),
        "controlnet_cond": noise(2, 4, 2 * side, 2 * side), "encoder_hidden_states": noise(2, TEXT, 12),
        "text_embedding_mask": padded_mask(), "encoder_hidden_states_t5": noise(2, 3, 16),
        "text_embedding_mask_t5": torch.ones(2, 3, dtype=torch.bool), "image_meta_size": torch.ones(2, 6),
        "style": torch.zeros(2, dtype=torch.long),
        "image_rotary_emb": (noise(side * side, HEAD), noise(side * side, HEAD)),
    }  # fmt: skip


def sana_control() -> dict[str, Any]:
    return {
        "hidden_states": noise(2, 4, *GRID), "encoder_hidden_states": noise(2, TEXT, 12), "timestep": steps(),
        "controlnet_cond": noise(2, 4, *GRID),
    }  # fmt: skip


def sparse_control() -> dict[str, Any]:
    return latent() | {
        "sample": noise(1, 4, 3, *FINE), "encoder_hidden_states": noise(3, TEXT, 12), "timestep": steps()[:1],
        "controlnet_cond": noise(1, 4, 3, *FINE), "conditioning_mask": torch.ones(1, 1, 3, *FINE),
    }  # fmt: skip


def z_control() -> nn.Module:
    """A control model borrows its embedders and refiners from the transformer that it steers."""
    same = {"dim": WIDTH, "n_refiner_layers": 1, "n_heads": HEADS, "n_kv_heads": HEADS}
    base = diffusers.ZImageTransformer2DModel(
        in_channels=4, n_layers=1, cap_feat_dim=12, axes_dims=list(ROPE), axes_lens=[64, 16, 16], **same
    )
    model = diffusers.ZImageControlNetModel(control_layers_places=[0], control_in_dim=4, **same)
    return lively(diffusers.ZImageControlNetModel.from_transformer(model, base))


def z_inputs() -> dict[str, Any]:
    """Images of 8 x 12 patches: their number is a multiple of 32, to which the model would pad it."""
    images = [[noise(4, 1, 2 * FINE[0], 2 * FINE[1]) for _ in range(2)] for _ in range(2)]
    prompts = [noise(TEXT, 12) for _ in range(2)]
    return {"x": images[0], "t": torch.tensor([0.1, 0.9]), "cap_feats": prompts, "control_context": images[1]}


def stacked(name: str, member: str, config: dict[str, Any], count: int = 2) -> nn.Module:
    """``count`` ControlNets of the class ``member`` as one."""
    model: nn.Module = getattr(diffusers, name)([make(member, config) for _ in range(count)])
    return model.eval()


def multi() -> dict[str, Any]:
    images = [noise(2, 3, 2 * FINE[0], 2 * FINE[1]) for _ in range(2)]
    return latent() | {"controlnet_cond": images, "conditioning_scale": [1.0, 0.5], "return_dict": False}


HUNYUAN = {
    "num_attention_heads": HEADS, "attention_head_dim": HEAD, "in_channels": 4, "patch_size": 2, "sample_size": 12,
    "hidden_size": WIDTH, "transformer_num_layers": 4, "cross_attention_dim": 12, "cross_attention_dim_t5": 16,
    "pooled_projection_dim": 8, "text_len": TEXT, "text_len_t5": 3,
}  # fmt: skip
QWEN = {
    "in_channels": 8, "out_channels": 2, "num_layers": 1, "attention_head_dim": HEAD, "num_attention_heads": HEADS,
    "joint_attention_dim": 12, "axes_dims_rope": ROPE,
}  # fmt: skip
SD3 = {
    "sample_size": 12, "in_channels": 4, "num_layers": 1, "attention_head_dim": HEAD, "num_attention_heads": HEADS,
    "joint_attention_dim": 12, "caption_projection_dim": WIDTH, "pooled_projection_dim": 14, "out_channels": 4,
    "pos_embed_max_size": 8,
}  # fmt: skip
HUNYUAN_SITES = (site("blocks.0.attn1", (6, 6)),)
HUNYUAN_KEPT = CROSS | {"*time_extra_emb.pooler": "cross-attention"}
QWEN_SITES = (site("transformer_blocks.0.attn", GRID, offset=TEXT),)
SD3_SITES = (site("transformer_blocks.0.attn", GRID),)

CONTROLS: tuple[Case, ...] = (
    case("ControlNetUnionModel", CONTROL | {
        "num_control_type": 2, "num_trans_channel": 16, "num_trans_head": 2, "num_proj_channel": 16,
        "addition_time_embed_dim": 8,
    }, union, sites=DOWN, kept=CROSS | {"transformer_layes.*": NO_GRID}),
    case(
        "UNetControlNetXSModel",
        {
            "sample_size": 12, "down_block_types": UNET["down_block_types"], "up_block_types": UNET["up_block_types"],
            "block_out_channels": (16, 32), "norm_num_groups": 4, "cross_attention_dim": 12, "num_attention_heads": 2,
            "ctrl_conditioning_embedding_out_channels": (4, 8), "ctrl_block_out_channels": (8, 16),
            "ctrl_num_attention_heads": 2, "ctrl_max_norm_num_groups": 4,
        },
        control,
        sites=coarse(
            *(f"down_blocks.1.{half}_attentions.{index}" for half in ("base", "ctrl") for index in range(2)),
            *(f"mid_block.{half}_midblock.attentions.0" for half in ("base", "ctrl")),
            *(f"up_blocks.0.attentions.{index}" for index in range(3)),
        ),
        kept=CROSS,
    ),
    case("FluxControlNetModel", FLUX_LIKE | {"pooled_projection_dim": 14}, flux_control, sites=TEXT_FIRST),
    case("HunyuanDiT2DControlNetModel", HUNYUAN, hunyuan_control, sites=HUNYUAN_SITES,
         kept=HUNYUAN_KEPT),
    case("QwenImageControlNetModel", QWEN, qwen_control, sites=QWEN_SITES),
    case("SD3ControlNetModel", SD3, sd3_control, sites=SD3_SITES),
    case(
        "SanaControlNetModel",
        {
            "in_channels": 4, "out_channels": 4, "num_attention_heads": HEADS, "attention_head_dim": HEAD,
            "num_layers": 1, "num_cross_attention_heads": HEADS, "cross_attention_head_dim": HEAD,
            "cross_attention_dim": WIDTH, "caption_channels": 12, "sample_size": 6,
        },
        sana_control, kept={"*.attn1": "linear attention", "*.attn2": "cross-attention"},
    ),
    case(
        "SparseControlNetModel",
        CONTROL | {
            "down_block_types": ("DownBlockMotion", "CrossAttnDownBlockMotion"), "motion_num_attention_heads": 2,
            "motion_max_seq_length": 4,
        },
        sparse_control, sites=DOWN, kept=CROSS | {"*.motion_modules.*": "across images"},
    ),
    Case("ZImageControlNetModel", z_control, z_inputs, grid=FINE,
         sites=(site("noise_refiner.0.attention", FINE),),
         kept={"context_refiner.*": NO_IMAGE, "control_noise_refiner.*": NO_IMAGE, "control_layers.*": NO_GRID}),
    Case("MultiControlNetModel", lambda: stacked("MultiControlNetModel", "ControlNetModel", CONTROL), multi),
    Case(
        "FluxMultiControlNetModel",
        lambda: stacked("FluxMultiControlNetModel", "FluxControlNetModel",
                        FLUX_LIKE | {"pooled_projection_dim": 14, "num_mode": 2}),
        lambda: flux_control() | {
            "controlnet_cond": [noise(2, TOKENS, 8)] * 2, "conditioning_scale": [1.0, 0.5],
            "return_dict": False,
            "controlnet_mode": [torch.zeros(2, dtype=torch.long), torch.ones(2, dtype=torch.long)],
        },
    ),
    Case(
        "HunyuanDiT2DMultiControlNetModel",
        lambda: stacked("HunyuanDiT2DMultiControlNetModel", "HunyuanDiT2DControlNetModel", HUNYUAN),
        lambda: hunyuan_control() | {
            "controlnet_cond": [noise(2, 4, 12, 12)] * 2, "conditioning_scale": [1.0, 0.5],
        },
        sites=twice(HUNYUAN_SITES), kept=HUNYUAN_KEPT,
    ),
    Case(
        "QwenImageMultiControlNetModel",
        lambda: stacked("QwenImageMultiControlNetModel", "QwenImageControlNetModel", QWEN, 1),
        lambda: qwen_control() | {"controlnet_cond": [noise(2, TOKENS, 8)], "conditioning_scale": [0.5]},
        sites=inside("nets.0.", QWEN_SITES),
    ),
    Case(
        "SD3MultiControlNetModel",
        lambda: stacked("SD3MultiControlNetModel", "SD3ControlNetModel", SD3),
        lambda: sd3_control() | {"controlnet_cond": [noise(2, 4, *FINE)] * 2, "conditioning_scale": [1.0, 0.5]},
        sites=twice(SD3_SITES),
    ),
)  # fmt: skip
