"""``export_onnx`` of every family: dense it is the model, and with a method what torch makes of the same graph."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

import bigain_fx as bgx
from tests.zoo import Case
from tests.zoo_checks import BOTH, load, one_thread, relative, tensors
from tests.zoo_more import MORE
from tests.zoo_named import NAMED

REFUSED: dict[str, str] = {}
"""Name of a case -> a part of the error that says why there is no file of it."""
FAST = ("qwen-image", "lumina-next", "HiDreamImageTransformer2DModel-packed")
TOLERANCE = 1e-4


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def each(cases: tuple[Case, ...]) -> pytest.MarkDecorator:
    marks = [pytest.param(case, marks=[] if case.name in FAST else pytest.mark.slow, id=case.name) for case in cases]
    return pytest.mark.parametrize("case", marks)


def export(case: Case, method: Any, path: Path) -> bgx.ExportRecord:
    loaded = load(case)
    return bgx.export_onnx(loaded.model, (), path, kwargs=loaded.example, method=method, grid=case.grid)
