"""Several images in one attention: each is scored, merged and downsampled by itself (docs/operators.md)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests import by_hand
from tests.test_architectures import each
from tests.zoo import Case
from tests.zoo_checks import (
    BLEND,
    BOTH,
    KV,
    MERGE,
    TOLERANCE,
    Applied,
    check_report,
    load,
    one_thread,
    optimize,
    relative,
    tensors,
)
from tests.zoo_images import IMAGES


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@each(IMAGES)
@pytest.mark.parametrize("applied", [MERGE, KV, BOTH, BLEND], ids=["merge", "kv", "both", "blend"])
def test_rewritten_as_by_hand(case: Case, applied: Applied) -> None:
    fast, loaded = optimize(case, applied.method), load(case)
    check_report(case, fast.report, applied.action)
    expected = tensors(by_hand.run(loaded.model, loaded.inputs, case.sites, **applied.by_hand))
    assert relative(expected, loaded.output) > 100 * TOLERANCE, "the case would not notice a dense model"
    assert relative(tensors(fast(**loaded.inputs)), expected) <= TOLERANCE
