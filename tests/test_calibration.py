"""Calibration finds the alpha, and the ratios, of least deviation: by brute force here."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import bigain_fx as bgx
from bigain_fx.calibration.alpha import ALPHAS, _line, _lowest
from bigain_fx.calibration.ratio import TRIED, _between, _parabolas, allocate
from bigain_fx.passes.methods import Method
from tests.test_sample import _one_thread, tiny  # noqa: F401

STEPS = (50, 350, 650, 950)


def calls(steps: tuple[int, ...] = STEPS) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "hidden_states": torch.randn(6, 1, 8, 8, generator=generator), "timestep": torch.full((6,), step),
            "class_labels": torch.arange(6) % 3,
        }
        for step in steps
    ]  # fmt: skip


def deviations(model: nn.Module, method: Method, steps: tuple[int, ...] = STEPS) -> list[float]:
    """Of the calls at ``steps``."""
    fast = bgx.optimize(model, method=method, backend="eager")
    given = [{**call, "return_dict": False} for step, call in zip(STEPS, calls(), strict=True) if step in steps]
    with torch.no_grad():
        return [float((fast(**call)[0] - model(**call)[0]).square().mean()) for call in given]


@pytest.mark.slow
@pytest.mark.parametrize("schedule", [True, False])
def test_the_alpha_has_the_least_deviation(schedule: bool) -> None:
    torch.manual_seed(0)
    model = tiny().model
    found = bgx.calibrate(model, calls(), method=bgx.KVDownsample(2), schedule=schedule)
    assert found.timesteps == STEPS
    assert found.alphas == ALPHAS
    tried = [deviations(model, bgx.KVDownsample(2, alpha)) for alpha in ALPHAS]
    for index, step in enumerate(STEPS):
        assert found.tried[index] == pytest.approx([each[index] for each in tried], rel=1e-3)
        nearby = [found.best[index] + offset for offset in (-0.3, 0, 0.3)]
        around = [deviations(model, bgx.KVDownsample(2, alpha), (step,))[0] for alpha in nearby]
        assert around[1] < min(around[0], around[2])
        assert found.deviation[index] == pytest.approx(around[1], rel=0.1)
    alpha = found.method.alpha
    if schedule:
        assert isinstance(alpha, bgx.LinearAlpha)
        assert (alpha.t_noisy, alpha.t_clean) == (999, 0)  # of its family
    else:
        assert isinstance(alpha, float)
        total = [sum(deviations(model, bgx.KVDownsample(2, alpha + offset))) for offset in (-0.3, 0, 0.3)]
        assert total[1] < min(total[0], total[2])


def test_parabolas_and_their_line_by_hand() -> None:
    """Deviations that are parabolas around 0.2 + 0.001 t, of different heights and widths: all of it is found again."""
    steps, alphas = torch.tensor([0.0, 100.0, 400.0], dtype=torch.float64), torch.tensor(ALPHAS, dtype=torch.float64)
    lowest, width = 0.2 + 0.001 * steps, torch.tensor([1.0, 5.0, 0.1], dtype=torch.float64)
    curves = width[:, None] * (alphas - lowest[:, None]) ** 2 + 0.3
    best, bent, deviation = _lowest(curves)
    torch.testing.assert_close(best, lowest)
    torch.testing.assert_close(deviation, torch.full((3,), 0.3, dtype=torch.float64))
    torch.testing.assert_close(bent / bent[0], width)
    line = _line(steps, best, bent, 1000.0, 0.0)
    assert (line.noisy, line.clean) == pytest.approx((1.2, 0.2))
    assert (line.t_noisy, line.t_clean) == (1000.0, 0.0)


def test_a_curve_without_a_minimum_stays_within_what_was_tried() -> None:
    falling = torch.tensor([[5.0, 4, 3, 2, 1]], dtype=torch.float64)
    best, _, deviation = _lowest(falling)
    assert ALPHAS[0] <= float(best) <= ALPHAS[-1]
    assert float(best) > 1
    assert torch.isfinite(deviation).all()


def gflops(model: nn.Module, method: Any) -> float:
    return bgx.inspect(model, (), calls()[0], method=method).flops_after


@pytest.mark.slow
@pytest.mark.parametrize("method", [bgx.LaplacianMerge(0.5), bgx.ToMe(0.5, proportional=True, unmerge="blend")])
def test_ratios_lose_less_for_no_more_work(method: Any) -> None:
    """The second of three blocks adds next to nothing of its attention to the stream, and merges most."""
    torch.manual_seed(1)
    model = tiny(layers=3).model
    model.transformer_blocks[1].attn1.to_out[0].weight.mul_(1e-3)
    found = bgx.calibrate(model, calls(), method=method, cells=())
    assert found.timesteps == STEPS
    assert found.ratios == pytest.approx((0.25, 0.5, 0.75))
    ratios = found.method.ratio
    assert isinstance(ratios, tuple)
    assert len(ratios) == 3
    assert gflops(model, found.method) <= gflops(model, method)
    given, calibrated = deviations(model, method), deviations(model, found.method)
    assert found.given == pytest.approx(given, rel=1e-3)
    assert found.deviation == pytest.approx(calibrated, rel=1e-3)
    relative = [after / before for after, before in zip(calibrated, given, strict=True)]
    assert sum(relative) < len(STEPS)
    assert ratios[1] == 0.75
    assert min(ratios) < method.ratio
    alone = replace(method, ratio=(0.0, 0.0, 0.5))
    lost = [after / before for after, before in zip(deviations(model, alone), given, strict=True)]
    assert found.tried[2][1] == pytest.approx(sum(lost) / len(lost), rel=1e-3)


def test_the_method_stays_where_no_ratios_do_better() -> None:
    torch.manual_seed(0)
    found = bgx.calibrate(tiny().model, calls(), method=bgx.LaplacianMerge(0.75), cells=())
    assert found.method == bgx.LaplacianMerge(0.75)
    assert found.deviation == found.given


@pytest.mark.slow
def test_the_cell_is_taken_that_deviates_less() -> None:
    torch.manual_seed(1)
    model, method, relative = tiny().model, bgx.LaplacianMerge(0.5), {}
    given = deviations(model, method)
    for cell in ((2, 2), (4, 4)):
        alone = bgx.calibrate(model, calls(), method=replace(method, cell=cell), cells=())
        relative[cell] = sum(after / before for after, before in zip(alone.deviation, given, strict=True))
    found = bgx.calibrate(model, calls(), method=method)
    assert found.method.cell == min(relative, key=relative.__getitem__)
    assert found.given == pytest.approx(given, rel=1e-3)
    assert found.deviation == pytest.approx(deviations(model, found.method), rel=1e-3)
    assert gflops(model, found.method) <= gflops(model, method)
    assert bgx.calibrate(model, calls(), method=method, cells=[(32, 32)]).method.cell == (2, 2), "no grid has that"


def test_a_ratio_for_each_attention_is_checked() -> None:
    with pytest.raises(bgx.RewriteError, match=r"ratio=\(0.5, 0.5\) has 2 numbers, and the graph 1 self-attentions"):
        bgx.inspect(tiny().model, (), calls()[0], method=bgx.LaplacianMerge((0.5, 0.5)))


@pytest.mark.parametrize(("target", "chosen"), [(0, [0, 0]), (1, [0, 1]), (10, [0, 1]), (11, [0, 3]), (31, [3, 3])])
def test_the_flattest_pieces_are_taken_first(target: float, chosen: list[int]) -> None:
    """The first attention loses 1 for each unit saved, the second a tenth, then (its middle lies above) six tenths."""
    lost = torch.tensor([[5.0, 10, 15], [1, 9, 7]], dtype=torch.float64)
    saved = torch.tensor([[5.0, 10, 15], [10, 15, 20]], dtype=torch.float64)
    assert allocate(lost, saved, target) == chosen


def test_what_saves_nothing_is_never_chosen() -> None:
    lost, saved = torch.tensor([[0.0, 1, 2]]).double(), torch.tensor([[-4.0, 0, 6]]).double()
    assert allocate(lost, saved, 1) == [3]
    assert allocate(lost, -saved.abs(), 1) == [0]


def test_of_two_that_save_as_much_the_one_that_loses_less_is_chosen() -> None:
    lost, saved = torch.tensor([[3.0, 1, 2], [0, 0, 0]]).double(), torch.tensor([[5.0, 5, 5], [2, 2, 2]]).double()
    assert allocate(lost, saved, 7) == [2, 1]


def test_losses_are_lines_and_savings_parabolas_in_between() -> None:
    tried = torch.tensor([0.75 * share for share in TRIED], dtype=torch.float64)
    fine = torch.tensor([0.125, 0.25, 0.375, 0.7, 0.75], dtype=torch.float64)
    lost = torch.tensor([[4.0, 10, 12]], dtype=torch.float64)
    expected = torch.tensor([[2.0, 4, 7, 11.6, 12]], dtype=torch.float64)
    torch.testing.assert_close(_between(tried, lost, fine), expected)
    saved = 7 * (1 - (1 - tried) ** 2) + 3 * tried - 2
    expected = 7 * (1 - (1 - fine) ** 2) + 3 * fine - 2
    torch.testing.assert_close(_parabolas(tried, saved[None], fine), expected[None])


LINE = {"hidden_states": torch.ones(1, 1, 8, 2)}
"""Patches in one column: no grid."""


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"calls": []}, "calls is empty; give the arguments of some calls"),
        ({"calls": calls((5,))}, r"calls have the timesteps \[5.0\]; give two or more, one without a schedule"),
        (
            {"calls": [{"hidden_states": torch.zeros(1)}]},
            "a call has no timestep or timesteps or t among hidden_states",
        ),
        ({"calls": [{"timestep": torch.tensor([1, 2])}]}, r"a call has the timesteps \[1.0, 2.0\]; give one"),
        ({"calls": [call | LINE for call in calls()]}, "method rewrites no attention of DiTTransformer2DModel"),
        ({"method": bgx.ToDo(2)}, r"method=ToDo\(factor=2, .*\) has neither an alpha nor a ratio"),
        ({"method": bgx.ToMe(0)}, "method='tome:0' rewrites no attention of DiTTransformer2DModel, or changes nothing"),
        (
            {
                "method": bgx.ToMe(0.5),
                "calls": [*calls((5,)), {**calls((9,))[0], "hidden_states": torch.ones(1, 1, 8, 8)}],
            },
            "calls differ in more than values; give all of them the same shapes",
        ),
    ],
)
def test_bad_input_is_refused_in_one_line(changed: dict[str, Any], message: str) -> None:
    model = tiny().model
    given: dict[str, Any] = {"calls": calls(), "method": bgx.KVDownsample(2)} | changed
    with pytest.raises(bgx.InputError, match=message) as caught:
        bgx.calibrate(model, given["calls"], method=given["method"])
    assert "\n" not in str(caught.value)
