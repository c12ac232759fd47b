"""The naive loops themselves, against examples worked out by hand."""

from __future__ import annotations

import pytest
import torch

from tests import oracle


def test_oracle_score_of_one_bright_token() -> None:
    metric = torch.zeros(1, 9, 1)
    metric[0, 4] = 1
    assert oracle.laplacian_score(metric, (3, 3)).tolist() == [[0, 1, 0, 1, 4, 1, 0, 1, 0]]
    assert oracle.laplacian_score(torch.ones(1, 6, 2), (2, 3)).tolist() == [[4, 2, 4, 4, 2, 4]]


def test_oracle_plan_of_one_cell() -> None:
    # scores: (b + c - 4a) -> 4, (a + d - 4b) -> 2, (a + d - 4c) -> 6, (b + c - 4d) -> 4: b is the destination
    metric = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]])
    assert oracle.laplacian_score(metric, (2, 2)).tolist() == [[4, 2, 6, 4]]
    assert oracle.merge_plan(metric, (2, 2), (2, 2), 1).token_map() == [[1, 1, 2, 3]]
    plan = oracle.merge_plan(metric, (2, 2), (2, 2), 2)
    assert plan.token_map() == [[1, 1, 2, 1]]
    assert oracle.lone_tokens(plan.assign) == [{2}]
    x = torch.tensor([[[1.0], [2.0], [7.0], [6.0]]])
    assert oracle.merge(x, plan).tolist() == [[[3.0], [7.0]]]
    assert oracle.unmerge(oracle.merge(x, plan), plan).tolist() == [[[3.0], [3.0], [7.0], [3.0]]]
    assert oracle.merge_plan(metric, (2, 2), (2, 2), 2, [2]).token_map() == [[2, 2, 2, 3]]


def test_oracle_ties_take_the_lowest_index() -> None:
    # two cells side by side, all similarities 1: destinations are tokens 5 and 2, so index 2 wins over cell order
    plan = oracle.merge_plan(torch.ones(1, 8, 1), (2, 4), (2, 2), 3, [3, 0])
    assert plan.token_map() == [[2, 2, 2, 2, 4, 5, 6, 7]]


def test_oracle_incomplete_cells_are_sources() -> None:
    assert oracle.cell_tokens((3, 5), (2, 2)) == [[0, 1, 5, 6], [2, 3, 7, 8]]
    assert oracle.merged_count((3, 5), (2, 2), 0.7) == 10
    plan = oracle.merge_plan(torch.ones(1, 15, 1), (3, 5), (2, 2), 13, [0, 0])
    assert plan.token_map() == [[0, 0, 2] + [0] * 12]


def test_oracle_kv_downsample_of_one_block() -> None:
    x = torch.tensor([[[1.0], [2.0], [3.0], [6.0]]])
    assert oracle.kv_downsample(x, 0.5, (2, 2), 2).tolist() == [[[4.5]]]
    assert oracle.kv_downsample(torch.arange(9.0).view(1, 9, 1), 1, (3, 3), 3).tolist() == [[[4.0]]]
    assert oracle.kv_downsample(torch.arange(16.0).view(1, 16, 1), 1, (4, 4), 4).tolist() == [[[10.0]]]


def test_oracle_kv_downsample_of_blocks_that_are_cut_off() -> None:
    assert oracle.blocks((3, 5), 2) == [[0, 1, 5, 6], [2, 3, 7, 8], [4, 9], [10, 11], [12, 13], [14]]
    assert oracle.nearest_tokens((3, 5), 2) == [6, 8, 9, 11, 13, 14]
    assert oracle.nearest_tokens((1, 7), 5) == [2, 6]
    x = torch.arange(15.0).view(1, 15, 1)
    assert oracle.kv_downsample(x, 0, (3, 5), 2).flatten().tolist() == [3, 5, 6.5, 10.5, 12.5, 14]
    assert oracle.kv_downsample(x, 1, (3, 5), 7).flatten().tolist() == [13]


def test_oracle_linear_alpha_by_hand() -> None:
    steps = torch.tensor([999.0, 0, 499.5, -5, 2000])
    assert oracle.linear_alpha(steps, 5, 0.8, 1.2, 999, 0) == pytest.approx([0.8, 1.2, 1.0, 1.2, 0.8])
