"""Random numbers from a seed where torch takes no generator, as in the constructors of its modules."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def seeded(seed: int, device: torch.device | str = "cpu") -> Iterator[None]:
    """Draw from ``seed`` meanwhile, on the CPU and on ``device``; torch's own generators are as before afterwards."""
    cuda = torch.device(device).type == "cuda"
    with torch.random.fork_rng([torch.device(device)] if cuda else []):
        torch.default_generator.manual_seed(seed)
        if cuda:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield
