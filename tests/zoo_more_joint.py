"""Image denoisers in which text and image tokens attend together, beyond those that `zoo_named` holds."""

from __future__ import annotations

from typing import Any

import torch

from tests.zoo import Case, Site, fused_site, site
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
    image_ids,
    noise,
    padded_mask,
    steps,
    text_ids,
)

BLOCKS = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": HEAD, "num_attention_heads": HEADS}
LATENT = (GRID[0] * 2, GRID[1] * 2)
"""Rows and columns of a latent with patches of 2 x 2."""


def packed() -> dict[str, Any]:
    """Inputs as Flux takes them."""
    return {
        "hidden_states": noise(2, TOKENS, 8),
        "encoder_hidden_states": noise(2, TEXT, 12),
        "timestep": steps() / 1000,
        "img_ids": image_ids(),
        "txt_ids": text_ids(),
    }


TEXT_FIRST = (
    site("transformer_blocks.0.attn", GRID, offset=TEXT),
    site("single_transformer_blocks.0.attn", GRID, offset=TEXT, x_offset=TEXT),
)
"""As in Flux: a double block, then one that projects text and image together."""

GIST = 8
"""What `BriaFibo2Transformer2DModel` makes of its prompt."""


def pair(pattern: str, *, x_offset: int = 0, offset: int = 0) -> tuple[Site, ...]:
    """The same attention in blocks 0 and 1."""
    return tuple(site(pattern.format(index), GRID, x_offset=x_offset, offset=offset) for index in range(2))


FLUX_LIKE = {"in_channels": 8, "joint_attention_dim": 12, "axes_dims_rope": ROPE, **BLOCKS}


def bria_fibo() -> dict[str, Any]:
    return packed() | {"timestep": steps(), "text_encoder_layers": [noise(2, TEXT, 10), noise(2, TEXT, 10)]}


def bria_fibo2() -> dict[str, Any]:
    return {
        "hidden_states": noise(2, 4, *LATENT),
        "timestep": steps() / 1000,
        "encoder_hidden_states": noise(2, 2, TEXT, 12),
    }


def ernie() -> dict[str, Any]:
    return {
        "hidden_states": noise(2, 8, *GRID),
        "timestep": steps(),
        "text_bth": noise(2, TEXT, 12),
        "text_lens": torch.tensor([TEXT, 3]),
    }


def flux3() -> dict[str, Any]:
    image, text = torch.zeros(TOKENS, 4), torch.zeros(TEXT, 4)
    image[:, :3] = image_ids()
    text[:, 3] = torch.arange(TEXT)
    return packed() | {"img_ids": image, "txt_ids": text}


def glm() -> dict[str, Any]:
    return {
        "hidden_states": noise(2, 4, *LATENT),
        "encoder_hidden_states": noise(2, TEXT, 12),
        "prior_token_id": torch.randint(0, 16, (2, TOKENS)),
        "prior_token_drop": torch.tensor([False, True]),
        "timestep": steps(),
        "target_size": torch.tensor([[64.0, 96.0]] * 2),
        "crop_coords": torch.zeros(2, 2),
    }


def hidream(rows: int = 6, columns: int = 6) -> dict[str, Any]:
    return {
        "hidden_states": noise(2, 4, 2 * rows, 2 * columns),
        "timesteps": steps(),
        "encoder_hidden_states_t5": noise(2, TEXT, 12),
        "encoder_hidden_states_llama3": noise(2, 2, TEXT, 10),
        "pooled_embeds": noise(2, 14),
    }


def hidream_packed() -> dict[str, Any]:
    """Patches, with the sizes of their images as numbers: the model does not work them out in a tensor."""
    return hidream() | {
        "hidden_states": noise(2, TOKENS, 16),
        "hidden_states_masks": torch.ones(2, TOKENS),
        "img_ids": image_ids().expand(2, -1, -1).contiguous(),
        "img_sizes": [GRID, GRID],
    }


def hunyuan_image() -> dict[str, Any]:
    return {
        "hidden_states": noise(2, 4, *GRID),
        "timestep": steps(),
        "encoder_hidden_states": noise(2, TEXT, 12),
        "encoder_attention_mask": padded_mask(),
    }


def ideogram() -> dict[str, Any]:
    length = TEXT + TOKENS
    positions = torch.zeros(2, length, 3)
    positions[:, TEXT:] = image_ids(frame=1)
    indicator = torch.tensor([3] * TEXT + [2] * TOKENS).expand(2, -1).contiguous()
    return {
        "hidden_states": noise(2, length, 8),
        "timestep": steps() / 1000,
        "encoder_hidden_states": noise(2, length, 12),
        "position_ids": positions,
        "segment_ids": torch.zeros(2, length, dtype=torch.long),
        "indicator": indicator,
    }


def joy() -> dict[str, Any]:
    return {
        "hidden_states": noise(2, 4, 1, *LATENT),
        "timestep": steps(),
        "encoder_hidden_states": noise(2, TEXT, 12),
    }


def joy_plus() -> dict[str, Any]:
    return joy() | {
        "hidden_states": noise(2, TOKENS, 4, 1, 2, 2),
        "encoder_hidden_states_mask": padded_mask().float(),
        "shape_list": [[(1, *GRID)], [(1, *GRID)]],
    }


def krea() -> dict[str, Any]:
    return {
        "hidden_states": noise(2, TOKENS, 8),
        "encoder_hidden_states": noise(2, TEXT, 3, 12),
        "timestep": steps() / 1000,
        "position_ids": torch.cat([text_ids(), image_ids()]),
        "encoder_attention_mask": padded_mask(),
    }


def nucleus() -> dict[str, Any]:
    return {
        "hidden_states": noise(2, TOKENS, 8),
        "img_shapes": [(1, *GRID)] * 2,
        "encoder_hidden_states": noise(2, TEXT, 12),
        "timestep": steps() / 1000,
    }


def omnigen() -> dict[str, Any]:
    length = TEXT + 1 + TOKENS
    return {
        "hidden_states": noise(2, 4, *LATENT),
        "timestep": steps() / 1000,
        "input_ids": torch.randint(0, 20, (2, TEXT)),
        "input_img_latents": [],
        "input_image_sizes": {},
        "attention_mask": torch.ones(2, length, length),
        "position_ids": torch.arange(length).expand(2, -1).contiguous(),
    }


def prx() -> dict[str, Any]:
    return {
        "hidden_states": noise(2, 4, *LATENT),
        "timestep": steps() / 1000,
        "encoder_hidden_states": noise(2, TEXT, 12),
        "attention_mask": padded_mask(),
    }


def qwen21() -> dict[str, Any]:
    return {
        "hidden_states": noise(2, TOKENS, 8),
        "encoder_hidden_states": noise(2, TEXT, 12),
        "timestep": steps() / 1000,
        "img_shapes": [[(1, *GRID)]] * 2,
        "img_mask": torch.tensor([False] * TEXT + [True] * (TOKENS // 4)).expand(2, -1).contiguous(),
    }


HIDREAM = {
    "patch_size": 2, "in_channels": 4, "caption_channels": [12, 10], "text_emb_dim": 14, "num_routed_experts": 0,
    "axes_dims_rope": ROPE, "max_resolution": (24, 24), "llama_layers": [0, 1], **BLOCKS,
}  # fmt: skip

NUCLEUS = {
    "in_channels": 8, "out_channels": 2, "num_layers": 2, "attention_head_dim": HEAD, "num_attention_heads": 4,
    "num_key_value_heads": 2, "joint_attention_dim": 12, "axes_dims_rope": ROPE, "num_experts": 4, "mlp_ratio": 6,
    "moe_intermediate_dim": 16, "capacity_factors": 2.0, "dense_moe_strategy": "leave_first_block_dense",
}  # fmt: skip

JOINT: tuple[Case, ...] = (
    case("BriaTransformer2DModel", FLUX_LIKE, lambda: packed() | {"timestep": steps()}, sites=TEXT_FIRST),
    case("BriaFiboTransformer2DModel", FLUX_LIKE | {"text_encoder_dim": 10}, bria_fibo, sites=TEXT_FIRST),
    case("LongCatImageTransformer2DModel", FLUX_LIKE, packed, sites=TEXT_FIRST),
    case("OvisImageTransformer2DModel", FLUX_LIKE, packed, sites=TEXT_FIRST),
    case(
        "Flux3Transformer2DModel", FLUX_LIKE | {"axes_dims_rope": (4, 4, 4, 4)}, flux3,
        sites=(site("mode_blocks.image.0.attn", GRID), TEXT_FIRST[1]), kept={"txt_mode_blocks.*": NO_IMAGE},
    ),
    case(
        "BriaFibo2Transformer2DModel",
        {
            "in_channels": 4, "dim": WIDTH, "n_layers": 2, "n_refiner_layers": 1, "n_heads": HEADS, "cap_feat_dim": 12,
            "injection_layer_ids": (1,), "perceiver_num_layers": 1, "min_num_gist_tokens": 4, "max_num_gist_tokens": 8,
            "gist_step": 4, "gist_min_text_len": 4, "gist_max_text_len": 16, "axes_dims": ROPE,
            "axes_lens": (32, 16, 16),
        },
        bria_fibo2,
        sites=(
            site("noise_refiner.0.attention", GRID),
            *pair("layers.{}.attention", offset=GIST, x_offset=GIST),
        ),
        kept={"perceiver.*.self_attention": NO_IMAGE, "*.cross_attention": "cross-attention"},
    ),
    case(
        "ErnieImageTransformer2DModel",
        {
            "hidden_size": WIDTH, "num_attention_heads": HEADS, "num_layers": 2, "ffn_hidden_size": 48,
            "in_channels": 8, "out_channels": 8, "text_in_dim": 12, "rope_axes_dim": ROPE,
        },
        ernie, sites=pair("layers.{}.self_attention"),
    ),
    case(
        "GlmImageTransformer2DModel",
        {
            "in_channels": 4, "out_channels": 4, "num_layers": 1, "attention_head_dim": HEAD,
            "num_attention_heads": HEADS, "text_embed_dim": 12, "time_embed_dim": 16, "condition_dim": 8,
            "prior_vq_quantizer_codebook_size": 16,
        },
        glm,
    ),
    case("HiDreamImageTransformer2DModel", HIDREAM, hidream),
    case(
        "HiDreamImageTransformer2DModel-packed", HIDREAM, hidream_packed,
        sites=(
            site("double_stream_blocks.0.block.attn1", GRID), site("single_stream_blocks.0.block.attn1", GRID),
        ),
    ),
    case("HiDreamImageTransformer2DModel-padded", HIDREAM, lambda: hidream(*GRID)),
    case("HiDreamImageTransformer2DModel-experts", HIDREAM | {"num_routed_experts": 2}, hidream),
    case(
        "HunyuanImageTransformer2DModel",
        BLOCKS | {
            "in_channels": 4, "out_channels": 4, "num_refiner_layers": 1, "text_embed_dim": 12,
            "rope_axes_dim": (8, 8),
        },
        hunyuan_image,
        sites=(site("transformer_blocks.0.attn", GRID), site("single_transformer_blocks.0.attn", GRID)),
        kept={"context_embedder.*": NO_IMAGE},
    ),
    case(
        "Ideogram4Transformer2DModel",
        {
            "in_channels": 8, "num_layers": 1, "attention_head_dim": HEAD, "num_attention_heads": HEADS,
            "intermediate_size": 48, "adaln_dim": 16, "llm_features_dim": 12, "mrope_section": (3, 3, 2),
        },
        ideogram, kept={"*": NO_GRID},
    ),
    case(
        "JoyImageEditTransformer3DModel",
        {
            "in_channels": 4, "hidden_size": WIDTH, "num_attention_heads": HEADS, "text_dim": 12, "num_layers": 1,
            "rope_dim_list": ROPE,
        },
        joy, sites=(fused_site("double_blocks.0.attn.img_attn_qkv", WIDTH, GRID),),
    ),
    case(
        "JoyImageEditPlusTransformer3DModel",
        {
            "in_channels": 4, "hidden_size": WIDTH, "num_attention_heads": HEADS, "text_dim": 12, "num_layers": 1,
            "rope_dim_list": ROPE,
        },
        joy_plus, kept={"*": NO_GRID},
    ),
    case(
        "Krea2Transformer2DModel",
        {
            "in_channels": 8, "num_layers": 2, "attention_head_dim": HEAD, "num_attention_heads": 4,
            "num_key_value_heads": 2, "intermediate_size": 48, "timestep_embed_dim": 16, "text_hidden_dim": 12,
            "num_text_layers": 3, "text_num_attention_heads": 2, "text_num_key_value_heads": 2,
            "text_intermediate_size": 16, "num_layerwise_text_blocks": 1, "num_refiner_text_blocks": 1,
            "axes_dims_rope": ROPE,
        },
        krea, grid=GRID, sites=pair("transformer_blocks.{}.attn", offset=TEXT, x_offset=TEXT),
        kept={"text_fusion.*": NO_IMAGE},
    ),
    case("NucleusMoEImageTransformer2DModel", NUCLEUS | {"moe_enabled": False}, nucleus,
         sites=pair("transformer_blocks.{}.attn")),
    case("NucleusMoEImageTransformer2DModel-experts", NUCLEUS, nucleus),
    case(
        "OmniGenTransformer2DModel",
        {
            "in_channels": 4, "hidden_size": WIDTH, "num_attention_heads": HEADS, "num_key_value_heads": 1,
            "intermediate_size": 48, "num_layers": 2, "pad_token_id": 0, "vocab_size": 20,
            "max_position_embeddings": 64, "original_max_position_embeddings": 64, "pos_embed_max_size": 8,
            "time_step_dim": 16,
            "rope_scaling": {"short_factor": [1.0] * 8, "long_factor": [1.0] * 8, "type": "su"},
        },
        omnigen,
    ),
    case(
        "PRXTransformer2DModel",
        {"in_channels": 4, "context_in_dim": 12, "hidden_size": WIDTH, "num_heads": HEADS, "depth": 1,
         "axes_dim": [8, 8]},
        prx, grid=GRID,
        sites=(fused_site("blocks.0.attention.img_qkv_proj", WIDTH, GRID, offset=TEXT),),
    ),
    case(
        "QwenImage21Transformer2DModel",
        {
            "in_channels": 8, "out_channels": 8, "num_layers": 2, "attention_head_dim": HEAD,
            "num_attention_heads": HEADS, "context_in_dim": 12, "axes_dims_rope": ROPE,
        },
        qwen21,
    ),
)  # fmt: skip
