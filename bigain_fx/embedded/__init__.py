"""Small class-conditional denoisers that ship with the package, so that everything runs offline: a DiT and a U-Net of
digits, and of patches of photographs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bigain_fx.passes.checks import told
from bigain_fx.passes.errors import InputError, first_line

NAMES = ("mnist-dit", "mnist-unet", "photo-dit", "photo-unet")
CLASSES = {"mnist": 10, "photo": 14}
LAYERS = {"mnist": 6, "photo": 4}
WEIGHTS = Path(__file__).parent / "weights"

DIT_CONFIG: dict[str, Any] = {
    "sample_size": 32, "in_channels": 1, "out_channels": 1, "patch_size": 2,
    "num_attention_heads": 4, "attention_head_dim": 32,
}  # fmt: skip
UNET_CONFIG: dict[str, Any] = {
    "sample_size": 32, "in_channels": 1, "out_channels": 1, "block_out_channels": (32, 64), "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 64, "attention_head_dim": 2, "norm_num_groups": 8, "use_linear_projection": True,
}  # fmt: skip


@dataclass(frozen=True)
class ClassConditional:
    """A class-conditional denoiser with what is needed to sample from it and to classify with it.

    Attributes:
        name: what it is called on the command line.
        model: the diffusers denoiser, in eval mode; it predicts epsilon.
        scheduler: the diffusers scheduler it was trained with (1,000 steps).
        sample_shape: shape of one latent, ``(C, H, W)``.
        num_classes: classes are ``0 .. num_classes - 1``; ``num_classes`` itself is the unconditional class.
        class_tokens: ``(num_classes + 1, dim)`` or ``(num_classes + 1, tokens, dim)``: the context of each class, for a
            denoiser that attends to one; else None.
        class_labels: ``(num_classes + 1,)`` int64: the labels of a denoiser that numbers its classes otherwise.
    """

    name: str
    model: nn.Module
    scheduler: Any
    sample_shape: tuple[int, int, int]
    num_classes: int = 10
    class_tokens: Tensor | None = None
    class_labels: Tensor | None = None

    def condition(self, labels: Tensor) -> dict[str, Tensor]:
        """Keyword arguments of the denoiser for ``labels (B,)`` int64."""
        if self.class_tokens is not None:
            tokens = self.class_tokens[labels]
            return {"encoder_hidden_states": tokens if tokens.ndim == 3 else tokens[:, None]}
        return {"class_labels": labels if self.class_labels is None else self.class_labels[labels]}


def load(name: str) -> ClassConditional:
    """Load the embedded denoiser ``name``, trained, in eval mode, float32, on the CPU.

    Raises:
        InputError: no denoiser of that name, or its weights are missing.
    """
    from safetensors.torch import load_file

    if name not in NAMES:
        raise InputError(f"{told('name', name)} is not an embedded denoiser; choose {' or '.join(NAMES)}")
    path = WEIGHTS / f"{name}.safetensors"
    if not path.exists():
        raise InputError(f"{path} is missing; reinstall, or train it: python -m bigain_fx.embedded.train {name}")
    denoiser = build(name)
    try:
        tensors = {key: tensor.float() for key, tensor in load_file(path).items()}
        tokens = tensors.pop("tokens", None)
        denoiser.model.load_state_dict(tensors)
    except Exception as error:  # of a file that is damaged
        raise InputError(f"{path} cannot be read ({first_line(error)}); reinstall") from error
    denoiser.model.eval().requires_grad_(False)
    return replace(denoiser, class_tokens=tokens)


def build(name: str) -> ClassConditional:
    """Construct the embedded denoiser ``name`` with freshly initialized weights, in train mode."""
    from diffusers import DDIMScheduler, DiTTransformer2DModel, UNet2DConditionModel

    data, kind = name.split("-")
    classes, shape = CLASSES[data], (1, 32, 32)
    scheduler = DDIMScheduler(num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2", clip_sample=True)
    if kind == "dit":
        model = DiTTransformer2DModel(**DIT_CONFIG, num_layers=LAYERS[data], num_embeds_ada_norm=classes)
        return ClassConditional(name, model, scheduler, shape, classes)
    tokens = nn.Parameter(torch.randn(classes + 1, UNET_CONFIG["cross_attention_dim"]) * 0.5)
    return ClassConditional(name, UNet2DConditionModel(**UNET_CONFIG), scheduler, shape, classes, tokens)
