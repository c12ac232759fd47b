"""Dense and compressed denoisers, classifying and generating the same images, measured so that it can be resumed.

Whatever is worked out is written to the folder of the evaluation at once, a chunk of images at a time, each under its
own name: started again, an evaluation goes on from there, and nothing is counted twice. What is damaged, or of other
settings, is worked out again. Several processes may work on different methods of one folder.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from bigain_fx.classify import Classification, DiffusionClassifier, check_rounds
from bigain_fx.denoiser import OptimizedDenoiser, optimize
from bigain_fx.embedded.features import as_bytes
from bigain_fx.embedded.train import save_atomically
from bigain_fx.noising import Noising
from bigain_fx.passes import checks
from bigain_fx.passes.errors import InputError, first_line
from bigain_fx.passes.methods import Methods
from bigain_fx.sample import predict, sample
from bigain_fx.subject import Subject
from bigain_fx.trace import digest

CHUNK = 20
PROBES = 16


@dataclass(frozen=True)
class Samples:
    """Labelled images, read one at a time.

    Attributes:
        name: of the data set.
        classes: their names.
        count: how many images there are.
        image: by index, ``(C, H, W)`` float32 in [-1, 1].
        labels: by index; one, or several of a picture with several objects.
    """

    name: str
    classes: tuple[str, ...]
    count: int
    image: Callable[[int], Tensor]
    labels: Callable[[int], tuple[int, ...]]


@dataclass(frozen=True)
class Settings:
    """What an evaluation does for every method; results are comparable only where all of this agrees.

    Attributes:
        n_samples, to_keep: rounds of the classifier.
        batch: rows of every denoiser call.
        steps, guidance: of the sampler.
        seed: of everything that is drawn.
    """

    n_samples: tuple[int, ...] = (4, 12)
    to_keep: tuple[int, ...] = (5, 1)
    batch: int = 20
    steps: int = 20
    guidance: float = 2.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_rounds(self.n_samples, self.to_keep)
        for name in ("batch", "steps"):
            checks.integer(name, getattr(self, name), least=1, most=checks.MANY)
        checks.number("guidance", self.guidance)
        checks.integer("seed", self.seed, least=-checks.SEED, most=checks.SEED)


@dataclass(frozen=True)
class Measured:
    """What is known of one method.

    Attributes:
        text: the method, as it was asked for.
        classification: of the images, in order.
        generated: ``(n, C, H, W)`` uint8, classes in turn.
        probe: the denoiser's answer to one fixed call, float32.
        gflops: of that call.
        sites: attentions that were changed.
    """

    text: str
    classification: Classification
    generated: Tensor
    probe: Tensor
    gflops: float
    sites: int


class Evaluation:
    """An evaluation of one denoiser on one data set, kept in a folder.

    Args:
        subject: the denoiser, with its scheduler and its conditions.
        samples: what is classified; classes as those of ``subject``.
        settings: see :class:`Settings`.
        folder: made if it is not there.

    Raises:
        InputError: the folder holds an evaluation with other settings, of another model or on other data; a class
            without an image; data with another number of classes than the denoiser knows.
    """

    def __init__(self, subject: Subject, samples: Samples, settings: Settings, folder: Path) -> None:
        if len(samples.classes) != len(subject.classes):
            theirs, mine = len(samples.classes), len(subject.classes)
            raise InputError(f"data={samples.name!r} has {theirs} classes, {subject.bundle.name} has {mine}")
        self.subject, self.samples, self.settings, self.folder = subject, samples, settings, folder
        self.bundle = subject.bundle
        self._check()

    def measure(
        self, text: str, methods: Methods, *, images: int, generate: int, backend: str, progress: Any = None
    ) -> Measured:
        """Classify the first ``images`` images and generate ``generate`` by one method, or read what is there.

        Args:
            text: names the result.
            methods: what is done to the denoiser; none of them is dense. Their own text names what is on disk.
            images, generate: how many.
            backend: as of :func:`bigain_fx.optimize`.
            progress: called with the number of images done, after each chunk.
        """
        if not 1 <= images <= self.samples.count:
            raise InputError(f"images={images!r} must be between 1 and the {self.samples.count} of {self.samples.name}")
        fast = _Lazily(partial(optimize, self.bundle.model, method=methods, backend=backend))
        name = "+".join(map(str, methods)) or "dense"
        classified = list(self._chunks(name, "classify", images, partial(self._classify, fast), progress))
        pictures = list(self._chunks(name, "generate", generate, partial(self._generate, fast), progress))
        probe = self._load(name, "probe", partial(self._probe, fast))
        errors, pairs, calls = (torch.cat([chunk[key] for chunk in classified]) for key in ("errors", "pairs", "calls"))
        return Measured(
            text, Classification(errors, pairs, int(calls.sum())),
            torch.cat([chunk["images"] for chunk in pictures]) if pictures else torch.zeros(0, dtype=torch.uint8),
            probe["output"], float(probe["gflops"]), int(probe["sites"]),
        )  # fmt: skip

    def _classify(self, fast: _Lazily, start: int, stop: int) -> dict[str, Tensor]:
        classes = torch.arange(self.bundle.num_classes)
        classifier = DiffusionClassifier(
            fast(), self.bundle.scheduler, self.bundle.condition(classes), n_samples=self.settings.n_samples,
            to_keep=self.settings.to_keep, batch=self.settings.batch, seed=self.settings.seed,
        )  # fmt: skip
        found = classifier(self._latents(start, stop), first=start)
        return {"errors": found.errors, "pairs": found.pairs, "calls": torch.tensor([found.calls])}

    def _generate(self, fast: _Lazily, start: int, stop: int) -> dict[str, Tensor]:
        shape, first = self.bundle.sample_shape, self.settings.seed * 1_000_003
        generators = [torch.Generator().manual_seed(first + index) for index in range(start, stop)]
        noise = torch.stack([torch.randn(shape, generator=generator) for generator in generators])
        labels = torch.arange(start, stop) % self.bundle.num_classes
        made = sample(
            fast(), self.bundle, labels, steps=self.settings.steps, guidance=self.settings.guidance, noise=noise,
            batch=self.settings.batch,
        )  # fmt: skip
        return {"images": as_bytes(made if self.subject.decode is None else self.subject.decode(made))}

    def _probe(self, fast: _Lazily) -> dict[str, Tensor]:
        denoiser = fast()
        output = self.probe_call(denoiser)
        report = denoiser.report
        gflops = torch.tensor(report.flops_after / 1e9, dtype=torch.float64)
        return {"output": output, "gflops": gflops, "sites": torch.tensor(len(report.rewritten))}

    def probe_call(self, denoiser: Callable[..., Any]) -> Tensor:
        """The answer ``(batch, ...)`` to one call with the first images at timesteps over the whole range."""
        count = min(PROBES, self.samples.count)
        clean = self._latents(0, count)
        noising = Noising(self.bundle.scheduler, (self.bundle.scheduler.config.num_train_timesteps - 1, 0))
        noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(self.settings.seed))
        noisy, _, timesteps = noising(clean, noise, torch.linspace(0, noising.steps - 1, count).long())
        labels = torch.tensor([(self.samples.labels(index) or (0,))[0] for index in range(count)])
        return predict(denoiser, self.bundle.condition, noisy, timesteps, labels, batch=self.settings.batch).float()

    def _latents(self, start: int, stop: int) -> Tensor:
        images = torch.stack([self.samples.image(index) for index in range(start, stop)])
        return images if self.subject.encode is None else self.subject.encode(images)

    def _chunks(
        self, method: str, kind: str, count: int, make: Callable[[int, int], dict[str, Tensor]], progress: Any
    ) -> Iterator[dict[str, Tensor]]:
        for start in range(0, count, CHUNK):
            stop = min(start + CHUNK, count)
            yield self._load(method, f"{kind}-{start:06}-{stop:06}", partial(make, start, stop))
            if progress is not None:
                progress(stop - start)

    def _load(self, method: str, name: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """What is kept under ``name``, or what ``make`` works out, which is kept then."""
        path = self.folder / re.sub(r"[^\w.+=-]", "_", method) / f"{name}.safetensors"
        about = f"{path.parent.name}/{name} {self._about}"
        if (kept := _read(path, about)) is not None:
            return kept
        tensors = {key: value.contiguous() for key, value in make().items()}
        seal = {"seal": _seal(about, tensors)}
        _write(lambda temporary: save_file(tensors, temporary, seal), path)
        return tensors

    def _check(self) -> None:
        """Write the settings, or compare them with those that are there."""
        used = {label for index in range(self.samples.count) for label in self.samples.labels(index)}
        if missing := [name for label, name in enumerate(self.samples.classes) if label not in used]:
            raise InputError(
                f"data={self.samples.name!r} has no image of {len(missing)} classes: {', '.join(missing[:5])}"
            )
        weights = digest(self.bundle.model)
        mine = {
            "model": self.bundle.name, "weights": weights, "data": self.samples.name, **asdict(self.settings)
        }  # fmt: skip
        self._about = json.dumps(mine)
        mine = json.loads(self._about)
        path = self.folder / "settings.json"
        theirs = _read_settings(path, mine)
        if theirs is None:  # every chunk tells its settings too
            _write(lambda temporary: temporary.write_text(json.dumps(mine, indent=1)), path)
        elif different := [key for key in mine if theirs[key] != mine[key]]:
            key = different[0]
            raise InputError(
                f"out={str(self.folder)!r} holds an evaluation with {key}={theirs[key]!r}, not {mine[key]!r}; name "
                "another folder"
            )


def _read_settings(path: Path, mine: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The settings at ``path``, if there are some, of the form of ``mine``."""
    try:
        theirs = json.loads(path.read_text())
        same = {key: type(theirs[key]) for key in theirs} == {key: type(value) for key, value in mine.items()}
    except (OSError, ValueError, TypeError, KeyError, IndexError, RecursionError):
        return None
    return theirs if same else None


def _read(path: Path, about: str) -> dict[str, Tensor] | None:
    """The tensors at ``path``, if they are there, whole, and what ``about`` says."""
    try:
        tensors = load_file(path)
        with safe_open(path, "pt") as file:
            return tensors if (file.metadata() or {}).get("seal") == _seal(about, tensors) else None
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError):
        return None


def _seal(about: str, tensors: Mapping[str, Tensor]) -> str:
    """A digest that changes with any bit of ``tensors``, and with what they are about."""
    found = hashlib.sha256(about.encode())
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _write(write: Callable[[Path], object], path: Path) -> None:
    """Write the file ``path`` whole.

    Raises:
        InputError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_atomically(write, path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{str(path)!r} cannot be written ({first_line(error)}); name another folder") from error


class _Lazily:
    """The optimized denoiser, made when something is left to do."""

    def __init__(self, make: Callable[[], OptimizedDenoiser]) -> None:
        self._make, self._made = make, list[OptimizedDenoiser]()

    def __call__(self) -> OptimizedDenoiser:
        if not self._made:
            self._made.append(self._make())
        return self._made[0]
