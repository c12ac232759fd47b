"""The operators against the naive loops of `oracle`."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from bigain_fx.passes import ops
from tests import oracle

Pair = tuple[int, int]
BIGAIN = torch.ops.bigain

# grid, cell: square, non-square, sizes that the cells leave incomplete in one axis or both, a single cell
LAYOUTS: list[tuple[Pair, Pair]] = [
    ((8, 8), (2, 2)),
    ((4, 10), (2, 2)),
    ((7, 6), (2, 2)),
    ((6, 9), (2, 2)),
    ((5, 7), (2, 2)),
    ((2, 2), (2, 2)),
    ((9, 9), (3, 3)),
    ((8, 10), (3, 3)),
    ((6, 8), (2, 4)),
    ((5, 11), (2, 4)),
    ((3, 8), (1, 2)),
    ((4, 7), (1, 2)),
]
# grid, factor: blocks that are whole, cut off in one axis or both, after their middle or before it, and just one block
GRIDS: list[tuple[Pair, int]] = [
    ((8, 8), 2), ((4, 10), 2), ((6, 9), 3), ((3, 3), 3), ((8, 12), 4),
    ((5, 7), 2), ((7, 4), 2), ((7, 8), 3), ((9, 14), 4), ((11, 10), 5), ((2, 9), 4), ((3, 5), 7), ((1, 6), 4),
]  # fmt: skip
ALPHAS = [0.0, 0.9, 1.0, 1.2, -0.25]


def cap(cell: Pair) -> float:
    """The highest ratio that a cell size allows."""
    return 1 - 1 / (cell[0] * cell[1])


def random_offsets(grid: Pair, cell: Pair) -> list[int]:
    """A position for every complete cell, drawn here and not by the package."""
    return torch.randint(cell[0] * cell[1], (len(oracle.cell_tokens(grid, cell)),)).tolist()


def one_hot(batch: int, tokens: int, channels: int) -> Tensor:
    """Tokens with one entry of +-2**k, so that norms, similarities and scores are exact in any order of summation."""
    x = torch.zeros(batch, tokens, channels)
    index = torch.randint(channels, (batch, tokens, 1))
    return x.scatter_(2, index, torch.randint(2, index.shape) * 2.0 - 1) * 2.0 ** torch.randint(-2, 3, index.shape)


def four_equal(batch: int, tokens: int, channels: int) -> Tensor:
    """Tokens with four entries of one magnitude: norms are powers of two, similarities multiples of a quarter."""
    x = torch.zeros(batch, tokens, channels)
    index = torch.rand(batch, tokens, channels).argsort(2)[..., :4]
    return x.scatter_(2, index, torch.randint(2, index.shape) * 2.0 - 1) * 2.0 ** torch.randint(
        -1, 2, (batch, tokens, 1)
    )


def with_zeros(batch: int, tokens: int, channels: int) -> Tensor:
    """`one_hot` with about half of the tokens zero."""
    return one_hot(batch, tokens, channels) * torch.randint(2, (batch, tokens, 1))


def constant(batch: int, tokens: int, channels: int) -> Tensor:
    """One and the same token everywhere: every similarity is 1, scores tie away from the border."""
    return one_hot(batch, 1, channels).expand(batch, tokens, channels).contiguous()


def zeros(batch: int, tokens: int, channels: int) -> Tensor:
    """Nothing but ties."""
    return torch.zeros(batch, tokens, channels)


TIES: list[Callable[[int, int, int], Tensor]] = [one_hot, four_equal, with_zeros, constant, zeros]


def plan_of(
    metric: Tensor, grid: Pair, cell: Pair, merged: int, offsets: list[int] | None = None, window: Pair | None = None
) -> oracle.Plan:
    """The op's plan."""
    position = None if offsets is None else torch.tensor(offsets)
    return oracle.Plan(*BIGAIN.merge_plan(metric, grid, cell, merged, position, window))


def assert_same_plan(plan: oracle.Plan, expected: oracle.Plan) -> None:
    """Same representative for every token, same tokens alone, same number of groups, int64."""
    assert plan.assign.dtype == plan.rep.dtype == torch.int64
    assert plan.assign.shape == expected.assign.shape
    assert plan.rep.shape == expected.rep.shape
    assert plan.token_map() == expected.token_map()
    assert oracle.lone_tokens(plan.assign) == oracle.lone_tokens(expected.assign)


# ------------------------------------------------------------------------------------- score and cells


@pytest.mark.parametrize("grid", [(8, 8), (5, 7), (1, 6), (6, 1), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_laplacian_score(grid: Pair, dtype: torch.dtype) -> None:
    metric = torch.randn(2, grid[0] * grid[1], 12).to(dtype)
    score = ops.laplacian_score(metric, grid)
    assert score.dtype == torch.float32
    torch.testing.assert_close(score, oracle.laplacian_score(metric, grid), rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------- plans


@pytest.mark.parametrize(("grid", "cell"), LAYOUTS)
@pytest.mark.parametrize("share", [0.1, 0.5, 0.95, 1.0])
@pytest.mark.parametrize("destination", ["laplacian", "random"])
def test_plan_equals_oracle(grid: Pair, cell: Pair, share: float, destination: str) -> None:
    metric = torch.randn(2, grid[0] * grid[1], 16)
    merged = max(1, oracle.merged_count(grid, cell, share * cap(cell)))
    chosen = None if destination == "laplacian" else random_offsets(grid, cell)
    assert_same_plan(plan_of(metric, grid, cell, merged, chosen), oracle.merge_plan(metric, grid, cell, merged, chosen))


@pytest.mark.parametrize("make", TIES)
@pytest.mark.parametrize(("grid", "cell"), [((8, 8), (2, 2)), ((7, 9), (2, 2)), ((6, 8), (2, 4)), ((7, 6), (3, 3))])
@pytest.mark.parametrize("share", [0.3, 0.8, 1.0])
@pytest.mark.parametrize("given", [False, True])
def test_plan_breaks_ties_as_the_oracle(
    make: Callable[[int, int, int], Tensor], grid: Pair, cell: Pair, share: float, given: bool
) -> None:
    metric = make(3, grid[0] * grid[1], 8)
    merged = oracle.merged_count(grid, cell, share * cap(cell))
    offsets = random_offsets(grid, cell) if given else None
    assert_same_plan(
        plan_of(metric, grid, cell, merged, offsets), oracle.merge_plan(metric, grid, cell, merged, offsets)
    )


@pytest.mark.parametrize(("grid", "cell"), [((16, 16), (2, 2)), ((9, 15), (2, 2)), ((12, 8), (3, 3))])
@pytest.mark.parametrize("share", [0.6, 1.0])
def test_plan_of_one_integer_channel(grid: Pair, cell: Pair, share: float) -> None:
    """Entries -1, 0 and 1 in one channel: scores tie within cells, similarities are -1, 0 or 1, all of it exact."""
    metric = torch.randint(-1, 2, (2, grid[0] * grid[1], 1)).float()
    score = oracle.laplacian_score(metric, grid)[0].tolist()
    lows = [sorted(score[token] for token in tokens) for tokens in oracle.cell_tokens(grid, cell)]
    assert sum(low[0] == low[1] for low in lows) >= 2, "the sample should hold ties"
    merged = oracle.merged_count(grid, cell, share * cap(cell))
    assert_same_plan(plan_of(metric, grid, cell, merged), oracle.merge_plan(metric, grid, cell, merged))


@pytest.mark.parametrize(("grid", "cell"), [((8, 8), (2, 2)), ((7, 9), (2, 2)), ((6, 8), (2, 4))])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_metric_is_scored_in_float32(grid: Pair, cell: Pair, dtype: torch.dtype) -> None:
    metric = torch.randn(2, grid[0] * grid[1], 24).to(dtype)
    merged = oracle.merged_count(grid, cell, 0.7 if cell == (2, 2) else 0.85)
    plan = plan_of(metric, grid, cell, merged)
    wide = plan_of(metric.float(), grid, cell, merged)
    assert torch.equal(plan.assign, wide.assign)
    assert torch.equal(plan.rep, wide.rep)
    assert_same_plan(plan, oracle.merge_plan(metric, grid, cell, merged))


@pytest.mark.parametrize(("grid", "cell"), LAYOUTS)
@pytest.mark.parametrize("given", [False, True])
def test_plan_invariants(grid: Pair, cell: Pair, given: bool) -> None:
    tokens = grid[0] * grid[1]
    metric = torch.randn(2, tokens, 8)
    merged = max(1, oracle.merged_count(grid, cell, 0.8 * cap(cell)))
    offsets = random_offsets(grid, cell) if given else None
    plan = plan_of(metric, grid, cell, merged, offsets)
    chosen = oracle.destinations(oracle.laplacian_score(metric, grid), grid, cell, offsets)
    assert plan.rep.shape == (2, tokens - merged)
    for b, (assign, rep) in enumerate(zip(plan.assign.tolist(), plan.rep.tolist(), strict=True)):
        assert set(assign) == set(range(tokens - merged)), "every group has a member"
        assert all(assign[token] == group for group, token in enumerate(rep)), "every group holds its representative"
        assert all(rep[assign[token]] == token for token in chosen[b]), "a destination represents its own group"
        assert sum(rep[assign[token]] != token for token in range(tokens)) == merged
        assert all(rep[assign[token]] in chosen[b] for token in range(tokens) if rep[assign[token]] != token)


@pytest.mark.parametrize("make", [torch.randn, one_hot])
def test_plan_at_1024_tokens(make: Callable[[int, int, int], Tensor]) -> None:
    metric = make(1, 1024, 16)
    assert_same_plan(plan_of(metric, (32, 32), (2, 2), 716), oracle.merge_plan(metric, (32, 32), (2, 2), 716))


WINDOWS: list[tuple[Pair, Pair, Pair]] = [
    ((8, 8), (2, 2), (4, 4)), ((8, 12), (2, 2), (8, 2)), ((6, 8), (2, 4), (2, 8)), ((9, 6), (3, 3), (3, 6)),
    ((8, 7), (2, 2), (4, 7)), ((4, 6), (2, 2), (2, 2)),
]  # fmt: skip


@pytest.mark.parametrize("make", [torch.randn, one_hot, four_equal, zeros])
@pytest.mark.parametrize(("grid", "cell", "window"), WINDOWS)
@pytest.mark.parametrize("share", [0.3, 0.9, 1.0])
@pytest.mark.parametrize("given", [False, True])
def test_plan_in_windows_equals_oracle(
    make: Callable[[int, int, int], Tensor], grid: Pair, cell: Pair, window: Pair, share: float, given: bool
) -> None:
    metric = make(2, grid[0] * grid[1], 8)
    merged = max(1, oracle.merged_count(grid, cell, share * cap(cell)))
    offsets = random_offsets(grid, cell) if given else None
    plan = plan_of(metric, grid, cell, merged, offsets, window)
    assert_same_plan(plan, oracle.merge_plan(metric, grid, cell, merged, offsets, window))
    if make is torch.randn and share == 1.0:
        tiles = {token: index for index, tile in enumerate(oracle.cell_tokens(grid, window)) for token in tile}
        assert all(tiles[token] == tiles[rep] for row in plan.token_map() for token, rep in enumerate(row))


@pytest.mark.parametrize(
    ("grid", "cell", "window", "sides"),
    [
        ((64, 64), (2, 2), None, (64, 64)), ((64, 64), (2, 2), 16, (16, 16)), ((96, 96), (2, 2), 16, (16, 16)),
        ((64, 64), (2, 2), 100, (64, 64)), ((60, 44), (2, 2), 16, (12, 4)), ((64, 9), (2, 2), 8, (8, 9)),
        ((12, 12), (3, 4), 5, (3, 4)), ((8, 8), (4, 4), 3, (8, 8)), ((15, 8), (3, 2), 8, (3, 8)),
    ],
)  # fmt: skip
def test_windows_divide_the_grid_and_hold_whole_cells(grid: Pair, cell: Pair, window: int | None, sides: Pair) -> None:
    assert ops.window_sides(grid, cell, window) == sides


def test_samples_do_not_affect_each_other() -> None:
    metric = torch.randn(3, 63, 8)
    together = plan_of(metric, (7, 9), (2, 2), 40)
    for b in range(3):
        alone = plan_of(metric[b : b + 1], (7, 9), (2, 2), 40)
        assert together.token_map()[b] == alone.token_map()[0]


def test_plan_of_a_strided_metric() -> None:
    image = torch.randn(2, 16, 6, 8)
    metric = image.flatten(2).transpose(1, 2)
    assert not metric.is_contiguous()
    assert_same_plan(plan_of(metric, (6, 8), (2, 2), 30), oracle.merge_plan(metric, (6, 8), (2, 2), 30))


@pytest.mark.parametrize(("grid", "cell"), LAYOUTS)
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("make", [torch.randn, zeros, one_hot])
def test_pool_plan(make: Callable[[int, int, int], Tensor], grid: Pair, cell: Pair, share: float) -> None:
    metric = make(2, grid[0] * grid[1], 8)
    pooled = int(share * len(oracle.cell_tokens(grid, cell)))
    plan = oracle.Plan(*BIGAIN.pool_plan(metric, grid, cell, pooled))
    assert_same_plan(plan, oracle.pool_plan(metric, grid, cell, pooled))


# ------------------------------------------------------------------------------------- merge and unmerge


def test_group_sizes() -> None:
    plan = plan_of(torch.randn(2, 63, 8), (7, 9), (2, 2), 40)
    assert torch.equal(BIGAIN.group_sizes(plan.assign, 23), oracle.group_sizes(plan))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("grid", "cell"), [*LAYOUTS, ((2, 2), (2, 2)), ((2, 4), (2, 2))])
@pytest.mark.parametrize("share", [0.2, 1.0])
def test_blend(grid: Pair, cell: Pair, share: float, dtype: torch.dtype) -> None:
    """Grids of one and of two groups have fewer than three to blend."""
    tokens = grid[0] * grid[1]
    merged = max(1, oracle.merged_count(grid, cell, share * cap(cell)))
    metric = torch.randn(2, tokens, 8)
    plan, y = plan_of(metric, grid, cell, merged), torch.randn(2, tokens - merged, 12).to(dtype)
    near, weight = BIGAIN.nearest_groups(metric, plan.assign, plan.rep)
    assert near.shape == (2, min(3, tokens - merged), tokens)
    found, expected = BIGAIN.blend(y, near, weight), oracle.blend(y, metric, plan)
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-5)
    lone = torch.zeros(2, tokens, dtype=torch.bool).scatter(1, plan.rep, True)
    assert torch.equal(found[lone], oracle.unmerge(y, plan)[lone]), "a representative's row is its group's, as it is"


@pytest.mark.parametrize(("grid", "cell"), LAYOUTS)
@pytest.mark.parametrize("share", [0.2, 1.0])
def test_merge_and_unmerge(grid: Pair, cell: Pair, share: float) -> None:
    tokens = grid[0] * grid[1]
    merged = max(1, oracle.merged_count(grid, cell, share * cap(cell)))
    plan = plan_of(torch.randn(2, tokens, 8), grid, cell, merged)
    x = torch.randn(2, tokens, 20)
    y = BIGAIN.merge(x, plan.assign, tokens - merged)
    torch.testing.assert_close(y, oracle.merge(x, plan), rtol=1e-5, atol=1e-5)
    assert torch.equal(BIGAIN.unmerge(y, plan.assign), oracle.unmerge(y, plan))


def test_merge_of_one_large_group() -> None:
    plan = plan_of(torch.ones(2, 256, 4), (16, 16), (2, 2), 190)
    x = 100 + torch.randn(2, 256, 8)
    torch.testing.assert_close(BIGAIN.merge(x, plan.assign, 66), oracle.merge(x, plan), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_merge_keeps_dtype_and_averages_in_float32(dtype: torch.dtype) -> None:
    # a mean over 190 members in bfloat16 would be off by percents
    plan = plan_of(torch.ones(1, 256, 4), (16, 16), (2, 2), 190)
    x = (3 + torch.randn(1, 256, 8)).to(dtype)
    y = BIGAIN.merge(x, plan.assign, 66)
    assert y.dtype == dtype
    assert BIGAIN.unmerge(y, plan.assign).dtype == dtype
    exact = oracle.merge(x.float(), plan)
    torch.testing.assert_close(y.float(), exact, rtol=torch.finfo(dtype).eps, atol=1e-5)
    assert torch.equal(BIGAIN.unmerge(y, plan.assign), oracle.unmerge(y, plan))


def test_merge_of_strided_tokens() -> None:
    x = torch.randn(2, 8, 6, 6).flatten(2).transpose(1, 2)
    plan = plan_of(x, (6, 6), (2, 2), 20)
    y = BIGAIN.merge(x, plan.assign, 16)
    torch.testing.assert_close(y, oracle.merge(x, plan), rtol=1e-5, atol=1e-5)
    turned = y.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(BIGAIN.unmerge(turned, plan.assign), oracle.unmerge(y, plan))


# ------------------------------------------------------------------------------------- KV downsampling


@pytest.mark.parametrize(("grid", "factor"), GRIDS)
@pytest.mark.parametrize("alpha", ALPHAS)
def test_kv_downsample(grid: Pair, factor: int, alpha: float) -> None:
    x = torch.randn(2, grid[0] * grid[1], 10)
    y = BIGAIN.kv_downsample(x, alpha, grid, factor)
    torch.testing.assert_close(y, oracle.kv_downsample(x, alpha, grid, factor), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("grid", "factor"), GRIDS)
def test_kv_downsample_with_an_alpha_a_sample(grid: Pair, factor: int) -> None:
    x = torch.randn(len(ALPHAS), grid[0] * grid[1], 6)
    y = BIGAIN.kv_downsample.Tensor(x, torch.tensor(ALPHAS), grid, factor)
    torch.testing.assert_close(y, oracle.kv_downsample(x, ALPHAS, grid, factor), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_kv_downsample_keeps_dtype_and_computes_in_float32(dtype: torch.dtype) -> None:
    x = (3 + torch.randn(2, 64, 8)).to(dtype)
    for alpha in (0.9, torch.tensor([0.8137, 1.1921])):
        y = BIGAIN.kv_downsample(x, alpha, (8, 8), 4)
        assert y.dtype == dtype
        weights = alpha if isinstance(alpha, float) else alpha.tolist()
        exact = oracle.kv_downsample(x.float(), weights, (8, 8), 4)
        torch.testing.assert_close(y.float(), exact, rtol=torch.finfo(dtype).eps, atol=1e-4)


def test_kv_downsample_of_alpha_one_is_the_nearest_token() -> None:
    x = torch.randn(1, 24, 3)
    assert torch.equal(BIGAIN.kv_downsample(x, 1.0, (4, 6), 2), x.view(1, 4, 6, 3)[:, 1::2, 1::2].reshape(1, 6, 3))


def test_nearest_tokens_are_those_of_nearest_exact_and_of_their_own_block() -> None:
    """Torch's own kernel, told the scale: where a block is cut off before its middle, it takes the last token."""
    for side, factor in itertools.product(range(1, 41), range(2, 17)):
        count = -(-side // factor)
        line = torch.arange(float(side)).view(1, 1, 1, side)
        taken = torch.ops.aten._upsample_nearest_exact2d(line, [1, count], 1.0, 1 / factor).flatten().long()
        assert torch.equal(ops.nearest_tokens((1, side), factor), taken), (side, factor)
        assert torch.equal(ops.nearest_tokens((side, 1), factor), taken), (side, factor)
        assert torch.equal(taken // factor, torch.arange(count)), (side, factor)


def test_kv_downsample_of_whole_blocks_is_a_view_and_a_mean() -> None:
    """A grid that the factor divides pays nothing for those that it does not: no padding, no counts."""
    graph = make_fx(lambda x: BIGAIN.kv_downsample(x, 0.9, (4, 6), 2))(torch.randn(1, 24, 4)).graph
    names = [str(node.target).split(".")[1] for node in graph.nodes if node.op == "call_function"]
    assert names == ["view", "select", "select", "mean", "mul", "mul", "add", "view"]


def test_kv_downsample_of_strided_tokens() -> None:
    x = torch.randn(2, 5, 4, 6).flatten(2).transpose(1, 2)
    expected = oracle.kv_downsample(x, 0.9, (4, 6), 2)
    torch.testing.assert_close(BIGAIN.kv_downsample(x, 0.9, (4, 6), 2), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("step", [-3, 0, 1, 500, 999, 1500])
def test_linear_alpha_of_one_timestep(dtype: torch.dtype, step: int) -> None:
    for timestep in (torch.tensor(step, dtype=dtype), torch.tensor([step], dtype=dtype)):
        alpha = BIGAIN.linear_alpha(timestep, 3, 0.8, 1.2, 999.0, 0.0)
        assert alpha.dtype == torch.float32
        assert alpha.shape == (3,)
        expected = torch.tensor(oracle.linear_alpha(timestep, 3, 0.8, 1.2, 999, 0))
        torch.testing.assert_close(alpha, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("timestep", "ends"),
    [
        (torch.tensor([999, 250, 0, 5000]), (0.8, 1.2, 999.0, 0.0)),
        (torch.tensor([0.999, 0.25, 0.0, 2.0]), (0.8, 1.2, 1.0, 0.0)),
        (torch.tensor([0.0, 0.25, 1.0, -1.0]), (0.8, 1.2, 0.0, 1.0)),  # the clean end is the higher number
        (torch.tensor([10, 400, 600, 990]), (1.3, 0.7, 800.0, 200.0)),
    ],
)
def test_linear_alpha_of_a_timestep_a_sample(timestep: Tensor, ends: tuple[float, float, float, float]) -> None:
    alpha = BIGAIN.linear_alpha(timestep, 4, *ends)
    torch.testing.assert_close(alpha, torch.tensor(oracle.linear_alpha(timestep, 4, *ends)), rtol=1e-6, atol=1e-6)
    assert min(ends[:2]) - 1e-6 <= float(alpha.min())
    assert float(alpha.max()) <= max(ends[:2]) + 1e-6
