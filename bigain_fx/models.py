"""Denoisers by name: embedded, from a diffusers folder, or a known configuration without its weights."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bigain_fx.embedded import NAMES
from bigain_fx.embedded import load as load_embedded
from bigain_fx.passes import checks
from bigain_fx.passes.errors import InputError, first_line
from bigain_fx.seeds import seeded

TEXT_TOKENS = {
    "UNet2DConditionModel": 77, "PixArtTransformer2DModel": 300, "SD3Transformer2DModel": 333,
    "FluxTransformer2DModel": 512,
}  # fmt: skip

KNOWN: dict[str, tuple[str, dict[str, Any]]] = {
    "sd2": ("UNet2DConditionModel", {
        "sample_size": 64, "in_channels": 4, "out_channels": 4, "block_out_channels": (320, 640, 1280, 1280),
        "layers_per_block": 2, "attention_head_dim": (5, 10, 20, 20), "cross_attention_dim": 1024,
        "use_linear_projection": True,
    }),
    "sdxl": ("UNet2DConditionModel", {
        "sample_size": 128, "in_channels": 4, "out_channels": 4, "block_out_channels": (320, 640, 1280),
        "layers_per_block": 2,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10), "attention_head_dim": (5, 10, 20), "cross_attention_dim": 2048,
        "use_linear_projection": True, "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    }),
    "dit-xl-2": ("DiTTransformer2DModel", {
        "sample_size": 32, "in_channels": 4, "out_channels": 8, "patch_size": 2, "num_layers": 28,
        "num_attention_heads": 16, "attention_head_dim": 72, "num_embeds_ada_norm": 1000,
    }),
    "pixart": ("PixArtTransformer2DModel", {
        "sample_size": 128, "in_channels": 4, "out_channels": 8, "patch_size": 2, "num_layers": 28,
        "num_attention_heads": 16, "attention_head_dim": 72, "cross_attention_dim": 1152,
        "caption_channels": 4096, "interpolation_scale": 2,
        "use_additional_conditions": False, "norm_type": "ada_norm_single",
    }),
    "sd3": ("SD3Transformer2DModel", {
        "sample_size": 128, "in_channels": 16, "out_channels": 16, "patch_size": 2, "num_layers": 24,
        "num_attention_heads": 24, "attention_head_dim": 64, "caption_projection_dim": 1536,
        "joint_attention_dim": 4096, "pooled_projection_dim": 2048, "pos_embed_max_size": 192,
    }),
    "flux": ("FluxTransformer2DModel", {
        "in_channels": 64, "num_layers": 19, "num_single_layers": 38, "num_attention_heads": 24,
        "attention_head_dim": 128, "joint_attention_dim": 4096, "pooled_projection_dim": 768, "guidance_embeds": True,
        "axes_dims_rope": (16, 56, 56),
    }),
}  # fmt: skip
"""Published configurations: Stable Diffusion 2.0, SDXL 1.0, DiT-XL/2, PixArt-Sigma-XL/2 at 1024 px, Stable Diffusion 3
medium, Flux.1 dev."""

DEPTHS = ("num_layers", "num_single_layers", "transformer_layers_per_block")
"""What configurations call the number of their blocks: of a stack of equal ones, or of each stage of a U-Net."""


@dataclass(frozen=True)
class Workload:
    """A denoiser in eval mode and inputs to call it with: ``model(*args, **kwargs)``.

    ``grid`` is that of packed image tokens: their positions, on the meta device, do not tell it.
    """

    name: str
    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    grid: tuple[int, int] | None = None


def load(
    name: str,
    *,
    size: int | None = None,
    batch: int = 2,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    layers: int | None = None,
) -> Workload:
    """Load the denoiser ``name`` with seeded example inputs.

    Args:
        name: an embedded name, a known configuration (random weights), or a diffusers folder (of a denoiser, or of a
            pipeline that holds one).
        size: side of the latent in pixels; the model's own by default.
        batch: samples a call.
        device: ``"meta"`` gives shapes without memory.
        dtype: of the weights and the inputs.
        seed: of the inputs and of random weights.
        layers: of a known configuration, fewer than it has. Of two kinds of equal blocks the second goes down in
            proportion; of the stages of a U-Net, those that are deeper, so that the finest grid weighs more than it
            does in the full model. The workload is named after it: ``"flux-2layers"``.

    Raises:
        InputError: nothing of that name, a size or a number of layers that does not fit, a class whose inputs are not
            known.
    """
    if size is not None and (not checks.counts(size, most=checks.MANY) or size % 2):
        raise InputError(f"{checks.told('size', size)} must be a positive even number of latent pixels")
    checks.integer("batch", batch, least=1, most=checks.MANY)
    fewer = _fewer_layers(name, layers) if layers is not None else {}
    with seeded(seed, device):
        if name in NAMES:
            model = load_embedded(name).model.to(device)
            _check_position_size(name, model, size)
        elif name in KNOWN:
            class_name, config = KNOWN[name]
            config = config | fewer | ({"sample_size": size} if size and "sample_size" in config else {})
            with torch.device(device):
                model = _class(class_name)(**config)
        elif os.path.isdir(name):
            model = _from_folder(Path(name)).to(device)
            _check_position_size(name, model, size)
        else:
            raise InputError(
                f"{checks.told('model', name)} is neither a folder nor one of {', '.join((*NAMES, *KNOWN))}"
            )
        # diffusers' own .to() warns about modules to keep in float32 even where a class has none.
        model = nn.Module.to(model, dtype).eval().requires_grad_(False)
        size = size or _own_size(model)
        grid = (size // 2, size // 2) if type(model).__name__ == "FluxTransformer2DModel" else None
        return Workload(name + f"-{layers}layers" * bool(fewer), model, (), example_inputs(model, size, batch), grid)


def check_device(name: str) -> None:
    """Refuse a device that torch does not see.

    Raises:
        InputError: with its name.
    """
    checks.choice("device", name, ("cpu", "cuda"))
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("device='cuda': torch sees no CUDA device here; use --device cpu")


def _fewer_layers(name: str, layers: int) -> dict[str, Any]:
    """The depths of ``name`` with ``layers`` in place of the largest of the first kind."""
    config = KNOWN[name][1] if name in KNOWN else {}
    depths = {key: config[key] for key in DEPTHS if key in config}
    if not depths:
        deep = ", ".join(known for known, (_, config) in KNOWN.items() if {*DEPTHS} & {*config})
        raise InputError(f"layers={layers!r}: {name} is not one of {deep}, of which there can be fewer")
    first = next(iter(depths.values()))
    most = first if isinstance(first, int) else max(first)
    if not 1 <= layers <= most:
        raise InputError(f"layers={layers!r} must lie between 1 and {most}, which {name} has")
    return {
        key: max(1, depth * layers // most) if isinstance(depth, int) else tuple(min(each, layers) for each in depth)
        for key, depth in depths.items()
    }


def example_inputs(model: nn.Module, size: int, batch: int) -> dict[str, Any]:
    """Keyword arguments to call ``model`` with: ``batch`` latents of ``size`` by ``size``, random conditions.

    Raises:
        InputError: a class whose inputs are not known.
    """
    make = _INPUTS.get(type(model).__name__)
    if make is None:
        known = ", ".join(_INPUTS)
        raise InputError(
            f"{type(model).__name__} has no known example inputs ({known} have); in Python, pass args to optimize()"
        )
    weight = next(model.parameters())
    inputs: dict[str, Any] = make(model.config, size, batch)
    cast: dict[str, Any] = _cast(inputs, weight.device, weight.dtype)
    return cast


def _unet_inputs(config: Any, size: int, batch: int) -> dict[str, Any]:
    inputs: dict[str, Any] = {
        "sample": torch.randn(batch, config.in_channels, size, size),
        "timestep": torch.tensor(500),
        "encoder_hidden_states": torch.randn(batch, TEXT_TOKENS["UNet2DConditionModel"], config.cross_attention_dim),
    }
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        sizes = torch.tensor([8.0 * size, 8.0 * size, 0, 0, 8.0 * size, 8.0 * size]).expand(batch, -1)
        inputs["added_cond_kwargs"] = {"text_embeds": torch.randn(batch, pooled), "time_ids": sizes}
    return inputs


def _dit_inputs(config: Any, size: int, batch: int) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(batch, config.in_channels, size, size),
        "timestep": torch.full((batch,), 500),
        "class_labels": torch.arange(batch) % config.num_embeds_ada_norm,
    }


def _pixart_inputs(config: Any, size: int, batch: int) -> dict[str, Any]:
    tokens = TEXT_TOKENS["PixArtTransformer2DModel"]
    inputs: dict[str, Any] = {
        "hidden_states": torch.randn(batch, config.in_channels, size, size),
        "encoder_hidden_states": torch.randn(batch, tokens, config.caption_channels),
        "timestep": torch.full((batch,), 500),
        "encoder_attention_mask": torch.ones(batch, tokens),
    }
    if config.use_additional_conditions or (config.use_additional_conditions is None and config.sample_size == 128):
        shape = torch.tensor([[8.0 * size, 8.0 * size]]).expand(batch, -1)
        inputs["added_cond_kwargs"] = {"resolution": shape, "aspect_ratio": torch.ones(batch, 1)}
    return inputs


def _sd3_inputs(config: Any, size: int, batch: int) -> dict[str, Any]:
    text = torch.randn(batch, TEXT_TOKENS["SD3Transformer2DModel"], config.joint_attention_dim)
    return {
        "hidden_states": torch.randn(batch, config.in_channels, size, size),
        "encoder_hidden_states": text,
        "pooled_projections": torch.randn(batch, config.pooled_projection_dim),
        "timestep": torch.full((batch,), 500.0),
    }


def _flux_inputs(config: Any, size: int, batch: int) -> dict[str, Any]:
    """Latents packed two by two, as the pipeline packs them."""
    side, text = size // 2, TEXT_TOKENS["FluxTransformer2DModel"]
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    inputs: dict[str, Any] = {
        "hidden_states": torch.randn(batch, side * side, config.in_channels),
        "encoder_hidden_states": torch.randn(batch, text, config.joint_attention_dim),
        "pooled_projections": torch.randn(batch, config.pooled_projection_dim),
        "timestep": torch.full((batch,), 0.5),
        "img_ids": torch.stack([torch.zeros_like(rows), rows, columns], -1).reshape(-1, 3).float(),
        "txt_ids": torch.zeros(text, 3),
    }
    if config.guidance_embeds:
        inputs["guidance"] = torch.full((batch,), 3.5)
    return inputs


_INPUTS: dict[str, Callable[[Any, int, int], dict[str, Any]]] = {
    "UNet2DConditionModel": _unet_inputs,
    "DiTTransformer2DModel": _dit_inputs,
    "PixArtTransformer2DModel": _pixart_inputs,
    "SD3Transformer2DModel": _sd3_inputs,
    "FluxTransformer2DModel": _flux_inputs,
}


def _cast(value: Any, device: torch.device, dtype: torch.dtype) -> Any:
    if isinstance(value, dict):
        return {key: _cast(item, device, dtype) for key, item in value.items()}
    assert isinstance(value, Tensor)
    return value.to(device, dtype if value.is_floating_point() else None)


def _class(name: str) -> type[nn.Module]:
    import diffusers

    found: type[nn.Module] | None = getattr(diffusers, name, None)
    if found is None:
        raise InputError(f"class {name!r} is not in diffusers {diffusers.__version__}")
    return found


def _from_folder(folder: Path) -> nn.Module:
    """The denoiser saved in ``folder``, or in the ``unet`` or ``transformer`` folder of a pipeline there."""
    for candidate in (folder, folder / "unet", folder / "transformer"):
        config = candidate / "config.json"
        if config.is_file():
            try:
                class_name = json.loads(config.read_text())["_class_name"]
                model: nn.Module = _class(class_name).from_pretrained(candidate, local_files_only=True)  # type: ignore[attr-defined]
            except (KeyError, ValueError, TypeError, OSError, RecursionError) as error:
                raise InputError(f"model={str(folder)!r} cannot be loaded: {first_line(error)}") from error
            return model
    raise InputError(f"model={str(folder)!r} holds no config.json of a denoiser, nor a unet or transformer folder")


def _own_size(model: Any) -> int:
    """Of the latent; Flux does not say, its pipeline takes 128."""
    return int(getattr(model.config, "sample_size", 128))


def _check_position_size(name: str, model: nn.Module, size: int | None) -> None:
    """A loaded DiT has a learned-size table of positions: refuse another size with a reason."""
    if size and type(model).__name__ == "DiTTransformer2DModel" and size != _own_size(model):
        raise InputError(f"size={size!r}: {name} has positions for {_own_size(model)} only")
