"""``export_onnx`` of every family: with both methods where there is an attention to rewrite, else dense."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import bigain_fx as bgx
from tests.zoo import Case
from tests.zoo_checks import BOTH, check_report, load, one_thread, relative, tensors
from tests.zoo_more import MORE
from tests.zoo_named import NAMED

REFUSED = {"SanaWMTransformer3DModel": "attends in bfloat16 whatever the weights are"}
"""Name of a case -> a part of the error that says why there is no file of it."""
TOLERANCE = 1e-4
FAST = {("lumina-next", "dense"), ("qwen-image", "both")}
CASES = [
    pytest.param(
        case, method, marks=[] if (case.name, method) in FAST else pytest.mark.slow, id=f"{case.name}-{method}"
    )
    for case in (*NAMED, *MORE)
    for method in ("dense", "both")
    if (method == "both") == bool(case.sites) or (case.name, method) in FAST
]


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.mark.parametrize(("case", "method"), CASES)
def test_onnx_runtime_agrees_with_torch(case: Case, method: str, tmp_path: Path) -> None:
    loaded, path = load(case), tmp_path / "model.onnx"
    if case.name in REFUSED:
        with pytest.raises(bgx.ExportError, match=REFUSED[case.name]):
            bgx.export_onnx(loaded.model, (), path, kwargs=loaded.example, method=(), grid=case.grid)
        assert not list(tmp_path.iterdir())
        return
    applied: Any = BOTH.method if method == "both" else ()
    # The export itself compares with torch's graph, given equal plans.
    record = bgx.export_onnx(loaded.model, (), path, kwargs=loaded.example, method=applied, grid=case.grid)
    assert all(found.relative_l2 <= TOLERANCE for found in record.deviations)
    if method == "both":
        check_report(case, record.graphs[0].report, BOTH.action)
        assert record.operators["bigain::KVDownsample"] == len(case.sites)
    else:
        output = bgx.OrtDenoiser(path)(**loaded.inputs)
        assert relative(tensors(output), loaded.output) <= TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen-image", "z-image", "lumina-next"])
def test_packages_of_complex_rotary_tables(name: str, tmp_path: Path) -> None:
    case = next(case for case in NAMED if case.name == name)
    loaded = load(case)
    bgx.export_package(loaded.model, (), tmp_path / "model.pt2", kwargs=loaded.example, method=())
    output = bgx.load_package(tmp_path / "model.pt2")(**loaded.inputs)
    assert relative(tensors(output), loaded.output) <= TOLERANCE
