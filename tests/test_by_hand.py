"""The oracle of the zoo itself, where the result was worked out with tensors that really shrink."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests import by_hand, oracle
from tests.zoo import Part, Site
from tests.zoo_checks import BOTH, KV, MERGE, Applied, relative

GRID, TEXT = (4, 4), 3
NEAREST = (5, 7, 13, 15)
"""The bottom-right token of each 2x2 block."""


class Joint(nn.Module):
    """One attention of text and then image tokens, rotated, with a mask of keys."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(8, 8) for _ in range(3))
        self.text = nn.Linear(8, 24)

    def forward(self, x: Tensor, text: Tensor, angles: Tensor, mask: Tensor) -> Tensor:
        """x (2, 16, 8), text (2, 3, 8), angles (2, 19, 4), mask (2, 1, 1, 19) to add -> (2, 19, 8)."""
        return self.attend(self.to_q(x), self.to_k(x), self.to_v(x), text, angles, angles, mask)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, text: Tensor, at_q: Tensor, at_k: Tensor, mask: Tensor) -> Tensor:
        """Attention of image rows q, k and v; ``at_q`` and ``at_k`` are the angles of the text's rows and of theirs."""
        text_q, text_k, text_v = self.text(text).chunk(3, -1)
        q, k = turn(torch.cat([text_q, q], 1), at_q), turn(torch.cat([text_k, k], 1), at_k)
        v = torch.cat([text_v, v], 1)
        return F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], mask)[:, 0]


def turn(x: Tensor, angles: Tensor) -> Tensor:
    """Rotate the pairs (x[..., c], x[..., c + 4])."""
    first, second = x.chunk(2, -1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, first * sin + second * cos], -1)


def rows_of(values: Tensor, image: Tensor) -> Tensor:
    """The text's rows of ``values`` (2, 19, ...) and those of the ``image`` tokens (2, M)."""
    return torch.stack(
        [torch.cat([value[:TEXT], value[TEXT + index]]) for value, index in zip(values, image, strict=True)]
    )


@pytest.mark.parametrize("applied", [MERGE, KV, BOTH], ids=lambda applied: applied.action)
@torch.no_grad()
def test_joint_attention_with_rotary_angles_and_a_mask(applied: Applied) -> None:
    """Angles and mask are those of the representatives, or of nearest(i); text keeps its place."""
    model, x, text = Joint(), torch.randn(2, 16, 8), torch.randn(2, TEXT, 8)
    angles, mask = torch.randn(2, TEXT + 16, 4), torch.zeros(2, 1, 1, TEXT + 16)
    mask[1, ..., 1:TEXT] = -torch.inf
    mask[0, ..., TEXT + 5] = -2.5
    site = Site("attention", Part("to_q"), Part("to_k"), Part("to_v"), GRID, offset=TEXT)
    inputs = {"x": x, "text": text, "angles": angles, "mask": mask}

    merging, sampling = "ratio" in applied.by_hand, "factor" in applied.by_hand
    plan = oracle.merge_plan(x, GRID, (2, 2), 8 if merging else 0)
    queries, at_q = oracle.merge(x, plan), plan.rep
    keys, at_k = queries, plan.rep
    if sampling:
        keys, at_k = oracle.kv_downsample(x, 0.9, GRID, 2), torch.tensor([NEAREST, NEAREST])
    q, k, v = model.to_q(queries), model.to_k(keys), model.to_v(keys)
    bias = rows_of(mask[:, 0, 0], at_k)[:, None, None]
    small = model.attend(q, k, v, text, rows_of(angles, at_q), rows_of(angles, at_k), bias)
    assert small.shape[1] == TEXT + (8 if merging else 16)
    expected = torch.cat([small[:, :TEXT], oracle.unmerge(small[:, TEXT:], plan)], 1)

    assert relative((model(**inputs),), (expected,)) > 0.01
    assert relative((by_hand.run(model, inputs, [site], **applied.by_hand),), (expected,)) <= 1e-6


class Skips(Joint):
    """Projects its keys, and never attends."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return self.to_k(x)  # type: ignore[no-any-return]


def test_a_site_that_does_not_run_is_an_error() -> None:
    site = Site("attention", Part("to_q"), Part("to_k"), Part("to_v"), GRID)
    with pytest.raises(AssertionError, match=r"did not run once: \{'attention': 0\}"):
        by_hand.run(Skips(), {"x": torch.randn(1, 16, 8)}, [site], ratio=0.5)
