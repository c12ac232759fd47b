"""Quantizers beside torchao's: each replaces the linear layers of a model's blocks by its own, on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn


def _swap(model: nn.Module, made: Callable[[nn.Linear], nn.Module]) -> None:
    """Replace every linear layer that is inside a list of blocks."""
    blocks = [module for each in model.modules() if isinstance(each, nn.ModuleList) for module in each.modules()]
    for parent in dict.fromkeys(blocks):
        for name, layer in list(parent.named_children()):
            if type(layer) is nn.Linear:
                new = made(layer)
                if layer.bias is not None:
                    new.bias = nn.Parameter(layer.bias.detach().clone(), requires_grad=False)
                setattr(parent, name, new.eval())


def _sizes(layer: nn.Linear) -> tuple[int, int, bool]:
    return layer.in_features, layer.out_features, layer.bias is not None


def bitsandbytes_nf4(model: nn.Module) -> None:
    bnb = pytest.importorskip("bitsandbytes").nn

    def made(layer: nn.Linear) -> Any:
        new = bnb.Linear4bit(*_sizes(layer), compute_dtype=layer.weight.dtype, quant_type="nf4")
        new.weight = bnb.Params4bit(layer.weight.detach().clone(), requires_grad=False, quant_type="nf4")
        # At their first call, some processors pack the weights, which must be whole blocks for that.
        new.support_avx512bf16_for_cpu &= not (layer.in_features % 64 or layer.out_features % 32)
        return new.to("cpu")  # which quantizes

    _swap(model, made)


def bitsandbytes_int8(model: nn.Module) -> None:
    bnb = pytest.importorskip("bitsandbytes").nn

    def made(layer: nn.Linear) -> Any:
        new = bnb.Linear8bitLt(*_sizes(layer), has_fp16_weights=False, threshold=6.0)
        new.weight = bnb.Int8Params(layer.weight.detach().clone(), requires_grad=False, has_fp16_weights=False)
        return new.to("cpu")

    _swap(model, made)


def gguf_q8_0(model: nn.Module) -> None:
    gguf = pytest.importorskip("gguf")
    from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter

    kind = gguf.GGMLQuantizationType.Q8_0

    def made(layer: nn.Linear) -> Any:
        if layer.in_features % 32:  # the size of its blocks
            return layer
        new = GGUFLinear(*_sizes(layer), compute_dtype=layer.weight.dtype)
        packed: Tensor = torch.from_numpy(gguf.quants.quantize(layer.weight.detach().numpy(), kind))
        new.weight = GGUFParameter(packed, quant_type=kind)
        return new

    _swap(model, made)


def quanto(weights: str) -> Callable[[nn.Module], None]:
    def change(model: nn.Module) -> None:
        package = pytest.importorskip("optimum.quanto")
        package.quantize(model, weights=getattr(package, weights))
        package.freeze(model)

    return change


QUANTIZERS: dict[str, Callable[[nn.Module], None]] = {
    "bitsandbytes NF4": bitsandbytes_nf4, "bitsandbytes LLM.int8": bitsandbytes_int8, "GGUF Q8_0": gguf_q8_0,
    "quanto int8": quanto("qint8"), "quanto float8": quanto("qfloat8"),
}  # fmt: skip
