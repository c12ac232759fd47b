"""U-Nets and plain image transformers in diffusers, beyond those that `zoo_named` and `zoo_unets` hold."""

from __future__ import annotations

from typing import Any

import torch

from tests.zoo import CROSS, Case, Site, site
from tests.zoo_more_joint import LATENT, pair
from tests.zoo_more_kit import (
    GRID,
    HEAD,
    HEADS,
    NO_GRID,
    TEXT,
    WIDTH,
    case,
    noise,
    padded_mask,
    steps,
)

FINE, COARSE = LATENT, GRID
UNET: dict[str, Any] = {
    "block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 4, "cross_attention_dim": 12,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}  # fmt: skip


def latent() -> dict[str, Any]:
    return {"sample": noise(2, 4, *FINE), "timestep": steps(), "encoder_hidden_states": noise(2, TEXT, 12)}


def basic(block: str, grid: tuple[int, int] = COARSE) -> Site:
    """The self-attention of a `BasicTransformerBlock`, whose x is the direct output of ``norm1``."""
    return site(f"{block}.attn1", grid, norm=f"{block}.norm1")


def coarse(*blocks: str) -> tuple[Site, ...]:
    """The self-attentions of the U-Net transformers at ``blocks``, on the coarse level."""
    return tuple(basic(f"{block}.transformer_blocks.0") for block in blocks)


DOWN = coarse("down_blocks.1.attentions.0", "mid_block.attentions.0")
UP = coarse("up_blocks.0.attentions.0", "up_blocks.0.attentions.1")


def gated(found: Site) -> Site:
    """The attention after ``found`` that reads the image and the boxes, joined."""
    block = found.name.removesuffix("attn1") + "fuser."
    return site(f"{block}attn", COARSE, f"{block}norm1")


def gligen() -> dict[str, Any]:
    boxes = {"boxes": torch.rand(2, 3, 4), "positive_embeddings": noise(2, 3, 12), "masks": torch.ones(2, 3)}
    return latent() | {"cross_attention_kwargs": {"gligen": boxes}}


def uvit() -> dict[str, Any]:
    return {
        "input_ids": torch.randint(0, 20, (2, *GRID)), "encoder_hidden_states": noise(2, TEXT, 12),
        "pooled_text_emb": noise(2, 10), "micro_conds": torch.rand(2, 5),
    }  # fmt: skip


def cascade() -> dict[str, Any]:
    return {"sample": noise(2, 4, *FINE), "timestep_ratio": steps() / 1000, "clip_text_pooled": noise(2, 1, 12)}


def prior() -> dict[str, Any]:
    return {
        "hidden_states": noise(2, 12), "timestep": steps(), "proj_embedding": noise(2, 12),
        "encoder_hidden_states": noise(2, TEXT, 12), "attention_mask": padded_mask(),
    }  # fmt: skip


def unidiffuser() -> dict[str, Any]:
    return {
        "latent_image_embeds": noise(2, 4, 8, 8), "image_embeds": noise(2, 1, 10), "prompt_embeds": noise(2, TEXT, 12),
        "timestep_img": steps(), "timestep_text": steps(),
    }  # fmt: skip


DREAM = UNET | {
    "down_block_types": ("DreamLiteCrossAttnNoSelfAttnDownBlock2D", "DreamLiteCrossAttnDownBlock2D"),
    "up_block_types": ("DreamLiteCrossAttnUpBlock2D", "DreamLiteUpBlock2D"),
    "attention_head_dim": 2, "use_linear_projection": True,
}  # fmt: skip
CASCADE_BLOCK = ("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock")

UNETS: tuple[Case, ...] = (
    case("UNet2DConditionModel-gligen", UNET | {"attention_head_dim": 2, "attention_type": "gated"}, gligen,
         sites=(*DOWN, *UP, *(gated(found) for found in (*DOWN, *UP))), kept=CROSS),
    case(
        "UNet2DConditionModel-k-blocks",
        UNET | {
            "down_block_types": ("KDownBlock2D", "KCrossAttnDownBlock2D"), "mid_block_type": None,
            "up_block_types": ("KCrossAttnUpBlock2D", "KUpBlock2D"), "attention_head_dim": 8, "norm_num_groups": None,
            "act_fn": "gelu", "conv_in_kernel": 1, "conv_out_kernel": 1, "time_embedding_type": "fourier",
            "resnet_time_scale_shift": "scale_shift", "timestep_post_act": "gelu", "block_out_channels": (32, 32),
            "time_embedding_dim": 32,
        },
        latent,
        sites=(site("down_blocks.1.attentions.0.attn1", COARSE), site("up_blocks.0.attentions.0.attn1", COARSE)),
        kept=CROSS,
    ),
    case(
        "UNet2DModel-skip",
        {
            "block_out_channels": (32, 32), "layers_per_block": 1, "in_channels": 3, "out_channels": 3,
            "down_block_types": ("SkipDownBlock2D", "AttnSkipDownBlock2D"), "attention_head_dim": 8,
            "up_block_types": ("AttnSkipUpBlock2D", "SkipUpBlock2D"), "time_embedding_type": "fourier",
        },
        lambda: {"sample": noise(2, 3, *FINE), "timestep": steps()},
        sites=tuple(
            site(name, COARSE, f"{name}.group_norm")
            for name in ("down_blocks.1.attentions.0", "mid_block.attentions.0", "up_blocks.0.attentions.0")
        ),
    ),
    case("DreamLiteUNetModel", DREAM, latent, sites=DOWN + UP, kept=CROSS),
    case(
        "DreamLiteTransformer2DModel",
        {"num_attention_heads": HEADS, "attention_head_dim": HEAD, "in_channels": 16, "norm_num_groups": 4,
         "cross_attention_dim": 12, "qk_norm": "rms_norm"},
        lambda: {"hidden_states": noise(2, 16, *GRID), "encoder_hidden_states": noise(2, TEXT, 12)},
        sites=(basic("transformer_blocks.0"),), kept=CROSS,
    ),
    case(
        "Transformer2DModel",
        {"num_attention_heads": HEADS, "attention_head_dim": HEAD, "in_channels": 16, "norm_num_groups": 4,
         "cross_attention_dim": 12},
        lambda: {"hidden_states": noise(2, 16, *GRID), "encoder_hidden_states": noise(2, TEXT, 12)},
        sites=(basic("transformer_blocks.0"),), kept=CROSS,
    ),
    case(
        "Transformer2DModel-vectors",
        {"num_attention_heads": HEADS, "attention_head_dim": HEAD, "sample_size": 6, "num_vector_embeds": 12,
         "num_embeds_ada_norm": 1000, "norm_type": "ada_norm", "cross_attention_dim": 12},
        lambda: {"hidden_states": torch.randint(0, 12, (2, 36)), "encoder_hidden_states": noise(2, TEXT, 12),
                 "timestep": torch.tensor(300)},
        grid=(6, 6), sites=(site("transformer_blocks.0.attn1", (6, 6)),), kept=CROSS,
    ),
    case(
        "UVit2DModel",
        {
            "hidden_size": WIDTH, "cond_embed_dim": 10, "micro_cond_encode_dim": 4, "micro_cond_embed_dim": 20,
            "encoder_hidden_size": 12, "vocab_size": 20, "codebook_size": 16, "in_channels": 16,
            "block_out_channels": 32, "num_res_blocks": 1, "block_num_heads": 2, "num_hidden_layers": 2,
            "num_attention_heads": HEADS, "intermediate_size": 48, "sample_size": 6,
        },
        uvit, sites=pair("transformer_layers.{}.attn1"),
        kept=CROSS | {"*_block.attention_blocks.*.attn1": "cross-attention"},
    ),
    case(
        "StableCascadeUNet",
        {
            "in_channels": 4, "out_channels": 4, "timestep_ratio_embedding_dim": 8, "conditioning_dim": 12,
            "block_out_channels": (16, 32), "num_attention_heads": (2, 2), "down_num_layers_per_block": (1, 1),
            "up_num_layers_per_block": (1, 1), "block_types_per_layer": (CASCADE_BLOCK, CASCADE_BLOCK),
            "clip_text_pooled_in_channels": 12,
        },
        # Keys and values are projected from the image with the prompt below it, queries from the image.
        cascade, kept={"*.attention": "not projected from the same tensor"},
    ),
    case(
        "PriorTransformer",
        {"num_attention_heads": HEADS, "attention_head_dim": HEAD, "num_layers": 2, "embedding_dim": 12,
         "num_embeddings": TEXT},
        prior, kept={"*.attn1": NO_GRID},
    ),
    case(
        "UniDiffuserModel",
        {
            "text_dim": 12, "clip_img_dim": 10, "num_text_tokens": TEXT, "num_attention_heads": HEADS,
            "attention_head_dim": HEAD, "in_channels": 4, "out_channels": 4, "num_layers": 3, "sample_size": 8,
            "patch_size": 2, "norm_type": "layer_norm", "attention_bias": True,
        },
        unidiffuser,
        # Two timesteps, the prompt and an image embedding come before the patches; norms follow the residual sum.
        sites=tuple(
            site(f"transformer.transformer_{name}.attn1", (4, 4), norm and f"transformer.transformer_{norm}",
                 x_offset=TEXT + 3, offset=TEXT + 3)
            for name, norm in (
                ("in_blocks.0", None), ("mid_block", "in_blocks.0.norm3"),
                ("out_blocks.0.block", "out_blocks.0.skip.norm"),
            )
        ),
    ),
)  # fmt: skip
