"""The ONNX functions, run by ONNX Runtime, against the naive loops of `oracle`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor

from bigain_fx.export.functions import DOMAIN, FUNCTIONS, VERSION
from tests import oracle
from tests.test_ops import (
    ALPHAS,
    GRIDS,
    LAYOUTS,
    WINDOWS,
    Pair,
    assert_same_plan,
    cap,
    four_equal,
    one_hot,
    random_offsets,
    zeros,
)

OPSETS = [18, 20, 23]
INT64, FLOAT, FLOAT16 = onnx.TensorProto.INT64, onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16


def run(name: str, inputs: list[Tensor], outputs: list[tuple[int, int]], opset: int = 20, **attributes: Any) -> Any:
    """Call one function; ``outputs`` are (element type, rank)."""
    arrays = {f"in{index}": tensor.numpy() for index, tensor in enumerate(inputs)}
    results = [f"out{index}" for index in range(len(outputs))]
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node(name, list(arrays), results, domain=DOMAIN, **attributes)],
        "graph",
        [
            onnx.helper.make_tensor_value_info(key, onnx.helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
            for key, array in arrays.items()
        ],
        [
            onnx.helper.make_tensor_value_info(key, element, [None] * rank)
            for key, (element, rank) in zip(results, outputs, strict=True)
        ],
    )
    functions = [function.to_function_proto() for function in FUNCTIONS]
    for function in functions:
        for imported in function.opset_import:
            imported.version = VERSION if imported.domain == DOMAIN else opset
    imports = [onnx.helper.make_opsetid("", opset), onnx.helper.make_opsetid(DOMAIN, VERSION)]
    model = onnx.helper.make_model(graph, functions=functions, opset_imports=imports, ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    found = onnxruntime.InferenceSession(model.SerializeToString()).run(None, arrays)
    tensors = [torch.from_numpy(array) for array in found]
    return tensors[0] if len(tensors) == 1 else tensors


def plan_of(
    metric: Tensor, grid: Pair, cell: Pair, merged: int, offsets: list[int] | None, opset: int = 20,
    window: Pair | None = None,
) -> Any:  # fmt: skip
    inputs, name = [metric], "LaplacianMergePlan"
    if offsets is not None:
        inputs, name = [metric, torch.tensor([offsets])], "MergePlan"
    attributes = {"grid": grid, "cell": cell, "window": window or grid, "merged": merged}
    return oracle.Plan(*run(name, inputs, [(INT64, 2)] * 2, opset, **attributes))


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize(("grid", "cell"), LAYOUTS)
@pytest.mark.parametrize("given", [False, True])
def test_plan(grid: Pair, cell: Pair, given: bool, opset: int) -> None:
    metric = torch.randn(2, grid[0] * grid[1], 6)
    offsets = random_offsets(grid, cell) if given else None
    merged = oracle.merged_count(grid, cell, 0.6 * cap(cell))
    plan = plan_of(metric, grid, cell, merged, offsets, opset)
    assert_same_plan(plan, oracle.merge_plan(metric, grid, cell, merged, offsets))
    assert plan.rep.shape == (2, grid[0] * grid[1] - merged)


@pytest.mark.parametrize(("grid", "cell", "window"), WINDOWS)
@pytest.mark.parametrize("make", [torch.randn, zeros])
@pytest.mark.parametrize("share", [0.3, 1.0])
def test_plan_in_windows(
    make: Callable[[int, int, int], Tensor], grid: Pair, cell: Pair, window: Pair, share: float
) -> None:
    metric, merged = make(2, grid[0] * grid[1], 6), max(1, oracle.merged_count(grid, cell, share * cap(cell)))
    plan = plan_of(metric, grid, cell, merged, None, window=window)
    assert_same_plan(plan, oracle.merge_plan(metric, grid, cell, merged, None, window))


@pytest.mark.parametrize(
    "make", [one_hot, four_equal, lambda *shape: torch.ones(shape), lambda *shape: torch.zeros(shape)]
)
@pytest.mark.parametrize(("grid", "cell"), [((8, 8), (2, 2)), ((7, 9), (2, 2)), ((6, 8), (2, 4))])
@pytest.mark.parametrize("share", [0.3, 1.0])
def test_plan_breaks_ties_as_the_oracle(
    make: Callable[[int, int, int], Tensor], grid: Pair, cell: Pair, share: float
) -> None:
    metric, merged = make(2, grid[0] * grid[1], 8), oracle.merged_count(grid, cell, share * cap(cell))
    plan = plan_of(metric, grid, cell, merged, None)
    assert_same_plan(plan, oracle.merge_plan(metric, grid, cell, merged, None))


def test_plan_of_float16_is_computed_in_float32() -> None:
    metric = torch.randn(2, 64, 8).half() * 60
    assert_same_plan(plan_of(metric, (8, 8), (2, 2), 40, None), oracle.merge_plan(metric, (8, 8), (2, 2), 40))


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize(("tokens", "block"), [(64, 8), (60, 6), (37, 1), (12, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_merge(tokens: int, block: int, dtype: torch.dtype, opset: int) -> None:
    groups = tokens // 3
    assign = torch.stack([torch.randperm(tokens) % groups, (torch.randperm(tokens) ** 2 // tokens) % groups])
    assign[1, :groups] = torch.arange(groups)  # no group is empty, some are large
    x = torch.randn(2, tokens, 5).to(dtype)
    merged = run(
        "Merge", [x, assign], [(FLOAT if dtype == torch.float32 else FLOAT16, 3)], opset, groups=groups, block=block
    )
    rep = torch.stack([torch.stack([(row == group).nonzero()[0, 0] for group in range(groups)]) for row in assign])
    torch.testing.assert_close(merged, oracle.merge(x, oracle.Plan(assign, rep)), rtol=1e-5, atol=1e-6)
    assert merged.dtype == dtype


def test_merge_of_small_groups_far_from_zero_is_no_difference_of_large_sums() -> None:
    """4096 tokens near 1000: plain prefix sums would be off by 0.1."""
    tokens, groups = 4096, 1500
    assign = torch.cat([torch.arange(groups), torch.randint(groups, (tokens - groups,))])[torch.randperm(tokens)][None]
    x = 1000 + torch.randn(1, tokens, 2)
    merged = run("Merge", [x, assign], [(FLOAT, 3)], groups=groups, block=64)
    expected = torch.zeros(1, groups, 2, dtype=torch.float64).scatter_reduce(
        1, assign[..., None].expand(-1, -1, 2), x.double(), "mean", include_self=False
    )
    assert (merged - expected).abs().max() < 0.01


@pytest.mark.parametrize("opset", OPSETS)
def test_group_sizes(opset: int) -> None:
    plan = oracle.merge_plan(torch.randn(2, 63, 6), (7, 9), (2, 2), 40)
    assert torch.equal(run("GroupSizes", [plan.assign], [(FLOAT, 2)], opset, groups=23), oracle.group_sizes(plan))


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize(("grid", "merged", "block"), [((7, 9), 40, 7), ((2, 4), 6, 2), ((8, 8), 20, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_blend(grid: Pair, merged: int, block: int, dtype: torch.dtype, opset: int) -> None:
    tokens = grid[0] * grid[1]
    metric, y = torch.randn(2, tokens, 6), torch.randn(2, tokens - merged, 5).to(dtype)
    plan, count = oracle.merge_plan(metric, grid, (2, 2), merged), min(3, tokens - merged)
    near, weight = run(
        "NearestGroups", [metric, plan.assign, plan.rep], [(INT64, 3), (FLOAT, 3)], opset, groups=tokens - merged,
        block=block, count=count, sharpness=5.0,
    )  # fmt: skip
    assert near.shape == (2, count, tokens)
    found = run("Blend", [y, near, weight], [(FLOAT if dtype == torch.float32 else FLOAT16, 3)], opset)
    assert found.dtype == dtype
    torch.testing.assert_close(found, oracle.blend(y, metric, plan), rtol=2 * torch.finfo(dtype).eps, atol=1e-5)
    lone = torch.zeros(2, tokens, dtype=torch.bool).scatter(1, plan.rep, True)
    assert torch.equal(found[lone], oracle.unmerge(y, plan)[lone])


def test_unmerge() -> None:
    y, assign = torch.randn(3, 7, 4), torch.randint(7, (3, 20))
    expected = oracle.unmerge(y, oracle.Plan(assign, assign))
    assert torch.equal(run("Unmerge", [y, assign], [(FLOAT, 3)]), expected)


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize(("grid", "factor"), GRIDS)
@pytest.mark.parametrize("alpha", [*ALPHAS, [0.8, 1.2]])
def test_kv_downsample(grid: Pair, factor: int, alpha: float | list[float], opset: int) -> None:
    x = torch.randn(2, grid[0] * grid[1], 3)
    name = "KVDownsampleCut" if any(side % factor for side in grid) else "KVDownsample"
    found = run(name, [x, torch.tensor(alpha)], [(FLOAT, 3)], opset, grid=grid, factor=factor)
    torch.testing.assert_close(found, oracle.kv_downsample(x, alpha, grid, factor))


@pytest.mark.parametrize("timestep", [torch.tensor(-3.0), torch.tensor([500.0]), torch.tensor([0.5, 1500.0])])
@pytest.mark.parametrize("ends", [(0.8, 1.2, 999.0, 0.0), (1.1, 0.7, 0.0, 1.0)])
def test_linear_alpha(timestep: Tensor, ends: tuple[float, float, float, float]) -> None:
    noisy, clean, t_noisy, t_clean = ends
    found = run(
        "LinearAlpha", [timestep], [(FLOAT, 1)], batch=2, noisy=noisy, clean=clean, t_noisy=t_noisy, t_clean=t_clean
    )
    torch.testing.assert_close(found, torch.tensor(oracle.linear_alpha(timestep, 2, *ends)))


def test_no_function_scatters_with_a_reduction() -> None:
    for function in FUNCTIONS:
        for node in function.to_function_proto().node:
            assert not any(attribute.name == "reduction" for attribute in node.attribute), function.name
