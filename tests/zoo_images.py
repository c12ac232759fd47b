"""Denoisers that edit images: the tokens of references come behind those of the noisy image, in one sequence."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.zoo import Case, Site, fused_site, site
from tests.zoo_dits import TEXT
from tests.zoo_named import chroma, flux, flux2, qwen, text

KONTEXT = ((4, 6), (6, 8))
LAYERS = ((4, 6),) * 3
REFERENCES = ((6, 4), (4, 4), (2, 6))


def ids(grids: tuple[tuple[int, int], ...], images: tuple[int, ...], axes: int) -> Tensor:
    """``(N, axes)``: which image, row, column, zeros."""
    found = []
    for (rows, columns), image in zip(grids, images, strict=True):
        for row in range(rows):
            found += [[image, row, column, *[0] * (axes - 3)] for column in range(columns)]
    return torch.tensor(found, dtype=torch.float32)


def inputs(grids: tuple[tuple[int, int], ...]) -> dict[str, Any]:
    tokens = sum(rows * columns for rows, columns in grids)
    return {"hidden_states": torch.randn(2, tokens, 8), "timestep": torch.tensor([0.1, 0.9])} | text()


def kontext_inputs() -> dict[str, Any]:
    positions = {"img_ids": ids(KONTEXT, (0, 1), 3), "txt_ids": torch.zeros(TEXT, 3)}
    return inputs(KONTEXT) | positions | {"pooled_projections": torch.randn(2, 10)}


def flux2_inputs() -> dict[str, Any]:
    """Flux 2 numbers its references 10, 20, and so on, and gives ids to each sample."""
    txt = torch.zeros(TEXT, 4)
    txt[:, 3] = torch.arange(TEXT)
    positions = {"img_ids": ids(REFERENCES, (0, 10, 20), 4).expand(2, -1, -1), "txt_ids": txt.expand(2, -1, -1)}
    return inputs(REFERENCES) | positions | {"guidance": torch.tensor([4.0, 4.0])}


def qwen_inputs() -> dict[str, Any]:
    mask = torch.ones(2, TEXT, dtype=torch.bool)
    mask[1, 3:] = False
    return inputs(KONTEXT) | {
        "encoder_hidden_states_mask": mask,
        "img_shapes": [[(1, *grid) for grid in KONTEXT]] * 2,
    }


def qwen_plus() -> nn.Module:
    """References are modulated as at timestep 0: scale, shift and gate differ from token to token."""
    return qwen(zero_cond_t=True)


def qwen_layered() -> nn.Module:
    return qwen(use_layer3d_rope=True, use_additional_t_cond=True)


def layered_inputs() -> dict[str, Any]:
    """Two layers and the image that they make up, all of one size."""
    given = qwen_inputs() | inputs(LAYERS)
    return given | {"img_shapes": [[(1, *grid) for grid in LAYERS]] * 2, "additional_t_cond": torch.tensor([0, 1])}


def chroma_inputs() -> dict[str, Any]:
    """Ids that tell no grid, and a mask."""
    mask = torch.ones(2, TEXT + 72)
    mask[1, 3:TEXT] = 0
    return inputs(KONTEXT) | {"img_ids": torch.zeros(72, 3), "txt_ids": torch.zeros(TEXT, 3), "attention_mask": mask}


def sites(grids: tuple[tuple[int, int], ...]) -> tuple[Site, ...]:
    """Those of one double and two single blocks, with text before the images."""
    single = (site(f"single_transformer_blocks.{i}.attn", grids, x_offset=TEXT, offset=TEXT) for i in range(2))
    return (site("transformer_blocks.0.attn", grids, offset=TEXT), *single)


FLUX2 = (
    site("transformer_blocks.0.attn", REFERENCES, offset=TEXT),
    *(
        fused_site(f"single_transformer_blocks.{i}.attn.to_qkv_mlp_proj", 32, REFERENCES, x_offset=TEXT, offset=TEXT)
        for i in range(2)
    ),
)
QWEN = tuple(site(f"transformer_blocks.{index}.attn", KONTEXT, offset=TEXT) for index in range(2))
QWEN_LAYERED = tuple(site(f"transformer_blocks.{index}.attn", LAYERS, offset=TEXT) for index in range(2))

IMAGES: tuple[Case, ...] = (
    Case("flux-kontext", flux, kontext_inputs, sites=sites(KONTEXT)),
    Case("flux2-references", flux2, flux2_inputs, sites=FLUX2),
    Case("qwen-image-edit", qwen, qwen_inputs, sites=QWEN),
    Case("qwen-image-edit-plus", qwen_plus, qwen_inputs, sites=QWEN),
    Case("qwen-image-layered", qwen_layered, layered_inputs, sites=QWEN_LAYERED),
    Case("chroma-with-grids", chroma, chroma_inputs, grid=KONTEXT, sites=sites(KONTEXT)),
)
