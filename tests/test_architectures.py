"""Every family that the issue names, in small: captured, matched, rewritten, and equal to the operators put in by hand.

`by_hand` knows nothing of graphs, and the sites of the zoo were worked out from the models' source.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from diffusers import Lumina2Transformer2DModel

import bigain_fx as bgx
from bigain_fx.passes.errors import CaptureError
from tests import by_hand
from tests.zoo import Case, lively
from tests.zoo_checks import (
    BLEND,
    BOTH,
    DENSE_TOLERANCE,
    KV,
    MERGE,
    PROPORTIONAL,
    TOLERANCE,
    Applied,
    check_original,
    check_report,
    load,
    one_thread,
    optimize,
    relative,
    tensors,
)
from tests.zoo_named import NAMED

COMPILED_TOLERANCE = 1e-3
MATCHED = tuple(case for case in NAMED if case.sites)
REFUSED = tuple(case for case in NAMED if not case.sites)
BLOCKS = tuple(case for case in NAMED if case.name in ("dit", "sd1", "flux", "flux2", "sd3"))
"""One of each kind of block: with and without cross-attention, joint, parallel."""


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def each(cases: tuple[Case, ...]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


@each(NAMED)
def test_dense(case: Case) -> None:
    fast, loaded = optimize(case, ()), load(case)
    assert relative(tensors(fast(**loaded.inputs)), loaded.output) <= DENSE_TOLERANCE
    assert not fast.report.rewritten
    check_original(case)


@each(MATCHED)
@pytest.mark.parametrize(
    "applied", [MERGE, pytest.param(KV, marks=pytest.mark.slow), BOTH], ids=["merge", "kv", "both"]
)
def test_rewritten_as_by_hand(case: Case, applied: Applied) -> None:
    fast, loaded = optimize(case, applied.method), load(case)
    check_report(case, fast.report, applied.action)
    expected = tensors(by_hand.run(loaded.model, loaded.inputs, case.sites, **applied.by_hand))
    assert relative(expected, loaded.output) > 100 * TOLERANCE, "the case would not notice a dense model"
    assert relative(tensors(fast(**loaded.inputs)), expected) <= TOLERANCE


@pytest.mark.slow
@each(tuple(case for case in MATCHED if case.name != "z-image"))
def test_blended_as_by_hand(case: Case) -> None:
    """By hand it is done right behind the attention; Z-Image norms in between, where a mean does not go through."""
    test_rewritten_as_by_hand(case, BLEND)


@each(tuple(case for case in BLOCKS if case.name != "sd1"))
def test_proportional_as_by_hand(case: Case) -> None:
    """Where text is beside the image in the attention alone, as where it is in what that reads."""
    test_rewritten_as_by_hand(case, PROPORTIONAL)


@each(BLOCKS)
def test_block_scope(case: Case) -> None:
    """The same attentions, and the layers around them run on the merged tokens too."""
    fast, loaded = optimize(case, bgx.LaplacianMerge(0.5, levels=None, scope="block")), load(case)
    check_report(case, fast.report, "merge")
    attention = optimize(case, MERGE.method)
    assert fast.report.flops_after < attention.report.flops_after
    result = tensors(fast(**loaded.inputs))
    assert relative(result, loaded.output) > 100 * TOLERANCE
    assert relative(result, tensors(attention(**loaded.inputs))) > 100 * TOLERANCE


@each(REFUSED)
def test_kept(case: Case) -> None:
    fast, loaded = optimize(case, BOTH.method), load(case)
    check_report(case, fast.report)
    assert relative(tensors(fast(**loaded.inputs)), loaded.output) <= DENSE_TOLERANCE


@each(MATCHED)
def test_by_hand_without_operators_changes_nothing(case: Case) -> None:
    loaded = load(case)
    assert relative(tensors(by_hand.run(loaded.model, loaded.inputs, case.sites)), loaded.output) <= 1e-6


def test_lumina_2_reads_lengths_from_its_mask() -> None:
    """Its shapes depend on the values of an input: there is no graph of it."""
    model = lively(
        Lumina2Transformer2DModel(
            in_channels=4,
            hidden_size=32,
            num_layers=1,
            num_refiner_layers=1,
            num_attention_heads=4,
            num_kv_heads=2,
            multiple_of=16,
            axes_dim_rope=(4, 2, 2),
            axes_lens=(32, 16, 16),
            cap_feat_dim=12,
        )
    )
    sample = torch.randn(2, 4, 16, 24)
    inputs = {
        "hidden_states": sample,
        "timestep": torch.tensor([0.1, 0.9]),
        "encoder_hidden_states": torch.randn(2, 5, 12),
        "encoder_attention_mask": torch.ones(2, 5, dtype=torch.bool),
    }
    assert model(**inputs).sample.shape == sample.shape
    with pytest.raises(CaptureError, match="Lumina2Transformer2DModel: unhashable type: non-nested SymInt"):
        bgx.optimize(model, (), inputs, method=MERGE.method, backend="eager")


@pytest.mark.slow
@each(NAMED)
def test_under_inductor(case: Case) -> None:
    """One graph without a break: `optimize` compiles with ``fullgraph=True`` and ``dynamic=False``."""
    torch.compiler.reset()
    expected = tensors(optimize(case, BOTH.method)(**load(case).inputs))
    fast = optimize(case, BOTH.method, backend="inductor")
    assert relative(tensors(fast(**load(case).inputs)), expected) <= COMPILED_TOLERANCE
