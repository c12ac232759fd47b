"""Hooks that diffusers puts into a denoiser: layerwise casting in the graph, the others refused in one line each."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.hooks import LayerSkipConfig, apply_group_offloading, apply_layerwise_casting
from diffusers.hooks.layer_skip import _apply_layer_skip_hook
from diffusers.hooks.smoothed_energy_guidance_utils import (
    SmoothedEnergyGuidanceConfig,
    _apply_smoothed_energy_guidance_hook,
)
from torch import Tensor, nn

import bigain_fx as bgx
from tests import by_hand
from tests.zoo import Case
from tests.zoo_checks import BOTH, check_report, relative, tensors
from tests.zoo_named import NAMED

CASES = tuple(case for case in NAMED if case.name in ("sd1", "dit", "flux"))
STORAGE = torch.float8_e4m3fn


def hooked(case: Case, storage: torch.dtype = STORAGE, **options: Any) -> tuple[nn.Module, dict[str, Any]]:
    """The model of ``case`` with layerwise casting, and inputs."""
    torch.manual_seed(0)
    model = case.build()
    apply_layerwise_casting(model, storage, torch.float32, **options)
    torch.manual_seed(1)
    return model, case.inputs()


def stored(model: nn.Module, storage: torch.dtype = STORAGE) -> list[int]:
    return [weight.data_ptr() for weight in model.parameters() if weight.dtype is storage]


def cast_by_hand(case: Case, model: nn.Module) -> nn.Module:
    """A model without hooks, its weights those that ``model`` computes with."""
    torch.manual_seed(0)
    plain = case.build()
    plain.load_state_dict({name: weight.float() for name, weight in model.state_dict().items()})
    return plain


def run(fast: Any, inputs: dict[str, Any]) -> tuple[Tensor, ...]:
    with torch.no_grad():
        return tensors(fast(**inputs))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("when", ["before", "after a call"])
def test_layerwise_casting(case: Case, when: str) -> None:
    """Exact, and rewritten as by hand; the weights stay in their storage, which the graph reads."""
    model, inputs = hooked(case)
    expected, places = run(model, inputs), stored(model)
    assert len(places) > 10
    if when == "after a call":
        torch.manual_seed(0)
        model = case.build()
        fast = bgx.optimize(model, (), inputs, method=(), backend="eager", grid=case.grid)
        assert relative(run(fast, inputs), expected) > 1e-3, "nothing is lost in storage"
        apply_layerwise_casting(model, STORAGE, torch.float32)
        places = stored(model)
    else:
        fast = bgx.optimize(model, (), inputs, method=(), backend="eager", grid=case.grid)
    assert relative(run(fast, inputs), expected) <= 1e-6
    assert stored(model) == places
    assert set(stored(fast.prepare(**inputs).graph)) <= set(places)

    fast = bgx.optimize(model, (), inputs, method=BOTH.method, backend="eager", grid=case.grid)
    check_report(case, fast.report, BOTH.action)
    by = by_hand.run(cast_by_hand(case, model), inputs, case.sites, **BOTH.by_hand)
    assert relative(run(fast, inputs), tensors(by)) <= 1e-4
    assert relative(run(model, inputs), expected) <= 1e-6, "the original is as it was"


def test_the_sample_has_the_dtype_of_computing() -> None:
    """Storage of two bytes is not taken for it."""
    (case,) = (case for case in CASES if case.name == "dit")
    model, inputs = hooked(case, torch.bfloat16, skip_modules_pattern=())
    fast = bgx.optimize(model, (), inputs, method=(), backend="eager")
    assert relative(run(fast, inputs), run(model, inputs)) <= 1e-6


def test_casting_of_everything_at_once() -> None:
    """A hook on the model itself casts what is inside it."""
    (case,) = (case for case in CASES if case.name == "dit")
    model, inputs = hooked(case, skip_modules_pattern=None)
    expected = run(model, inputs)
    fast = bgx.optimize(model, (), inputs, method=(), backend="eager")
    assert relative(run(fast, inputs), expected) <= 1e-6
    assert all(weight.dtype is STORAGE for weight in fast.prepare(**inputs).graph.parameters())


def test_a_capture_that_fails_leaves_the_hooks_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    (case,) = (case for case in CASES if case.name == "dit")
    model, inputs = hooked(case)
    expected, places = run(model, inputs), stored(model)

    def broken(*args: Any) -> Tensor:
        raise ValueError("broken here")

    last = [module for module in model.modules() if isinstance(module, nn.SiLU)][-1]
    with monkeypatch.context() as patched:
        patched.setattr(type(last), "forward", broken)
        with pytest.raises(bgx.CaptureError, match="broken here"):
            bgx.optimize(model, (), inputs, method=(), backend="eager")
    assert stored(model) == places
    assert relative(run(model, inputs), expected) == 0
    assert len(stored(model)) == len(places)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_layerwise_casting_under_inductor(case: Case) -> None:
    model, inputs = hooked(case)
    expected = run(bgx.optimize(model, (), inputs, method=BOTH.method, backend="eager", grid=case.grid), inputs)
    fast = bgx.optimize(model, (), inputs, method=BOTH.method, grid=case.grid)
    assert relative(run(fast, inputs), expected) <= 1e-3


def skip_layers(model: nn.Module) -> None:
    _apply_layer_skip_hook(model, LayerSkipConfig(indices=[0], fqn="transformer_blocks"), name="SkipLayerGuidance_0")


def smooth_energy(model: nn.Module) -> None:
    config = SmoothedEnergyGuidanceConfig(indices=[0], fqn="transformer_blocks")
    _apply_smoothed_energy_guidance_hook(model, config, 1.0, name="SmoothedEnergyGuidance_0")


REFUSED = {
    "skip-layer guidance": (skip_layers, "SkipLayerGuidance_0' at transformer_blocks.0.*a guider puts it in"),
    "smoothed energy guidance": (smooth_energy, "SmoothedEnergyGuidance_0' at .*a guider puts it in"),
    "group offload": (
        lambda model: apply_group_offloading(model, torch.device("cpu"), offload_type="leaf_level"),
        "'group_offloading' at .*brings weights in when a layer is called, .* cast or quantize the weights",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_other_hooks_are_refused_with_the_reason(what: str) -> None:
    (case,) = (case for case in CASES if case.name == "dit")
    put, reason = REFUSED[what]
    model = case.build()
    put(model)
    with pytest.raises(bgx.InputError, match=f"DiTTransformer2DModel has .*{reason}") as caught:
        bgx.optimize(model, method=BOTH.method)
    assert "\n" not in str(caught.value)
