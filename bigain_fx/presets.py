"""The settings that the paper published, for the families that it used."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from bigain_fx.passes import checks
from bigain_fx.passes.alpha import LinearAlpha
from bigain_fx.passes.errors import InputError
from bigain_fx.passes.methods import KVDownsample, LaplacianMerge, Method
from bigain_fx.passes.where import Where


@dataclass(frozen=True)
class Family:
    """A family of denoisers that the paper used.

    Attributes:
        name: in words.
        kind: class of the denoiser.
        config: what tells the family from others of that class.
        where: the attentions that the paper compresses.
    """

    name: str
    kind: str
    config: Mapping[str, Any]
    where: Where = None

    def has(self, model: object) -> bool:
        """Return whether ``model`` is of this family."""
        config = getattr(model, "config", {})
        return self.kind in {kind.__name__ for kind in model.__class__.__mro__} and all(
            _plain(getattr(config, name, None)) == value for name, value in self.config.items()
        )


FAMILIES = (
    Family("Stable Diffusion 2", "UNet2DConditionModel",
           {"cross_attention_dim": 1024, "block_out_channels": (320, 640, 1280, 1280)}),
    Family("DiT-XL/2", "DiTTransformer2DModel", {"num_layers": 28, "patch_size": 2, "num_attention_heads": 16},
           ("transformer_blocks.[1-57-9].*", "transformer_blocks.1[01].*")),
)  # fmt: skip
KINDS: Mapping[str, Method] = {
    "merge": LaplacianMerge(0.7, window=None),
    "kv": KVDownsample(2, LinearAlpha(noisy=0.8, clean=1.2)),
    "kv-classify": KVDownsample(2, 0.9),
}
"""What the paper does in all of these families: alpha is constant to classify, and follows the timestep to generate."""


def preset(model: object, kind: str = "merge") -> Method:
    """Return the setting that the paper published for the family of ``model``, for :func:`bigain_fx.optimize`.

    The paper's figures are of 512 x 512 pixels: 4,096 tokens for Stable Diffusion 2.0, 1,024 for DiT-XL/2, of whose 28
    blocks its released code compresses ten (arXiv 2603.12240; ``docs/operators.md``, "Published figures").

    Args:
        model: the denoiser, such as ``pipe.unet``.
        kind: ``"merge"``, tokens merge, to generate as to classify; ``"kv"``, keys and values are downsampled, to
            generate; ``"kv-classify"``, the same to classify.

    Raises:
        InputError: the paper used no such family, or has no such setting.
    """
    checks.choice("kind", kind, KINDS)
    family = next((family for family in FAMILIES if family.has(model)), None)
    if family is None:
        there = " and ".join(f"{family.name} ({family.kind})" for family in FAMILIES)
        raise InputError(
            f"model={model.__class__.__name__} is of no family that the paper has settings for, which are {there}; "
            "give a method, as in bigain_fx.LaplacianMerge(0.7)"
        )
    return replace(KINDS[kind], where=family.where)


def _plain(value: object) -> object:
    """Return ``value``, a list as a tuple: configurations that were saved have lists."""
    return tuple(value) if isinstance(value, list) else value
