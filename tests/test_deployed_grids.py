"""An exported graph has the grids of its images built in: inputs that tell of others are refused at the call."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import bigain_fx as bgx
from bigain_fx.families import Reading, built_in
from tests import toys
from tests.zoo_images import IMAGES, KONTEXT, ids

METHOD = bgx.LaplacianMerge(0.5)
SQUARES = ((4, 6), (6, 4))
OTHERS: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "one image, turned": ((6, 8), {"img_ids": ids(((6, 8),), (0,), 3)}, {"img_ids": ids(((8, 6),), (0,), 3)}),
    "one image as two": ((6, 8), {"img_ids": ids(((6, 8),), (0,), 3)}, {"img_ids": ids(((6, 4),) * 2, (0, 1), 3)}),
    "two images as one": (SQUARES, {"img_ids": ids(SQUARES, (0, 1), 3)}, {"img_ids": ids(((6, 8),), (0,), 3)}),
    "img_shapes": (SQUARES, {"img_shapes": [[(1, 4, 6), (1, 6, 4)]]}, {"img_shapes": [[(1, 6, 4), (1, 4, 6)]]}),
}


class Packed(toys.Separate):
    """Tokens come packed, as Flux takes them: the graph knows no rows and columns."""

    def forward(self, hidden_states: Tensor, img_ids: Tensor | None = None, img_shapes: Any = None) -> Tensor:
        return hidden_states + self.branch(self.norm(hidden_states), hidden_states)


def exported(told: dict[str, Any], folder: Path, method: Any = METHOD, grid: Any = None) -> Any:
    """A deployed toy of 48 tokens, and the inputs it was exported with."""
    torch.manual_seed(0)
    inputs, path = {"hidden_states": torch.randn(1, 48, toys.C), **told}, folder / "d.onnx"
    bgx.export_onnx(Packed().eval(), (), path, kwargs=inputs, method=method, grid=grid, verify=False)
    return bgx.OrtDenoiser(path), inputs


@pytest.mark.parametrize("what", OTHERS)
def test_another_split_of_as_many_tokens_is_refused(what: str, tmp_path: Path) -> None:
    grid, told, other = OTHERS[what]
    deployed, inputs = exported(told, tmp_path)
    assert deployed.interface.grid == grid
    expected = deployed(**inputs)
    for denoiser in (deployed, copy.deepcopy(deployed)):
        with pytest.raises(
            bgx.InputError, match=r"the graph is made for the grid .*, not for .* whose grid is"
        ) as caught:
            denoiser(**inputs | other)
        assert str(grid) in str(caught.value)
    again = {name: value.clone() if isinstance(value, Tensor) else value for name, value in inputs.items()}
    assert torch.equal(deployed(**again), expected)


@pytest.mark.slow
def test_two_images_of_flux_in_another_order_are_refused(tmp_path: Path) -> None:
    case, path = IMAGES[0], tmp_path / "flux.onnx"
    inputs = case.inputs()
    bgx.export_onnx(case.build(), (), path, kwargs=inputs, method=METHOD, verify=False)
    deployed = bgx.OrtDenoiser(path)
    deployed(**inputs)
    with pytest.raises(
        bgx.InputError, match=r"the grid \(\(4, 6\), \(6, 8\)\), .* whose grid is \(\(6, 8\), \(4, 6\)\)"
    ):
        deployed(**inputs | {"img_ids": ids(KONTEXT[::-1], (0, 1), 3)})


def test_ids_that_were_written_to_are_read_again(tmp_path: Path) -> None:
    deployed, inputs = exported(OTHERS["one image, turned"][1], tmp_path)
    inputs["img_ids"] = inputs["img_ids"].clone()
    deployed(**inputs)
    inputs["img_ids"].copy_(ids(((8, 6),), (0,), 3))
    with pytest.raises(bgx.InputError, match="the graph is made for the grid"):
        deployed(**inputs)


def test_a_dense_graph_takes_any_grid(tmp_path: Path) -> None:
    _, told, other = OTHERS["one image, turned"]
    deployed, inputs = exported(told, tmp_path, ())
    assert torch.equal(deployed(**inputs), deployed(**inputs | other))


def test_ids_that_tell_no_grid_are_named_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    deployed, inputs = exported({"img_ids": torch.zeros(48, 3)}, tmp_path, grid=(6, 8))
    caplog.clear()
    with caplog.at_level(logging.WARNING, "bigain_fx"):
        for _ in range(3):
            deployed(**inputs)
    (said,) = [record.message for record in caplog.records]
    assert said == (
        "Packed: its grid is taken to be (6, 8): img_ids does not run through the image in rows of equal columns, one "
        "after another"
    )


@pytest.mark.parametrize(
    ("grid", "read", "refused"),
    [
        ((4, 6), Reading((4, 6)), False),
        ((4, 6), Reading((6, 4)), True),
        ((4, 6), Reading(((2, 6), (2, 6))), True),
        (((2, 6), (2, 6)), Reading((4, 6)), True),
        ((4, 6), Reading(), False),
        ((4, 6), Reading((8, 6)), False),  # of which the graph sees a part
        ((4, 6), Reading(None, "frames", (0, 24, 48)), False),
        ((4, 6), Reading(None, "frames", (0, 12)), True),
        (((2, 6), (2, 6)), Reading(None, "frames", (0, 12)), False),
    ],
)
def test_what_contradicts_a_grid(grid: Any, read: Reading, refused: bool) -> None:
    if refused:
        with pytest.raises(bgx.InputError, match="the graph is made for the grid"):
            built_in([grid], read)
    else:
        assert built_in([grid], read) == grid


def test_the_grid_chooses_among_graphs_of_equal_shapes(tmp_path: Path) -> None:
    """Upright and lying pictures have as many tokens, and one file or package serves both."""
    torch.manual_seed(0)
    model, tokens = Packed().eval(), torch.randn(1, 48, toys.C)
    lying, upright = ({"hidden_states": tokens, "img_ids": ids((grid,), (0,), 3)} for grid in ((6, 8), (8, 6)))
    record = bgx.export_onnx(
        model, None, tmp_path / "d.onnx", method=METHOD, example_inputs=[((), lying), ((), upright)], verify=False
    )
    assert [graph.path.name for graph in record.graphs] == [f"d-1x48x16-48x3-{grid}.onnx" for grid in ("6x8", "8x6")]
    deployed = bgx.OrtDenoiser([graph.path for graph in record.graphs])
    fast = bgx.optimize(model, method=METHOD, backend="eager")
    for inputs in (lying, upright, lying):
        torch.testing.assert_close(deployed(**inputs), fast(**inputs), rtol=1e-4, atol=1e-4)
    with pytest.raises(bgx.InputError, match=r"the grid \(6, 8\) or \(8, 6\), not .* is \(4, 12\); export"):
        deployed(tokens, ids(((4, 12),), (0,), 3))
    with pytest.raises(bgx.InputError, match=r"the grids \(6, 8\) or \(8, 6\), and .* which: img_ids does not"):
        deployed(tokens, torch.zeros(48, 3))


@pytest.mark.slow
def test_constants_choose_among_graphs_too(tmp_path: Path) -> None:
    """Two sizes of what takes ``img_shapes`` are two of one model, and two of one size are told apart by them."""
    torch.manual_seed(0)
    model = Packed().eval()
    calls = [
        {"hidden_states": torch.randn(1, rows * columns, toys.C), "img_shapes": [[(1, rows, columns)]]}
        for rows, columns in ((6, 8), (8, 6), (4, 6))
    ]
    record = bgx.export_onnx(
        model, None, tmp_path / "d.onnx", method=METHOD, example_inputs=[((), each) for each in calls], verify=False
    )
    deployed = bgx.OrtDenoiser([graph.path for graph in record.graphs])
    fast = bgx.optimize(model, method=METHOD, backend="eager")
    for inputs in calls:
        torch.testing.assert_close(deployed(**inputs), fast(**inputs), rtol=1e-4, atol=1e-4)
    with pytest.raises(bgx.InputError, match=r"made for the grid \(4, 6\), not .* whose grid is \(3, 8\)"):
        deployed(calls[2]["hidden_states"], img_shapes=[[(1, 3, 8)]])


def test_equal_graphs_are_refused(tmp_path: Path) -> None:
    """A dense graph takes any grid: two are one."""
    _, told, other = OTHERS["one image, turned"]
    tokens = {"hidden_states": torch.randn(1, 48, toys.C)}
    calls = [((), tokens | told), ((), tokens | other)]
    with pytest.raises(bgx.InputError, match=r"has two of one size among \[\(1, 48, 16\), \(1, 48, 16\)\]"):
        bgx.export_onnx(Packed().eval(), None, tmp_path / "d.onnx", method=(), example_inputs=calls)
