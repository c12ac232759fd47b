"""Every test starts from the same seed; processes side by side share the cores."""

from __future__ import annotations

import os

import pytest
import torch

if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))
if not torch.cuda.is_available():
    # Triton reads it when it is first imported, which torch's compiler does long before any test of a kernel.
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
