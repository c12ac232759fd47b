"""The class-conditional, text and video transformers that the issue names, tiny and random: stock diffusers classes.

All of them scale or shift the norm that their self-attention reads: the metric is what it reads.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    CogVideoXTransformer3DModel,
    DiTTransformer2DModel,
    HunyuanDiT2DModel,
    LatteTransformer3DModel,
    LTXVideoTransformer3DModel,
    LuminaNextDiT2DModel,
    PixArtTransformer2DModel,
    SanaTransformer2DModel,
    WanTransformer3DModel,
)
from diffusers.models.embeddings import (
    get_2d_rotary_pos_embed,
    get_2d_rotary_pos_embed_lumina,
    get_3d_rotary_pos_embed,
)
from torch import Tensor, nn

from tests.zoo import CROSS, Case, lively, site

GRID = (8, 12)
LATENT = (2 * GRID[0], 2 * GRID[1])
TEXT = 5
HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}


def text_mask() -> Tensor:
    """The second sample's text is two tokens shorter."""
    mask = torch.ones(2, TEXT)
    mask[1, 3:] = 0
    return mask


def noisy(channels: int = 4, steps: tuple[float, float] = (7, 900)) -> dict[str, Any]:
    """Image latents for `GRID` at a patch size of 2, and a timestep each."""
    return {"hidden_states": torch.randn(2, channels, *LATENT), "timestep": torch.tensor(steps)}


# ------------------------------------------------------------------------------------- DiT, PixArt, Latte


def dit() -> nn.Module:
    return lively(DiTTransformer2DModel(**HEADS, num_layers=2, sample_size=16, norm_num_groups=4))


def dit_inputs() -> dict[str, Any]:
    sample = torch.randn(2, 4, 16, 16)  # it gives back squares alone
    return {"hidden_states": sample, "timestep": torch.tensor([7, 900]), "class_labels": torch.tensor([3, 700])}


def pixart(alpha: bool) -> nn.Module:
    return lively(
        PixArtTransformer2DModel(
            num_attention_heads=3,  # the size embeddings are thirds
            attention_head_dim=16,
            num_layers=2,
            sample_size=16,
            cross_attention_dim=48,
            caption_channels=12,
            norm_num_groups=4,
            use_additional_conditions=alpha,
        )
    )


def pixart_inputs(alpha: bool) -> dict[str, Any]:
    size = {"resolution": torch.tensor([[64.0, 96.0]] * 2), "aspect_ratio": torch.tensor([[0.67]] * 2)}
    return noisy() | {
        "encoder_hidden_states": torch.randn(2, TEXT, 12),
        "encoder_attention_mask": text_mask(),
        "added_cond_kwargs": size if alpha else {"resolution": None, "aspect_ratio": None},
    }


def latte() -> nn.Module:
    return lively(
        LatteTransformer3DModel(
            **HEADS,
            num_layers=2,
            in_channels=4,
            sample_size=16,
            patch_size=2,
            cross_attention_dim=32,
            caption_channels=12,
            norm_type="ada_norm_single",
            norm_elementwise_affine=False,
            num_embeds_ada_norm=1000,
            activation_fn="gelu-approximate",
            attention_bias=True,
            video_length=3,
        )
    )


def latte_inputs() -> dict[str, Any]:
    sample, text = torch.randn(2, 4, 3, *LATENT), torch.randn(2, TEXT, 12)
    return {"hidden_states": sample, "timestep": torch.tensor([7, 900]), "encoder_hidden_states": text}


# ------------------------------------------------------------------------------------- HunyuanDiT, Lumina


def hunyuan() -> nn.Module:
    return lively(
        HunyuanDiT2DModel(
            **HEADS,
            hidden_size=32,
            num_layers=4,
            in_channels=4,
            patch_size=2,
            sample_size=16,
            mlp_ratio=2,
            cross_attention_dim=12,
            cross_attention_dim_t5=16,
            pooled_projection_dim=8,
            text_len=TEXT,
            text_len_t5=4,
        )
    )


def hunyuan_inputs() -> dict[str, Any]:
    cos, sin = get_2d_rotary_pos_embed(16, ((0, 0), GRID), GRID, use_real=True)
    return noisy(steps=(7.0, 900.0)) | {
        "encoder_hidden_states": torch.randn(2, TEXT, 12),
        "text_embedding_mask": text_mask(),
        "encoder_hidden_states_t5": torch.randn(2, 4, 16),
        "text_embedding_mask_t5": torch.ones(2, 4),
        "image_meta_size": torch.tensor([[96.0, 64, 96, 64, 0, 0]] * 2),
        "style": torch.tensor([0, 0]),
        "image_rotary_emb": (cos, sin),
    }


def lumina() -> nn.Module:
    """Two of its four heads share keys and values; cross-attention is added before the output projection, gated."""
    return lively(
        LuminaNextDiT2DModel(
            sample_size=16,
            hidden_size=32,
            num_layers=2,
            num_attention_heads=4,
            num_kv_heads=2,
            multiple_of=16,
            cross_attention_dim=12,
        )
    )


def lumina_inputs() -> dict[str, Any]:
    return noisy(steps=(0.1, 0.9)) | {
        "encoder_hidden_states": torch.randn(2, TEXT, 12),
        "encoder_mask": text_mask(),
        "image_rotary_emb": get_2d_rotary_pos_embed_lumina(8, 16, 16),
        "cross_attention_kwargs": {},
    }


# ------------------------------------------------------------------------------------- Sana, video


def sana() -> nn.Module:
    return lively(
        SanaTransformer2DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=2,
            num_cross_attention_heads=2,
            cross_attention_head_dim=16,
            cross_attention_dim=32,
            caption_channels=12,
            sample_size=8,
        )
    )


def sana_inputs() -> dict[str, Any]:
    sample = torch.randn(2, 4, *GRID)
    text = {"encoder_hidden_states": torch.randn(2, TEXT, 12), "encoder_attention_mask": text_mask()}
    return {"hidden_states": sample, "timestep": torch.tensor([7, 900])} | text


def wan() -> nn.Module:
    return lively(
        WanTransformer3DModel(
            **HEADS,
            in_channels=4,
            out_channels=4,
            text_dim=12,
            freq_dim=16,
            ffn_dim=32,
            num_layers=2,
            rope_max_seq_len=32,
        )
    )


def wan_inputs() -> dict[str, Any]:
    sample, text = torch.randn(2, 4, 3, *LATENT), torch.randn(2, TEXT, 12)
    return {"hidden_states": sample, "timestep": torch.tensor([7, 900]), "encoder_hidden_states": text}


def cogvideox() -> nn.Module:
    return lively(
        CogVideoXTransformer3DModel(
            **HEADS,
            in_channels=4,
            out_channels=4,
            time_embed_dim=16,
            text_embed_dim=12,
            num_layers=2,
            sample_width=LATENT[1],
            sample_height=LATENT[0],
            sample_frames=9,
            max_text_seq_length=TEXT,
            use_rotary_positional_embeddings=True,
        )
    )


def cogvideox_inputs() -> dict[str, Any]:
    rotary = get_3d_rotary_pos_embed(16, ((0, 0), GRID), GRID, 3)
    sample, text = torch.randn(2, 3, 4, *LATENT), torch.randn(2, TEXT, 12)
    return {
        "hidden_states": sample,
        "encoder_hidden_states": text,
        "timestep": torch.tensor([7, 900]),
        "image_rotary_emb": rotary,
    }


def ltx() -> nn.Module:
    return lively(
        LTXVideoTransformer3DModel(
            **HEADS, in_channels=8, out_channels=8, cross_attention_dim=32, num_layers=2, caption_channels=12
        )
    )


def ltx_inputs() -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(2, 3 * GRID[0] * GRID[1], 8),
        "encoder_hidden_states": torch.randn(2, TEXT, 12),
        "timestep": torch.tensor([7, 900]),
        "encoder_attention_mask": text_mask(),
        "num_frames": 3,
        "height": GRID[0],
        "width": GRID[1],
    }


def blocks(pattern: str, count: int, grid: tuple[int, int] = GRID) -> Any:
    return tuple(site(pattern.format(index), grid) for index in range(count))


PIXART = blocks("transformer_blocks.{}.attn1", 2)
DITS: tuple[Case, ...] = (
    Case("dit", dit, dit_inputs, sites=blocks("transformer_blocks.{}.attn1", 2, (8, 8))),
    Case("pixart-alpha", lambda: pixart(True), lambda: pixart_inputs(True), sites=PIXART, kept=CROSS),
    Case("pixart-sigma", lambda: pixart(False), lambda: pixart_inputs(False), sites=PIXART, kept=CROSS),
    # its spatial blocks see one frame a row of the batch; those in time see one place
    Case("latte", latte, latte_inputs, sites=PIXART, kept=CROSS | {"temporal_transformer_blocks.*": "in its batch"}),
    Case(
        "hunyuan-dit",
        hunyuan,
        hunyuan_inputs,
        sites=blocks("blocks.{}.attn1", 4),
        kept=CROSS | {"time_extra_emb.pooler": "cross-attention"},
    ),
    Case("lumina-next", lumina, lumina_inputs, sites=blocks("layers.{}.attn1", 2), kept=CROSS),
    Case("sana", sana, sana_inputs, kept={"*.attn1": "linear attention", "*.attn2": "cross-attention"}),
    Case("wan", wan, wan_inputs, kept={"*.attn1": "frames", "*.attn2": "cross-attention"}),
    Case("cogvideox", cogvideox, cogvideox_inputs, kept={"*.attn1": "frames"}),
    Case("ltx", ltx, ltx_inputs, kept={"*.attn1": "no grid", "*.attn2": "cross-attention"}),
)
