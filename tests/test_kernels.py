"""The Triton kernels against loops and numpy: on a GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import bigain_fx as bgx
from bigain_fx.passes.ops import kernels
from bigain_fx.regions import own_cache
from tests import oracle, toys
from tests.test_ops import LAYOUTS, TIES, Pair, assert_same_plan, one_hot, random_offsets

triton = pytest.importorskip("triton", reason="needs Triton, which is for Linux")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NUMPY = tuple(map(int, np.__version__.split(".")[:2]))
if DEVICE == "cpu" and tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7) and NUMPY >= (2, 4):
    pytest.skip("Triton's interpreter fails with numpy 2.4 before Triton 3.7", allow_module_level=True)

BIGAIN = torch.ops.bigain
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
KERNELS = {f"bigain::{schema.partition('(')[0]}" for schema in kernels.SCHEMAS}


@pytest.fixture
def switched_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """What follows is called and traced with the kernels."""
    monkeypatch.setenv("BIGAIN_TRITON", "1")
    assert kernels.switched_on(DEVICE)


@contextmanager
def launches() -> Iterator[list[str]]:
    """The kernels that are launched meanwhile, eagerly or by compiled code, in order."""
    names: list[str] = []
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        yield names
    events = sorted(profile.events(), key=lambda event: event.time_range.start)
    names += [event.name.removeprefix("bigain::") for event in events if event.name in KERNELS]


def norm(rows: Tensor) -> Tensor:
    return torch.from_numpy(np.linalg.norm(rows.double().cpu().numpy(), axis=-1)).float().to(rows.device)


def nearest(sources: Tensor, destinations: Tensor) -> tuple[Tensor, Tensor]:
    similarity, index = BIGAIN.nearest(sources, destinations, norm(sources), norm(destinations))
    assert (similarity.dtype, index.dtype) == (torch.float32, torch.int64)
    return similarity.cpu(), index.cpu()


def cosines(sources: Tensor, destinations: Tensor) -> Any:
    """All of them, in numpy's float64."""
    left, right = (rows.double().cpu().numpy() for rows in (sources, destinations))
    lengths = [np.maximum(np.linalg.norm(rows, axis=-1), 1e-12) for rows in (left, right)]
    return np.einsum("bsc,bdc->bsd", left, right) / lengths[0][:, :, None] / lengths[1][:, None, :]


def sorted_groups(assign: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Tokens of the flattened batch in the order of their groups, and where each group begins."""
    order, starts = [], []
    for b, row in enumerate(assign.tolist()):
        for group in range(groups):
            starts.append(len(order))
            order += [b * len(row) + token for token, of in enumerate(row) if of == group]
    return torch.tensor(order, device=DEVICE), torch.tensor(starts, device=DEVICE)


# ------------------------------------------------------------------------------------- nearest


@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1), (2, 70, 67, 37), (1, 64, 64, 64), (2, 3, 130, 70), (3, 65, 1, 5), (1, 2, 3, 200)]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_nearest(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    batch, sources, destinations, channels = shape
    left = torch.randn(batch, sources, channels, device=DEVICE).to(dtype)
    right = (3 * torch.randn(batch, destinations, channels, device=DEVICE)).to(dtype)
    similarity, index = nearest(left, right)
    expected = cosines(left, right)
    assert index.tolist() == expected.argmax(-1).tolist()
    torch.testing.assert_close(similarity, torch.from_numpy(expected.max(-1)).float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("make", TIES)
@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_nearest_is_the_lowest_on_a_tie(make: Any, dtype: torch.dtype) -> None:
    """Within a block of destinations and across blocks: each stands there three times."""
    left, right = make(2, 20, 8).to(DEVICE, dtype), make(2, 50, 8).to(DEVICE, dtype).repeat(1, 3, 1)
    similarity, index = nearest(left, right)
    expected = cosines(left, right)
    assert index.tolist() == expected.argmax(-1).tolist()
    assert int(index.max()) < 50
    assert similarity.tolist() == expected.max(-1).tolist()


def test_nearest_of_strided_rows() -> None:
    left = torch.randn(2, 24, 70, device=DEVICE).mT
    right = torch.randn(2, 66, 48, device=DEVICE)[:, :, ::2]
    expected = nearest(left.contiguous(), right.contiguous())
    for got, of_contiguous in zip(nearest(left, right), expected, strict=True):
        assert torch.equal(got, of_contiguous)


def test_an_index_stays_in_range_where_nothing_can_be_compared() -> None:
    rows = torch.full((1, 70, 8), torch.nan, device=DEVICE)
    assert set(nearest(rows, rows[:, :65])[1].flatten().tolist()) <= set(range(65))
    position, _ = BIGAIN.score_and_elect(rows, (7, 10), (3, 1))
    assert set(position.flatten().tolist()) <= {0, 1, 2}


# ------------------------------------------------------------------------------------- score and elect


@pytest.mark.parametrize(("grid", "cell"), [*LAYOUTS, ((1, 5), (1, 2)), ((5, 1), (2, 1)), ((3, 3), (1, 1))])
@pytest.mark.parametrize(("dtype", "channels"), [*((dtype, 9) for dtype in DTYPES), (torch.float32, 1)])
def test_score_and_elect(grid: Pair, cell: Pair, dtype: torch.dtype, channels: int) -> None:
    metric = torch.randn(2, grid[0] * grid[1], channels).to(dtype)
    assert_elected(metric, grid, cell)


def test_score_and_elect_of_many_channels() -> None:
    """More than one block of them."""
    assert_elected(torch.randn(1, 15, 700), (3, 5), (2, 2))


@pytest.mark.parametrize("make", TIES)
@pytest.mark.parametrize(("grid", "cell"), [((8, 8), (2, 2)), ((7, 9), (2, 2)), ((6, 8), (2, 4)), ((7, 6), (3, 3))])
def test_the_first_token_of_a_cell_is_elected_on_a_tie(make: Any, grid: Pair, cell: Pair) -> None:
    assert_elected(make(2, grid[0] * grid[1], 8), grid, cell)


def test_score_and_elect_of_a_strided_metric() -> None:
    assert_elected(torch.randn(2, 10, 6, 8).flatten(2).mT, (6, 8), (2, 2))


def assert_elected(metric: Tensor, grid: Pair, cell: Pair) -> None:
    position, length = BIGAIN.score_and_elect(metric.to(DEVICE), grid, cell)
    assert (position.dtype, length.dtype) == (torch.int64, torch.float32)
    chosen = oracle.destinations(oracle.laplacian_score(metric, grid), grid, cell)
    cells = oracle.cell_tokens(grid, cell)
    assert position.tolist() == [[cells[j].index(token) for j, token in enumerate(row)] for row in chosen]
    torch.testing.assert_close(length.cpu(), norm(metric), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "groups", "channels"), [(40, 7, 130), (63, 1, 8), (9, 9, 1), (33, 20, 128)])
def test_segment_mean(tokens: int, groups: int, channels: int, dtype: torch.dtype) -> None:
    assign = torch.cat([torch.arange(groups), torch.randint(groups, (tokens - groups,))])
    assign = torch.stack([assign[torch.randperm(tokens)] for _ in range(2)])
    x = (3 + torch.randn(2, tokens, channels)).to(dtype)
    order, starts = sorted_groups(assign, groups)
    mean = BIGAIN.segment_mean(x.to(DEVICE), order, starts)
    assert mean.dtype == dtype
    assert torch.equal(mean, BIGAIN.segment_mean(x.to(DEVICE), order, starts))
    expected = oracle.merge(x.float(), oracle.Plan(assign, torch.zeros(2, groups)))
    # The interpreter truncates to bfloat16.
    rtol = max(1e-6, torch.finfo(dtype).eps)
    torch.testing.assert_close(mean.cpu().float(), expected, rtol=rtol, atol=1e-6)


def test_a_token_that_stands_alone_is_kept_to_the_bit() -> None:
    x, assign = torch.randn(2, 20, 9, device=DEVICE), torch.arange(20).flip(0).expand(2, -1)
    assert torch.equal(BIGAIN.segment_mean(x, *sorted_groups(assign, 20)), x.flip(1))


def test_segment_mean_of_strided_tokens() -> None:
    x, assign = torch.randn(2, 9, 24, device=DEVICE).mT, torch.arange(24).remainder(5).expand(2, -1)
    groups = sorted_groups(assign, 5)
    torch.testing.assert_close(BIGAIN.segment_mean(x, *groups), BIGAIN.segment_mean(x.contiguous(), *groups))


def samples() -> list[Any]:
    """One call of every operator."""
    x = torch.randn(2, 35, 8, device=DEVICE)
    order = torch.arange(70, device=DEVICE)
    lengths = torch.ones(2, 20, device=DEVICE), torch.ones(2, 15, device=DEVICE)
    return [
        (BIGAIN.nearest.default, (x[:, :20], x[:, 20:], *lengths)),
        (BIGAIN.score_and_elect.default, (x.half(), (5, 7), (2, 2))),
        (BIGAIN.segment_mean.default, (x, order, order[::7].contiguous())),
    ]


@pytest.mark.parametrize(("op", "args"), samples())
def test_opcheck(op: Any, args: tuple[Any, ...]) -> None:
    torch.library.opcheck(op, args)


def test_every_kernel_is_sampled() -> None:
    assert {op.name() for op, _ in samples()} == KERNELS


# ------------------------------------------------------------------------------------- in a plan and a merge


@pytest.mark.parametrize(("grid", "cell"), [*LAYOUTS[1:6:2], LAYOUTS[7]])
@pytest.mark.parametrize("make", [torch.randn, one_hot])
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("share", [0.5, 1.0])
def test_plan_and_merge(switched_on: None, grid: Pair, cell: Pair, make: Any, given: bool, share: float) -> None:
    tokens = grid[0] * grid[1]
    metric, x = make(2, tokens, 16), torch.randn(2, tokens, 12)
    merged = oracle.merged_count(grid, cell, share * (1 - 1 / (cell[0] * cell[1])))
    offsets = random_offsets(grid, cell) if given else None
    position = None if offsets is None else torch.tensor(offsets, device=DEVICE)
    with launches() as names:
        assign, rep = BIGAIN.merge_plan(metric.to(DEVICE), grid, cell, merged, position)
        mean = BIGAIN.merge(x.to(DEVICE), assign, tokens - merged)
    assert names == [*([] if given else ["score_and_elect"]), "nearest", "segment_mean"]
    plan = oracle.Plan(assign.cpu(), rep.cpu())
    assert_same_plan(plan, oracle.merge_plan(metric, grid, cell, merged, offsets))
    torch.testing.assert_close(mean.cpu(), oracle.merge(x, plan), rtol=1e-5, atol=1e-5)
    with kernels.without_kernels(), launches() as names:
        expected = BIGAIN.merge_plan(metric.to(DEVICE), grid, cell, merged, position)
        BIGAIN.merge(x.to(DEVICE), assign, tokens - merged)
    assert names == []
    assert torch.equal(assign, expected[0])
    assert torch.equal(rep, expected[1])


def test_compiled(switched_on: None) -> None:
    def compressed(x: Tensor) -> Tensor:
        assign, _ = BIGAIN.merge_plan(x * 2, (6, 7), (2, 2), 25)
        return BIGAIN.unmerge(torch.tanh(BIGAIN.merge(x, assign, 17)), assign)

    x = torch.randn(2, 42, 16, device=DEVICE)
    compiled = torch.compile(compressed, dynamic=False, fullgraph=True)
    with own_cache(), torch.no_grad():
        compiled(x)
    with torch.no_grad(), launches() as names:
        got = compiled(x)
    assert names == ["score_and_elect", "nearest", "segment_mean"]
    with kernels.without_kernels():
        torch.testing.assert_close(got, compressed(x), rtol=1e-5, atol=1e-5)


def test_optimized(switched_on: None) -> None:
    torch.manual_seed(0)
    model, image = toys.Separate().eval().to(DEVICE), toys.image().to(DEVICE)
    method = bgx.LaplacianMerge(0.5, levels=None)
    fast = bgx.optimize(model, (image,), method=method, backend="aot_eager")
    fast(image)
    with launches() as names:
        got = fast(image)
    assert names == ["score_and_elect", "nearest", "segment_mean"]
    with kernels.without_kernels():
        fast = bgx.optimize(model, (image,), method=method, backend="aot_eager")
        fast(image)
    with launches() as names:
        expected = fast(image)
    assert names == []
    torch.testing.assert_close(got, expected)


# ------------------------------------------------------------------------------------- the switch


def test_the_kernels_are_off_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BIGAIN_TRITON", raising=False)
    assert not kernels.switched_on("cuda")
    monkeypatch.setenv("BIGAIN_TRITON", "1")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert [kernels.switched_on(device) for device in ("cuda", "cpu", "mps")] == [True, False, False]
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert kernels.switched_on("cpu")


def test_what_requires_a_derivative_is_averaged_in_torch(switched_on: None) -> None:
    x, assign = torch.randn(1, 6, 3, device=DEVICE, requires_grad=True), torch.tensor([[0, 0, 1, 1, 1, 2]])
    BIGAIN.merge(x, assign.to(DEVICE), 3)[0, 0].sum().backward()
    assert x.grad is not None
    assert x.grad[0, :, 0].tolist() == [0.5, 0.5, 0, 0, 0, 0]


def test_packages_are_compiled_without(switched_on: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process that loads one need not know these operators."""
    from bigain_fx.export.package import write_package

    seen = []

    def compile_(*args: Any, **kwargs: Any) -> None:
        seen.append(kernels.switched_on(DEVICE))
        raise RuntimeError("enough")

    monkeypatch.setattr("torch._inductor.aot_compile", compile_)
    program = torch.export.export(torch.nn.Identity(), (torch.ones(2),))
    with pytest.raises(bgx.ExportError, match="enough"):
        write_package([(program, {})], tmp_path / "toy.pt2")
    assert seen == [False]
    assert kernels.switched_on(DEVICE)
