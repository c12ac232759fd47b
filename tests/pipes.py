"""Stock diffusers pipelines with tiny random parts, and one way to call each."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    FluxKontextPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

import bigain_fx as bgx

Size = tuple[int, int]
SMALL, WIDE = (16, 16), (16, 32)
TEXT = 5  # tokens of a prompt that is given as embeddings


@dataclass(frozen=True)
class Pipe:
    """One pipeline.

    Attributes:
        name: pytest id.
        build: makes it, in float32, in eval mode, with seeded random weights that are large enough to matter.
        arguments: ``(pipe, size, guidance)`` to the arguments of its call; size is ``(height, width)`` in pixels.
        sites: of each component that ``bgx.optimize`` takes the place of, the attentions that a method rewrites,
            found by reading the model: those of the finest grid, in the order of their calls.
        guidance_graphs: how many graphs of each part a call without guidance adds to those of one with it.
        options: which of ``callback_on_step_end`` and ``num_images_per_prompt`` its call takes.
        sizes: whether its call takes a height and a width.
    """

    name: str
    build: Callable[[], Any]
    arguments: Callable[[Any, Size, bool], dict[str, Any]]
    sites: Mapping[str, tuple[str, ...]]
    guidance_graphs: int = 1
    options: frozenset[str] = field(default=frozenset({"callback_on_step_end", "num_images_per_prompt"}))
    sizes: bool = True

    def __str__(self) -> str:
        return self.name


def ready(module: nn.Module) -> Any:
    """In eval mode, frozen, with biases that are not zero and attentions that weigh more."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
            elif ".attn" in name:
                parameter.mul_(2)
    return module.eval().requires_grad_(False)


def vae(channels: int = 4, levels: int = 1) -> Any:
    return ready(AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=channels, block_out_channels=(8,) * levels, norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * levels, up_block_types=("UpDecoderBlock2D",) * levels,
        sample_size=16, shift_factor=0.1,
    ))  # fmt: skip


UNET: Mapping[str, Any] = {
    "block_out_channels": (16, 32), "layers_per_block": 1, "cross_attention_dim": 16,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "attention_head_dim": 2, "norm_num_groups": 4,
}  # fmt: skip


def unet(in_channels: int = 4) -> Any:
    return ready(UNet2DConditionModel(
        **UNET, sample_size=16, in_channels=in_channels, out_channels=4,
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ))  # fmt: skip


def controlnet() -> Any:
    model = ready(ControlNetModel(**UNET, in_channels=4, conditioning_embedding_out_channels=(8,)))
    for convolution in [*model.controlnet_down_blocks, model.controlnet_mid_block]:
        nn.init.normal_(convolution.weight, std=0.1)
    return model


def text_encoder() -> Any:
    return ready(CLIPTextModel(CLIPTextConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=8, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )))  # fmt: skip


def tokenizer() -> Any:
    """One token a letter."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    with tempfile.TemporaryDirectory() as folder:
        vocabulary, merges = Path(folder, "vocab.json"), Path(folder, "merges.txt")
        vocabulary.write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
        merges.write_text("#version: 0.2\n")
        return CLIPTokenizer(str(vocabulary), str(merges), model_max_length=8)


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


STABLE: Mapping[str, Any] = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
NO_TEXT: Mapping[str, Any] = {"text_encoder": None, "tokenizer": None}


def ddim() -> Any:
    return DDIMScheduler(clip_sample=False, steps_offset=1)


def text_to_image() -> Any:
    return quiet(StableDiffusionPipeline(
        vae=vae(), text_encoder=text_encoder(), tokenizer=tokenizer(), unet=unet(), scheduler=ddim(), **STABLE
    ))  # fmt: skip


def image_to_image() -> Any:
    return quiet(StableDiffusionImg2ImgPipeline(vae=vae(), unet=unet(), scheduler=ddim(), **NO_TEXT, **STABLE))


def inpainting() -> Any:
    return quiet(StableDiffusionInpaintPipeline(vae=vae(), unet=unet(9), scheduler=ddim(), **NO_TEXT, **STABLE))


def with_controlnet() -> Any:
    return quiet(StableDiffusionControlNetPipeline(
        vae=vae(), unet=unet(), controlnet=controlnet(), scheduler=ddim(), **NO_TEXT, **STABLE
    ))  # fmt: skip


def sdxl() -> Any:
    model = UNet2DConditionModel(
        sample_size=16, in_channels=4, out_channels=4, block_out_channels=(16, 32), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), transformer_layers_per_block=(1, 2),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=16, attention_head_dim=(2, 4),
        use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=4, norm_num_groups=4,
        projection_class_embeddings_input_dim=6 * 4 + 16,
    )  # fmt: skip
    return quiet(StableDiffusionXLPipeline(
        vae=vae(), text_encoder_2=None, tokenizer_2=None, unet=ready(model), scheduler=ddim(), add_watermarker=False,
        **NO_TEXT,
    ))  # fmt: skip


def sd3() -> Any:
    model = SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=16, caption_projection_dim=16, pooled_projection_dim=16, out_channels=4,
        pos_embed_max_size=32,
    )  # fmt: skip
    return quiet(StableDiffusion3Pipeline(
        transformer=ready(model), scheduler=FlowMatchEulerDiscreteScheduler(), vae=vae(), text_encoder_2=None,
        tokenizer_2=None, text_encoder_3=None, tokenizer_3=None, **NO_TEXT,
    ))  # fmt: skip


def flux(kind: Any = FluxPipeline) -> Any:
    model = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, pooled_projection_dim=16, guidance_embeds=True, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    return quiet(kind(
        transformer=ready(model), scheduler=FlowMatchEulerDiscreteScheduler(), vae=vae(), text_encoder_2=None,
        tokenizer_2=None, **NO_TEXT,
    ))  # fmt: skip


def kontext() -> Any:
    """Flux that edits an image, whose latents come behind the noisy ones."""
    return flux(FluxKontextPipeline)


def pixart() -> Any:
    model = PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=16,
        cross_attention_dim=16, caption_channels=16,
    )  # fmt: skip
    return quiet(PixArtAlphaPipeline(vae=vae(), transformer=ready(model), scheduler=ddim(), **NO_TEXT))


def class_dit() -> Any:
    model = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=16,
        num_embeds_ada_norm=1000,
    )  # fmt: skip
    return quiet(DiTPipeline(transformer=ready(model), vae=vae(), scheduler=ddim()))


def scaled(size: Size, guidance: bool) -> dict[str, Any]:
    return {"height": size[0], "width": size[1], "guidance_scale": 5.0 if guidance else 1.0}


def prompts(pipe: Any, guidance: bool, *, pooled: bool = False, mask: bool = False) -> dict[str, Any]:
    """Embeddings ``(1, TEXT, 16)`` in the denoiser's dtype, of a prompt and with guidance of a negative one."""
    dtype = (pipe.unet if hasattr(pipe, "unet") else pipe.transformer).dtype
    given: dict[str, Any] = {}
    for seed, prefix in enumerate(("", "negative_") if guidance else ("",)):
        given[f"{prefix}prompt_embeds"] = normal(1, TEXT, 16, seed=seed).to(dtype)
        if pooled:
            given[f"{prefix}pooled_prompt_embeds"] = normal(1, 16, seed=seed + 2).to(dtype)
        if mask:
            given[f"{prefix}prompt_attention_mask"] = (torch.arange(TEXT) < 3 + seed)[None].to(dtype)
    return given


def picture(size: Size, channels: int = 3) -> Tensor:
    return normal(1, channels, *size, seed=9).sigmoid()


def text_arguments(pipe: Any, size: Size, guidance: bool) -> dict[str, Any]:
    return {"prompt": "a cat", "negative_prompt": "dogs", **scaled(size, guidance)}


def plain_arguments(pipe: Any, size: Size, guidance: bool) -> dict[str, Any]:
    return prompts(pipe, guidance) | scaled(size, guidance)


def image_arguments(pipe: Any, size: Size, guidance: bool) -> dict[str, Any]:
    given = plain_arguments(pipe, size, guidance) | {"image": picture(size), "strength": 0.7}
    return {name: value for name, value in given.items() if name not in ("height", "width")}


def inpainting_arguments(pipe: Any, size: Size, guidance: bool) -> dict[str, Any]:
    mask = (torch.arange(size[1]) < size[1] // 2).float().expand(1, 1, *size)
    return plain_arguments(pipe, size, guidance) | {"image": picture(size), "mask_image": mask, "strength": 1.0}


def controlnet_arguments(pipe: Any, size: Size, guidance: bool) -> dict[str, Any]:
    return plain_arguments(pipe, size, guidance) | {"image": picture(size)}


def pooled_arguments(pipe: Any, size: Size, guidance: bool) -> dict[str, Any]:
    return prompts(pipe, guidance, pooled=True) | scaled(size, guidance)


def flux_arguments(pipe: Any, size: Size, guidance: bool) -> dict[str, Any]:
    """Guidance is a second call of the same shapes here, beside the embedded scale, which is always an input."""
    scales = {"guidance_scale": 3.5, "true_cfg_scale": 2.0 if guidance else 1.0}
    return prompts(pipe, guidance, pooled=True) | {"height": size[0], "width": size[1], **scales}


def kontext_arguments(pipe: Any, size: Size, guidance: bool) -> dict[str, Any]:
    """The image to edit is of another size than the result."""
    given = flux_arguments(pipe, size, guidance) | {"image": picture((size[0] + 8, size[1] - 8)), "_auto_resize": False}
    return given | {"max_area": size[0] * size[1]}


def pixart_arguments(pipe: Any, size: Size, guidance: bool) -> dict[str, Any]:
    options = {"negative_prompt": None, "use_resolution_binning": False}
    return prompts(pipe, guidance, mask=True) | scaled(size, guidance) | options


def class_arguments(pipe: Any, size: Size, guidance: bool) -> dict[str, Any]:
    return {"class_labels": [1, 2], "guidance_scale": 4.0 if guidance else 1.0}


def attn1(*blocks: str) -> tuple[str, ...]:
    return tuple(f"{block}.transformer_blocks.0.attn1" for block in blocks)


DOWN, UP = attn1("down_blocks.0.attentions.0"), attn1("up_blocks.1.attentions.0", "up_blocks.1.attentions.1")
SDXL_SITES = tuple(
    f"{block}.transformer_blocks.{layer}.attn1"
    for block in (
        "down_blocks.1.attentions.0",
        "mid_block.attentions.0",
        *("up_blocks.0.attentions." + n for n in "01"),
    )
    for layer in (0, 1)
)
DIT_SITES = {"transformer": ("transformer_blocks.0.attn1", "transformer_blocks.1.attn1")}
IMAGES_ONLY = frozenset({"num_images_per_prompt"})

PIPES = (
    Pipe("sd", text_to_image, text_arguments, {"unet": DOWN + UP}),
    Pipe("img2img", image_to_image, image_arguments, {"unet": DOWN + UP}),
    Pipe("inpainting", inpainting, inpainting_arguments, {"unet": DOWN + UP}),
    Pipe("controlnet", with_controlnet, controlnet_arguments, {"unet": DOWN + UP, "controlnet": DOWN}),
    Pipe("sdxl", sdxl, pooled_arguments, {"unet": SDXL_SITES}),
    Pipe("sd3", sd3, pooled_arguments, {"transformer": ("transformer_blocks.0.attn", "transformer_blocks.1.attn")}),
    Pipe("flux", flux, flux_arguments,
         {"transformer": ("transformer_blocks.0.attn", "single_transformer_blocks.0.attn")}, guidance_graphs=0),
    Pipe("kontext", kontext, kontext_arguments,
         {"transformer": ("transformer_blocks.0.attn", "single_transformer_blocks.0.attn")}, guidance_graphs=0),
    Pipe("pixart", pixart, pixart_arguments, DIT_SITES, options=IMAGES_ONLY),
    Pipe("dit", class_dit, class_arguments, DIT_SITES, options=frozenset(), sizes=False),
)  # fmt: skip
BY_NAME = {case.name: case for case in PIPES}


def built(case: Pipe) -> Any:
    """The pipeline, with the same weights at every call."""
    torch.manual_seed(0)
    return case.build()


def optimized(case: Pipe, pipe: Any, method: Any, backend: Any = "eager") -> Any:
    """``pipe`` itself, with ``bgx.optimize`` of its denoisers in their places."""
    for part in case.sites:
        setattr(pipe, part, bgx.optimize(getattr(pipe, part), method=method, backend=backend))
    return pipe


def run(case: Pipe, pipe: Any, *, size: Size = SMALL, guidance: bool = True, steps: int = 2, **options: Any) -> Tensor:
    """The images ``(n, height, width, 3)`` of one seeded call, as float32 between 0 and 1."""
    arguments = case.arguments(pipe, size, guidance) | options
    generator = torch.Generator().manual_seed(0)
    images = pipe(num_inference_steps=steps, generator=generator, output_type="np", **arguments).images
    return torch.from_numpy(np.asarray(images))
