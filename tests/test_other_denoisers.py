"""Every denoiser class in the installed diffusers: rewritten as by hand or kept with a reason; none crashes.

A class that is neither in the zoo nor excused here fails the first test: a new release of diffusers shows its new ones.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator, Mapping
from typing import Any

import diffusers
import pytest
import torch
from diffusers import ModelMixin
from diffusers.models import controlnets, transformers, unets

import bigain_fx as bgx
from bigain_fx.passes.errors import CaptureError
from tests import by_hand, zoo_dits, zoo_named, zoo_unets
from tests.zoo import Case
from tests.zoo_checks import (
    BOTH,
    DENSE_TOLERANCE,
    TOLERANCE,
    check_original,
    check_report,
    load,
    one_thread,
    optimize,
    relative,
    tensors,
)
from tests.zoo_more import AUDIO, CAUSES, CONTROLS, MORE, UNCAPTURED, VIDEO

EXCUSED: Mapping[str, str] = {
    "ControlNetXSAdapter": "has no forward of its own: UNetControlNetXSModel runs it",
    "CosmosControlNetModel": "its forward needs torchvision",
    "LTX2VideoDiffusionDecoderModel": "a decoder that draws its own noise and takes its own steps",
    "LongCatAudioDiTVae": "an autoencoder",
    "Lumina2Transformer2DModel": "in test_architectures",
    "MiniMaxMusic3RVQDepthDecoder": "predicts codes of audio one after the other; it does not denoise",
    "MotionAdapter": "has no forward: weights for UNetMotionModel",
    "MultiControlNetUnionModel": "calls ControlNetUnionModel, as MultiControlNetModel calls ControlNetModel",
    "RFD4ProteinaTransformer": "denoises proteins, from a dictionary of thirty features",
    "UniDiffuserTextDecoder": "writes text",
}
"""Class -> why it is not in the zoo."""

WORDS = ("Transformer", "UNet", "UVit", "DiT", "ControlNet", "Prior", "Diffuser", "Diffusion")
"""What the name of a denoiser that lives elsewhere would hold."""


def discovered() -> set[str]:
    """Names of the classes in diffusers that may be denoisers, its transformers, U-Nets and ControlNets first."""
    found: list[Any] = []
    for package in (transformers, unets, controlnets):
        for info in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
            inside = vars(importlib.import_module(info.name)).values()
            found += [value for value in inside if getattr(value, "__module__", "") == info.name]
    exported = [name for name in dir(diffusers) if any(word in name for word in WORDS) and "Pipeline" not in name]
    found += [getattr(diffusers, name) for name in exported]
    return {value.__name__ for value in found if isinstance(value, type) and issubclass(value, ModelMixin)}


def test_every_class_is_in_the_zoo_or_excused() -> None:
    named = {name for module in (zoo_named, zoo_dits, zoo_unets) for name in vars(module)}
    more = {case.name.split("-")[0] for case in (*MORE, *UNCAPTURED)}
    found = discovered()
    assert not found - named - more - EXCUSED.keys(), "neither in the zoo nor excused"
    assert not (more | EXCUSED.keys()) - found, "in no diffusers module"
    assert not EXCUSED.keys() & (named | more), "excused, yet in the zoo"
    assert CAUSES.keys() == {case.name for case in UNCAPTURED}


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


SLOW = frozenset({
    "BriaFibo2Transformer2DModel", "HiDreamImageTransformer2DModel-padded", "NucleusMoEImageTransformer2DModel-experts",
    "UNet2DConditionModel-gligen", "UNet2DModel-skip",
})  # fmt: skip
"""Cases that take seconds and show little that another one does not."""


def named(cases: tuple[Case, ...]) -> Any:
    return pytest.mark.parametrize("case", [parameter(case) for case in cases])


def parameter(case: Case) -> Any:
    marks = [pytest.mark.slow] if case.name in SLOW or case in (*CONTROLS, *VIDEO, *AUDIO) else []
    return pytest.param(case, id=case.name, marks=marks)


@named(MORE)
def test_rewritten_as_by_hand_or_kept(case: Case) -> None:
    loaded = load(case)
    dense = optimize(case, ())
    assert relative(tensors(dense(**loaded.inputs)), loaded.output) <= DENSE_TOLERANCE
    check_original(case)

    fast = optimize(case, BOTH.method)
    assert fast.report.sites
    check_report(case, fast.report, BOTH.action)
    result = tensors(fast(**loaded.inputs))
    if not case.sites:
        assert relative(result, loaded.output) <= DENSE_TOLERANCE
        return
    expected = tensors(by_hand.run(loaded.model, loaded.inputs, case.sites, **BOTH.by_hand))
    assert relative(expected, loaded.output) > 100 * TOLERANCE, "the case would not notice a dense model"
    assert relative(result, expected) <= TOLERANCE


@named(UNCAPTURED)
def test_what_cannot_be_captured_says_why(case: Case) -> None:
    assert load(case).output
    with pytest.raises(CaptureError, match=CAUSES[case.name]):
        optimize(case, BOTH.method)
    check_original(case)


@pytest.mark.parametrize("name", ["GlmImageTransformer2DModel", "HiDreamImageTransformer2DModel"])
def test_blocks_of_what_cannot_be_captured(name: str) -> None:
    """The error says that they may be optimized one by one; so they are the model, and one of them can be rewritten."""
    (case,) = (case for case in UNCAPTURED if case.name == name)
    with pytest.raises(CaptureError, match=r"its blocks \(.*blocks\) may be optimized one by one"):
        optimize(case, BOTH.method)
    for method in ((), BOTH.method):
        torch.manual_seed(0)
        model = case.build()
        stacks = [m for path, m in model.named_children() if path.endswith("blocks")]
        grid = (4, 6) if name.startswith("Glm") else None
        blocks = [bgx.optimize(b, method=method, backend="eager", grid=grid) for stack in stacks for b in stack]
        made = iter(blocks)
        for stack in stacks:
            for index in range(len(stack)):
                stack[index] = next(made)
        with torch.no_grad():
            found = relative(tensors(model(**load(case).inputs)), load(case).output)
        assert found <= DENSE_TOLERANCE if not method or grid is None else found > 1e-3
        if grid:
            assert all(len(block.report.rewritten) == bool(method) for block in blocks)
