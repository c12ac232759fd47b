"""Denoisers at their published sizes, on the meta device: what `python -m bigain_fx.bench.architectures` looks at.

Configurations are those of the released weights, inputs those of one call of the family's pipeline for one image or
video at its usual size, with as much text as the pipeline allows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import diffusers
import torch
from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina
from torch import Tensor, nn

from bigain_fx.models import load
from bigain_fx.passes.images import Grid


@dataclass(frozen=True)
class Family:
    """One released denoiser.

    Attributes:
        name: as it is known.
        size: of what it makes, and how much text it reads, in words.
        make: the model, in eval mode, and keyword arguments to call it with, on the meta device.
        grid: of the image tokens, where the graph alone cannot tell.
    """

    name: str
    size: str
    make: Callable[[], tuple[nn.Module, dict[str, Any]]]
    grid: Grid | None = None


def known(name: str, size: int | None = None) -> Callable[[], tuple[nn.Module, dict[str, Any]]]:
    """A configuration that :func:`bigain_fx.models.load` knows."""

    def make() -> tuple[nn.Module, dict[str, Any]]:
        workload = load(name, size=size, batch=1, device="meta")
        return workload.model, workload.kwargs

    return make


def made(name: str, inputs: Callable[[], dict[str, Any]], /, **config: Any) -> Callable[[], Any]:
    """The diffusers class ``name`` with its defaults and ``config``."""
    return partial(_make, name, inputs, config)


def _make(name: str, inputs: Callable[[], dict[str, Any]], config: dict[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    with torch.device("meta"):
        model: nn.Module = getattr(diffusers, name)(**config)
        return model.eval().requires_grad_(False), inputs()


def real(*shape: int) -> Tensor:
    """A tensor of one sample, ``(1, *shape)``, float32."""
    return torch.empty(1, *shape)


def step() -> Tensor:
    """A timestep for one sample, ``(1,)``, float32."""
    return torch.empty(1)


def mask(tokens: int) -> Tensor:
    """``(1, tokens)``: of text, float32."""
    return torch.ones(1, tokens)


def latents(*shape: int, text: tuple[int, int] | None = None, masked: bool = False, **more: Any) -> dict[str, Any]:
    """Inputs of transformers: latents, a timestep, ``text`` as (tokens, channels)."""
    inputs: dict[str, Any] = {"hidden_states": real(*shape), "timestep": step(), **more}
    if text:
        inputs["encoder_hidden_states"] = real(*text)
    if text and masked:
        inputs["encoder_attention_mask"] = mask(text[0])
    return inputs


def unet(*shape: int, **more: Any) -> dict[str, Any]:
    """Inputs of U-Nets."""
    return {"sample": real(*shape), "timestep": step(), **more}


# ------------------------------------------------------------------------------------- U-Nets

SIMPLE = ("SimpleCrossAttnDownBlock2D",) * 3, ("SimpleCrossAttnUpBlock2D",) * 3
KANDINSKY22 = {
    "sample_size": 64, "out_channels": 8, "block_out_channels": (384, 768, 1152, 1536), "layers_per_block": 3,
    "down_block_types": ("ResnetDownsampleBlock2D", *SIMPLE[0]), "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "up_block_types": (*SIMPLE[1], "ResnetUpsampleBlock2D"), "attention_head_dim": 64, "cross_attention_dim": 768,
    "encoder_hid_dim": 1280, "encoder_hid_dim_type": "image_proj", "addition_embed_type": "image",
    "resnet_time_scale_shift": "scale_shift",
}  # fmt: skip
DDPM = {
    "sample_size": 256, "block_out_channels": (128, 128, 256, 256, 512, 512), "attention_head_dim": None,
    "down_block_types": (*("DownBlock2D",) * 4, "AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D", *("UpBlock2D",) * 4),
}  # fmt: skip


def sd_inputs(**more: Any) -> dict[str, Any]:
    """Inputs of Stable Diffusion 1.5 at 512 px."""
    return unet(4, 64, 64, encoder_hidden_states=real(77, 768), **more)


def kandinsky22_inputs() -> dict[str, Any]:
    """A prompt that an image embedding stands for."""
    return unet(4, 64, 64, encoder_hidden_states=None, added_cond_kwargs={"image_embeds": real(1280)})


UNETS = (
    Family("Stable Diffusion 1.5", "512 px, 77 text tokens", made(
        "UNet2DConditionModel", sd_inputs, sample_size=64, cross_attention_dim=768,
    )),
    Family("Stable Diffusion 2", "512 px, 77 text tokens", known("sd2")),
    Family("SDXL", "1024 px, 77 text tokens", known("sdxl")),
    Family("Kandinsky 2.2", "512 px, 32 context tokens", made(
        "UNet2DConditionModel", kandinsky22_inputs, **KANDINSKY22,
    )),
    Family("Kandinsky 3", "1024 px, 128 text tokens", made("Kandinsky3UNet", lambda: unet(
        4, 128, 128, encoder_hidden_states=real(128, 4096), encoder_attention_mask=mask(128),
    ))),
    Family("DDPM (CelebA-HQ)", "256 px", made("UNet2DModel", lambda: unet(3, 256, 256), **DDPM)),
    Family("ControlNet of SD 1.5", "512 px, 77 text tokens", made(
        "ControlNetModel", lambda: sd_inputs(controlnet_cond=real(3, 512, 512)), cross_attention_dim=768,
    )),
)  # fmt: skip

# ------------------------------------------------------------------------------------- DiTs

ADA_SINGLE = {
    "num_layers": 28, "num_attention_heads": 16, "attention_head_dim": 72, "in_channels": 4, "out_channels": 8,
    "patch_size": 2, "cross_attention_dim": 1152, "caption_channels": 4096, "norm_type": "ada_norm_single",
    "norm_elementwise_affine": False, "norm_eps": 1e-6, "attention_bias": True, "activation_fn": "gelu-approximate",
    "num_embeds_ada_norm": 1000,
}  # fmt: skip
HUNYUAN = {
    "num_attention_heads": 16, "attention_head_dim": 88, "in_channels": 4, "patch_size": 2, "sample_size": 128,
    "hidden_size": 1408, "num_layers": 40, "mlp_ratio": 4.3637, "use_style_cond_and_image_meta_size": False,
}  # fmt: skip


def pixart_alpha_inputs() -> dict[str, Any]:
    """The size and the aspect ratio are conditions too."""
    sizes = {"resolution": real(2), "aspect_ratio": real(1)}
    return latents(4, 128, 128, text=(120, 4096), masked=True, added_cond_kwargs=sizes)


def hunyuan_inputs() -> dict[str, Any]:
    """The text of two encoders, and rotary angles from outside."""
    angles = torch.empty(4096, 88), torch.empty(4096, 88)
    return latents(
        4, 128, 128, text=(77, 1024), text_embedding_mask=mask(77), encoder_hidden_states_t5=real(256, 2048),
        text_embedding_mask_t5=mask(256), image_rotary_emb=angles,
    )  # fmt: skip


def lumina_inputs() -> dict[str, Any]:
    """Rotary angles from outside, for the largest grid."""
    angles = get_2d_rotary_pos_embed_lumina(72, 384, 384).to("meta")
    return latents(
        4, 128, 128, text=(256, 2048), encoder_mask=mask(256), image_rotary_emb=angles, cross_attention_kwargs={}
    )


def cogview_inputs() -> dict[str, Any]:
    """The sizes of the image are conditions too."""
    return latents(
        16, 128, 128, text=(224, 4096), original_size=real(2), target_size=real(2), crop_coords=real(2)
    )  # fmt: skip


DITS = (
    Family("DiT-XL/2", "256 px", known("dit-xl-2")),
    Family("DiT-XL/2 (512)", "512 px", known("dit-xl-2", 64)),
    Family("PixArt-alpha", "1024 px, 120 text tokens", made(
        "PixArtTransformer2DModel", pixart_alpha_inputs, caption_channels=4096, interpolation_scale=2,
        use_additional_conditions=True,
    )),
    Family("PixArt-Sigma", "1024 px, 300 text tokens", known("pixart")),
    Family("Latte", "512 px, 16 frames, 120 text tokens", made(
        "LatteTransformer3DModel", lambda: latents(4, 16, 64, 64, text=(120, 4096)), **ADA_SINGLE,
    )),
    Family("Hunyuan-DiT 1.2", "1024 px, 77 + 256 text tokens", made("HunyuanDiT2DModel", hunyuan_inputs, **HUNYUAN)),
    Family("Lumina-Next", "1024 px, 256 text tokens", made(
        "LuminaNextDiT2DModel", lumina_inputs, num_layers=24, num_kv_heads=8,
    )),
    Family("AuraFlow", "1024 px, 256 text tokens", made(
        "AuraFlowTransformer2DModel", lambda: latents(4, 128, 128, text=(256, 2048)),
    )),
    Family("CogView3-Plus", "1024 px, 224 text tokens", made("CogView3PlusTransformer2DModel", cogview_inputs)),
    Family("CogView4", "1024 px, 224 text tokens", made(
        "CogView4Transformer2DModel", cogview_inputs, num_layers=28, num_attention_heads=32, attention_head_dim=128,
    )),
)  # fmt: skip

# ------------------------------------------------------------------------------------- joint attention

SD35 = {"pos_embed_max_size": 192, "qk_norm": "rms_norm"}


def sd3_inputs() -> dict[str, Any]:
    """Two encoders, joined, and their pooled states."""
    return latents(16, 128, 128, text=(333, 4096), pooled_projections=real(2048))


def packed(channels: int, text: tuple[int, int], axes: int = 0, **more: Any) -> dict[str, Any]:
    """Inputs of transformers on packed latents of 1024 px: 64 x 64 tokens, with positions on ``axes`` axes."""
    ids = {"img_ids": torch.empty(4096, axes), "txt_ids": torch.empty(text[0], axes)} if axes else {}
    return latents(4096, channels, text=text) | ids | more


def zimage_inputs() -> dict[str, Any]:
    """Lists of images and of prompts."""
    return {"x": [torch.empty(16, 1, 128, 128)], "t": step(), "cap_feats": [torch.empty(512, 2560)]}


JOINT = (
    Family("Stable Diffusion 3 medium", "1024 px, 333 text tokens", known("sd3")),
    Family("Stable Diffusion 3.5 medium", "1024 px, 333 text tokens", made(
        "SD3Transformer2DModel", sd3_inputs, num_layers=24, num_attention_heads=24, caption_projection_dim=1536,
        pos_embed_max_size=384, qk_norm="rms_norm", dual_attention_layers=tuple(range(13)),
    )),
    Family("Stable Diffusion 3.5 large", "1024 px, 333 text tokens", made(
        "SD3Transformer2DModel", sd3_inputs, num_layers=38, num_attention_heads=38, caption_projection_dim=2432, **SD35,
    )),
    Family("Flux.1 dev", "1024 px, 512 text tokens", known("flux"), (64, 64)),
    Family("Flux.2 dev", "1024 px, 512 text tokens", made(
        "Flux2Transformer2DModel", lambda: packed(128, (512, 15360), 4, guidance=step()),
    ), (64, 64)),
    Family("Chroma", "1024 px, 512 text tokens", made(
        "ChromaTransformer2DModel", lambda: packed(64, (512, 4096), 3, attention_mask=mask(512 + 4096)),
    ), (64, 64)),
    Family("Qwen-Image", "1024 px, 512 text tokens", made(
        "QwenImageTransformer2DModel", lambda: packed(64, (512, 3584), img_shapes=[[(1, 64, 64)]]),
    ), (64, 64)),
    Family("Z-Image", "1024 px, 512 text tokens", made("ZImageTransformer2DModel", zimage_inputs)),
)  # fmt: skip

# ------------------------------------------------------------------------------------- linear attention, video


def cogvideox_inputs() -> dict[str, Any]:
    """49 frames in 13, with rotary angles from outside."""
    angles = torch.empty(13 * 30 * 45, 64), torch.empty(13 * 30 * 45, 64)
    return latents(13, 16, 60, 90, text=(226, 4096), image_rotary_emb=angles)


def ltx_inputs() -> dict[str, Any]:
    """161 frames in 21 of 16 x 22 tokens."""
    return latents(
        21 * 16 * 22, 128, text=(128, 4096), masked=True, num_frames=21, height=16, width=22,
    )  # fmt: skip


def lumina2() -> tuple[nn.Module, dict[str, Any]]:
    """In small and in memory: its shapes depend on the values of its mask."""
    model = diffusers.Lumina2Transformer2DModel(
        in_channels=4, hidden_size=32, num_layers=1, num_refiner_layers=1, num_attention_heads=4, num_kv_heads=2,
        multiple_of=16, axes_dim_rope=(4, 2, 2), axes_lens=(32, 16, 16), cap_feat_dim=12,
    )  # fmt: skip
    text_mask = torch.ones(1, 5, dtype=torch.bool)
    return model.eval(), latents(4, 16, 24, text=(5, 12), encoder_attention_mask=text_mask)


OTHERS = (
    Family("Sana 1.6B", "1024 px, 300 text tokens", made(
        "SanaTransformer2DModel", lambda: latents(32, 32, 32, text=(300, 2304), masked=True),
    )),
    Family("Lumina 2", "in small", lumina2),
    Family("Wan 2.1 14B", "480 x 832 px, 81 frames, 512 text tokens", made(
        "WanTransformer3DModel", lambda: latents(16, 21, 60, 104, text=(512, 4096)),
    )),
    Family("CogVideoX 5B", "480 x 720 px, 49 frames, 226 text tokens", made(
        "CogVideoXTransformer3DModel", cogvideox_inputs, num_attention_heads=48, num_layers=42,
        use_rotary_positional_embeddings=True,
    )),
    Family("LTX-Video", "512 x 704 px, 161 frames, 128 text tokens", made("LTXVideoTransformer3DModel", ltx_inputs)),
)  # fmt: skip

FAMILIES: tuple[Family, ...] = (*UNETS, *DITS, *JOINT, *OTHERS)
