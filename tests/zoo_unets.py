"""The U-Nets that the issue names, tiny and random: stock diffusers classes, and an attention in windows of our own."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ControlNetModel, Kandinsky3UNet, UNet2DConditionModel, UNet2DModel
from diffusers.models.attention_processor import SlicedAttnProcessor
from torch import Tensor, nn

from tests.zoo import CROSS, Case, Site, fused_site, lively, site

FINE, COARSE = (8, 12), (4, 6)
TEXT = 5


def transformer(name: str, depth: int, grid: tuple[int, int]) -> tuple[Site, ...]:
    """The self-attentions of one ``Transformer2DModel``: its blocks norm the residual stream by a plain layer norm."""
    blocks = [f"{name}.transformer_blocks.{index}" for index in range(depth)]
    return tuple(site(f"{block}.attn1", grid, f"{block}.norm1") for block in blocks)


def conditional(**options: Any) -> nn.Module:
    """A ``UNet2DConditionModel`` of two levels, the finer with attention, and a middle block with attention."""
    defaults: dict[str, Any] = {
        "sample_size": 8,
        "block_out_channels": (16, 32),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 1,
        "cross_attention_dim": 12,
        "attention_head_dim": 2,
        "norm_num_groups": 4,
    }
    return lively(UNet2DConditionModel(**defaults | options))


def latents(channels: int = 4, size: tuple[int, int] = FINE) -> dict[str, Any]:
    """Inputs of every U-Net: a batch of two with a timestep each."""
    return {"sample": torch.randn(2, channels, *size), "timestep": torch.tensor([7, 900])}


def with_text() -> dict[str, Any]:
    return latents() | {"encoder_hidden_states": torch.randn(2, TEXT, 12)}


SD_SITES = (
    *transformer("down_blocks.0.attentions.0", 1, FINE),
    *transformer("mid_block.attentions.0", 1, COARSE),
    *transformer("up_blocks.1.attentions.0", 1, FINE),
    *transformer("up_blocks.1.attentions.1", 1, FINE),
)


def sd_fused() -> nn.Module:
    model = conditional()
    model.fuse_qkv_projections()  # type: ignore[operator]
    return model


SD_FUSED_SITES = tuple(
    fused_site(f"{found.name}.to_qkv", 16 if found.grid == FINE else 32, found.grid, found.norm) for found in SD_SITES
)

# ------------------------------------------------------------------------------------- SDXL: depths 1 and 2


def sdxl() -> nn.Module:
    return conditional(
        block_out_channels=(8, 16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1, 2),
        attention_head_dim=(2, 2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=10 + 6 * 4,
    )


def sdxl_inputs() -> dict[str, Any]:
    added = {"text_embeds": torch.randn(2, 10), "time_ids": torch.tensor([[96.0, 64, 0, 0, 96, 64]] * 2)}
    text = torch.randn(2, TEXT, 12)
    return latents(size=(16, 24)) | {"encoder_hidden_states": text, "added_cond_kwargs": added}


SDXL_SITES = (
    *transformer("down_blocks.1.attentions.0", 1, FINE),
    *transformer("down_blocks.2.attentions.0", 2, COARSE),
    *transformer("mid_block.attentions.0", 2, COARSE),
    *transformer("up_blocks.0.attentions.0", 2, COARSE),
    *transformer("up_blocks.0.attentions.1", 2, COARSE),
    *transformer("up_blocks.1.attentions.0", 1, FINE),
    *transformer("up_blocks.1.attentions.1", 1, FINE),
)

# ------------------------------------------------------------------------------------- Kandinsky

PRIOR_TEXT = 32  # rows of context that ``encoder_hid_dim_type="image_proj"`` makes of one image embedding


def kandinsky22() -> nn.Module:
    return conditional(
        out_channels=8,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        attention_head_dim=4,
        encoder_hid_dim=14,
        encoder_hid_dim_type="image_proj",
        addition_embed_type="image",
        resnet_time_scale_shift="scale_shift",
    )


def kandinsky22_inputs() -> dict[str, Any]:
    size = (2 * FINE[0], 2 * FINE[1])
    return latents(size=size) | {
        "encoder_hidden_states": None,
        "added_cond_kwargs": {"image_embeds": torch.randn(2, 14)},
    }


def added_kv(name: str) -> Site:
    """Queries are of image tokens, keys and values of the context and then the image; the attention has the norm."""
    return site(name, FINE, f"{name}.group_norm", offset=PRIOR_TEXT)


KANDINSKY22_SITES = tuple(
    added_kv(name)
    for name in (
        "down_blocks.1.attentions.0",
        "mid_block.attentions.0",
        "up_blocks.0.attentions.0",
        "up_blocks.0.attentions.1",
    )
)


def kandinsky3() -> nn.Module:
    return lively(
        Kandinsky3UNet(
            in_channels=4,
            time_embedding_dim=16,
            groups=4,
            attention_head_dim=8,
            layers_per_block=2,
            block_out_channels=(16, 32),
            cross_attention_dim=12,
            encoder_hid_dim=14,
        )
    )


def kandinsky3_inputs() -> dict[str, Any]:
    mask = torch.ones(2, TEXT)
    mask[1, 3:] = 0
    return latents() | {"encoder_hidden_states": torch.randn(2, TEXT, 14), "encoder_attention_mask": mask}


# a scale and a shift follow each group norm: the metric is what the attention reads
KANDINSKY3_SITES = (
    site("down_blocks.1.attentions.0.attention", COARSE),
    site("up_blocks.0.attentions.0.attention", COARSE),
    site("up_blocks.1.attentions.0.attention", FINE),
)

# ------------------------------------------------------------------------------------- UNet2DModel, ControlNet


def unet2d() -> nn.Module:
    return lively(
        UNet2DModel(
            sample_size=8,
            in_channels=3,
            out_channels=3,
            block_out_channels=(16, 32),
            down_block_types=("AttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "AttnUpBlock2D"),
            layers_per_block=1,
            attention_head_dim=8,
            norm_num_groups=4,
        )
    )


UNET2D_SITES = tuple(
    site(name, grid, f"{name}.group_norm")
    for name, grid in (
        ("down_blocks.0.attentions.0", FINE),
        ("mid_block.attentions.0", COARSE),
        ("up_blocks.1.attentions.0", FINE),
        ("up_blocks.1.attentions.1", FINE),
    )
)


def controlnet() -> nn.Module:
    return lively(
        ControlNetModel(
            block_out_channels=(16, 32),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            layers_per_block=1,
            cross_attention_dim=12,
            attention_head_dim=2,
            norm_num_groups=4,
            conditioning_embedding_out_channels=(8, 16),
        )
    )


def controlnet_inputs() -> dict[str, Any]:
    return with_text() | {"controlnet_cond": torch.randn(2, 3, 2 * FINE[0], 2 * FINE[1]), "conditioning_scale": 0.8}


# ------------------------------------------------------------------------------------- attentions that stay


def sliced() -> nn.Module:
    model = conditional()
    model.set_attn_processor(SlicedAttnProcessor(slice_size=1))  # type: ignore[operator]
    return model


class WindowAttention(nn.Module):
    """Self-attention within windows of 4x4 tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.to_qkv, self.to_out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, tokens: Tensor, rows: int, columns: int) -> Tensor:
        batch = len(tokens)
        qkv = self.to_qkv(tokens).view(batch, rows // 4, 4, columns // 4, 4, 3, 2, 8)
        q, k, v = qkv.permute(5, 0, 1, 3, 6, 2, 4, 7).reshape(3, -1, 2, 16, 8).unbind(0)
        out = F.scaled_dot_product_attention(q, k, v)
        out = out.view(batch, rows // 4, columns // 4, 2, 4, 4, 8).permute(0, 1, 4, 2, 5, 3, 6)
        return self.to_out(out.reshape(tokens.shape))  # type: ignore[no-any-return]


class Windows(nn.Module):
    """Attention within windows, on the residual stream of a patch embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Conv2d(4, 16, 1), nn.Conv2d(16, 4, 1)
        self.norm, self.attention = nn.LayerNorm(16), WindowAttention()

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        residual = self.embed(sample) + timestep.float()[:, None, None, None] / 1000
        tokens = residual.flatten(2).transpose(1, 2)
        tokens = tokens + self.attention(self.norm(tokens), *residual.shape[2:])
        return self.head(tokens.transpose(1, 2).reshape(residual.shape))  # type: ignore[no-any-return]


UNETS: tuple[Case, ...] = (
    Case("sd1", conditional, with_text, sites=SD_SITES, kept=CROSS),
    Case(
        "sd2",
        lambda: conditional(use_linear_projection=True, attention_head_dim=(2, 4)),
        with_text,
        sites=SD_SITES,
        kept=CROSS,
    ),
    Case("sd1-fused", sd_fused, with_text, sites=SD_FUSED_SITES, kept=CROSS),
    Case("sdxl", sdxl, sdxl_inputs, sites=SDXL_SITES, kept=CROSS),
    Case("kandinsky-2.2", kandinsky22, kandinsky22_inputs, sites=KANDINSKY22_SITES),
    Case(
        "kandinsky-3",
        kandinsky3,
        kandinsky3_inputs,
        sites=KANDINSKY3_SITES,
        kept={"*.attentions.1.attention": "cross-attention", "*.attentions.2.attention": "cross-attention",
              "add_time_condition.attention": "cross-attention"},
    ),
    Case("unet2d", unet2d, lambda: latents(3), sites=UNET2D_SITES),
    Case(
        "controlnet", controlnet, controlnet_inputs,
        sites=(*transformer("down_blocks.0.attentions.0", 1, FINE), *transformer("mid_block.attentions.0", 1, COARSE)),
        kept=CROSS,
    ),
    Case("sliced", sliced, with_text, kept={"*.attn1": "softmax", "*.attn2": "softmax"}),
    Case("windows", lambda: lively(Windows()), latents, kept={"attention": "tokens are split"}),
)  # fmt: skip
