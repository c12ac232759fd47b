"""Small classifiers of the embedded data, whose features FID compares where Inception's weights cannot be had.

``python -m bigain_fx.embedded.features mnist`` trains one, in minutes.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn

from bigain_fx.embedded import CLASSES, WEIGHTS
from bigain_fx.embedded.data import data_set
from bigain_fx.passes.errors import InputError
from bigain_fx.seeds import seeded

LEARNING_RATE, BATCH = 2e-3, 128


class Extractor(nn.Module):
    """A small convolutional classifier of 32x32 grey images.

    Args:
        classes: how many.
    """

    num_features = 64

    def __init__(self, classes: int) -> None:
        super().__init__()
        widths = (1, 16, 32, self.num_features)
        self.convolutions = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in pairwise(widths))
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for width in widths[1:])
        self.head = nn.Linear(self.num_features, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Features ``(n, 64)`` float32 of ``images (n, 1, 32, 32)`` uint8."""
        x = images.float() / 127.5 - 1
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = F.max_pool2d(F.relu(norm(convolution(x))), 2)
        return x.mean((2, 3))


def as_bytes(images: Tensor) -> Tensor:
    """Images in [-1, 1] as uint8."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def load_extractor(data: str) -> Extractor:
    """The extractor of the embedded data set ``data``, in eval mode.

    Raises:
        InputError: no such data set, or its weights are missing.
    """
    from safetensors.torch import load_file

    path = WEIGHTS / f"{data}-features.safetensors"
    if data not in CLASSES or not path.exists():
        raise InputError(f"data={data!r} has no feature extractor; one of {', '.join(CLASSES)} has")
    extractor = Extractor(CLASSES[data])
    extractor.load_state_dict(load_file(path))
    return extractor.eval().requires_grad_(False)


def train(
    name: Annotated[str, typer.Argument(help=", ".join(CLASSES))],
    steps: Annotated[int, typer.Option(help="optimizer steps")] = 2000,
    seed: int = 0,
    out: Annotated[Path, typer.Option(help="folder of the weights")] = WEIGHTS,
) -> None:
    """Train the extractor of NAME and write ``NAME-features.safetensors`` with its card."""
    from safetensors.torch import save_file

    from bigain_fx.embedded.train import save_atomically, source_of

    data = data_set(name)
    generator = torch.Generator().manual_seed(seed)
    with seeded(seed):
        extractor = Extractor(len(data.classes))
    optimizer = torch.optim.AdamW(extractor.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        images, labels = data.draw(BATCH, generator)
        loss = F.cross_entropy(extractor.head(extractor(as_bytes(images))), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    extractor.eval()
    with torch.no_grad():
        found = extractor.head(extractor(as_bytes(data.held_out.images))).argmax(1)
    right = float((found == data.held_out.labels).float().mean())
    path = out / f"{name}-features.safetensors"
    save_atomically(lambda path: save_file(extractor.state_dict(), path), path)
    path.chmod(0o644)
    card = f"""# {name}-features

A classifier of 32x32 images; FID compares the {extractor.num_features} features before its last layer.

- Data: {source_of(name)}.
- Held-out accuracy: {right:.1%} of {len(data.held_out)}
- Steps: {steps:,} of {BATCH} images, seed {seed}, torch {torch.__version__}
- Command: `python -m bigain_fx.embedded.features {name} --steps {steps} --seed {seed}`
"""
    save_atomically(lambda path: path.write_text(card), out / f"{name}-features.md")
    print(f"{path}: {right:.1%}")


if __name__ == "__main__":
    typer.run(train)
