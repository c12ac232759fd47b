"""The operators of exported graphs and the dtypes that they take, against the list in ``operators.txt``.

A provider of ONNX Runtime runs what it has a kernel for, and leaves the rest to the CPU: an operator or a dtype that is
new here is to be seen in review. ``python -m tests.test_operators`` writes the list anew.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnx
import pytest
import torch
from onnx import inliner, shape_inference
from torch import nn

import bigain_fx as bgx
from tests.test_optimize import dit, unet
from tests.zoo_named import sd3, sd3_inputs

GOLDEN = Path(__file__).with_name("operators.txt")
HEADER = "# Operators, dtypes of their inputs, and graphs that hold them; written by: python -m tests.test_operators\n"
Make = Callable[[], tuple[nn.Module, dict[str, Any]]]
KV = bgx.KVDownsample(2, bgx.LinearAlpha(0.8, 1.2))


def small_unet() -> tuple[nn.Module, dict[str, Any]]:
    text = torch.zeros(2, 5, 16)
    return unet(), {"sample": torch.zeros(2, 4, 8, 8), "timestep": torch.tensor(7), "encoder_hidden_states": text}


def small_dit() -> tuple[nn.Module, dict[str, Any]]:
    labels = torch.tensor([1, 2])
    return dit(), {"hidden_states": torch.zeros(2, 4, 16, 16), "timestep": torch.tensor([3, 4]), "class_labels": labels}


CASES: dict[str, tuple[Make, Any]] = {
    "unet-downsample": (small_unet, KV),
    "dit-merge": (small_dit, bgx.ToMe(0.5, unmerge="blend", proportional=True)),
    "mmdit-both": (lambda: (sd3(), sd3_inputs()), (bgx.LaplacianMerge(0.5), KV)),
}
"""Together they hold each function of ours, ``KVDownsampleCut`` aside, and masked and plain attention."""


def operators(make: Make, method: Any, folder: Path) -> set[str]:
    """What ONNX Runtime is given of a denoiser in float16: ``domain::Name (dtypes)``, functions inlined."""
    model, kwargs = make()
    path = folder / "model.onnx"
    bgx.export_onnx(model, (), path, kwargs=kwargs, method=method, dtype=torch.float16, verify=False)
    inlined = shape_inference.infer_shapes(inliner.inline_local_functions(onnx.load(path)))
    values = (*inlined.graph.value_info, *inlined.graph.input)
    codes = {value.name: value.type.tensor_type.elem_type for value in values}
    codes |= {tensor.name: tensor.data_type for tensor in inlined.graph.initializer}
    dtypes = {name: onnx.TensorProto.DataType.Name(code).lower() for name, code in codes.items()} | {"": "-"}
    return {
        f"{node.domain or 'ai.onnx'}::{node.op_type} ({', '.join(map(dtypes.__getitem__, node.input))})"
        for node in inlined.graph.node
    }


def golden() -> dict[str, set[str]]:
    """The list, by case."""
    rows = [line.rpartition(")") for line in GOLDEN.read_text().splitlines() if not line.startswith("#")]
    return {case: {f"{operator})" for operator, _, cases in rows if case in cases.split()} for case in CASES}


@pytest.mark.parametrize("case", CASES)
def test_operators_are_those_of_the_list(case: str, tmp_path: Path) -> None:
    assert sorted(operators(*CASES[case], tmp_path)) == sorted(golden()[case]), "python -m tests.test_operators"


def write() -> None:
    """Write the list anew."""
    with TemporaryDirectory() as folder:
        found = {case: operators(*given, Path(folder)) for case, given in CASES.items()}
    names = sorted(set().union(*found.values()))
    width = max(map(len, names))
    rows = [f"{name:{width}} {' '.join(case for case in CASES if name in found[case])}\n" for name in names]
    GOLDEN.write_text(HEADER + "".join(rows))


if __name__ == "__main__":
    write()
