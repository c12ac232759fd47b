"""Calibration finds the alpha of least deviation, by brute force here."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import bigain_fx as bgx
from bigain_fx.calibration import ALPHAS, _line, _lowest
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


def deviation(model: nn.Module, call: dict[str, Any], alpha: float) -> float:
    fast = bgx.optimize(model, method=bgx.KVDownsample(2, alpha), backend="eager")
    with torch.no_grad():
        given = {**call, "return_dict": False}
        return float((fast(**given)[0] - model(**given)[0]).square().mean())


@pytest.mark.parametrize("schedule", [True, False])
def test_the_alpha_has_the_least_deviation(schedule: bool) -> None:
    torch.manual_seed(0)
    model = tiny().model
    found = bgx.calibrate(model, calls(), method=bgx.KVDownsample(2), schedule=schedule)
    assert found.timesteps == STEPS
    assert found.alphas == ALPHAS
    for index, call in enumerate(calls()):
        tried = [deviation(model, call, alpha) for alpha in ALPHAS]
        assert found.tried[index] == pytest.approx(tried, rel=1e-3)
        around = [deviation(model, call, found.best[index] + offset) for offset in (-0.3, 0, 0.3)]
        assert around[1] < min(around[0], around[2])
        assert found.deviation[index] == pytest.approx(around[1], rel=0.1)
    alpha = found.method.alpha
    if schedule:
        assert isinstance(alpha, bgx.LinearAlpha)
        assert (alpha.t_noisy, alpha.t_clean) == (999, 0)  # of its family
    else:
        assert isinstance(alpha, float)
        total = [sum(deviation(model, call, alpha + offset) for call in calls()) for offset in (-0.3, 0, 0.3)]
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


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"calls": []}, r"calls have the timesteps \[\]; give two or more"),
        ({"calls": calls((5,))}, r"calls have the timesteps \[5.0\]; give two or more, one without a schedule"),
        (
            {"calls": [{"hidden_states": torch.zeros(1)}]},
            "a call has no timestep or timesteps or t among hidden_states",
        ),
        ({"calls": [{"timestep": torch.tensor([1, 2])}]}, r"a call has the timesteps \[1.0, 2.0\]; give one"),
        ({"method": bgx.KVDownsample(3)}, "method rewrites no attention of DiTTransformer2DModel"),
    ],
)
def test_bad_input_is_refused_in_one_line(changed: dict[str, Any], message: str) -> None:
    model = tiny().model
    given: dict[str, Any] = {"calls": calls(), "method": bgx.KVDownsample(2)} | changed
    with pytest.raises(bgx.InputError, match=message) as caught:
        bgx.calibrate(model, given["calls"], method=given["method"])
    assert "\n" not in str(caught.value)
