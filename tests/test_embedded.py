"""The embedded data sets, denoisers and feature extractors."""

from __future__ import annotations

import pytest
import torch
from skimage import data

import bigain_fx as bgx
from bigain_fx import embedded
from bigain_fx.embedded.data import PHOTOGRAPHS, data_set
from bigain_fx.embedded.features import as_bytes, load_extractor
from tests.test_sample import _one_thread  # noqa: F401


@pytest.mark.parametrize(("name", "classes", "count"), [("mnist", 10, 500), ("photo", 14, 560)])
def test_data_sets(name: str, classes: int, count: int) -> None:
    found = data_set(name)
    assert len(found.classes) == classes == embedded.CLASSES[name]
    assert len(found.held_out) == count
    assert found.held_out.labels.tolist() == list(range(classes)) * (count // classes)
    drawn, labels = found.draw(64, torch.Generator().manual_seed(1))
    again, _ = found.draw(64, torch.Generator().manual_seed(1))
    other, _ = found.draw(64, torch.Generator().manual_seed(2))
    assert torch.equal(drawn, again)
    assert not torch.equal(drawn, other)
    assert set(labels.tolist()) <= set(range(classes))
    for images in (drawn, found.held_out.images):
        assert images.shape[1:] == (1, 32, 32)
        assert -1 <= float(images.min()) < float(images.max()) <= 1


@pytest.mark.slow
def test_held_out_patches_are_of_the_right_halves_and_drawn_ones_of_the_left() -> None:
    """Worked out on one grey photograph: patches are found by value in the standardized whole."""
    label = PHOTOGRAPHS.index("camera")
    pixels = torch.as_tensor(data.camera()).float() / 255
    middle = pixels.shape[1] // 2
    left = pixels[:, :middle]
    whole = ((pixels - left.mean()) / (2 * left.std())).clamp(-1, 1)
    found = data_set("photo")
    held_out = found.held_out.images[found.held_out.labels == label]
    tiles = whole[:, middle:].unfold(0, 32, 32).unfold(1, 32, 32).flatten(0, 1)
    distance = (held_out[:, 0].flatten(1)[:, None] - tiles.flatten(1)[None]).abs().amax(2)
    assert float(distance.amin(1).max()) < 1e-5
    assert len(set(distance.argmin(1).tolist())) == len(held_out), "held-out patches do not overlap"
    drawn, labels = found.draw(400, torch.Generator().manual_seed(0))
    crops = whole[:, :middle].unfold(0, 32, 1).unfold(1, 32, 1)
    for image in drawn[labels == label][:5, 0]:
        options = [image, image.flip(1)]
        assert min(float((crops - option).abs().amax((2, 3)).min()) for option in options) < 1e-5


def test_an_unknown_data_set_is_named() -> None:
    with pytest.raises(bgx.InputError, match="data='minst' is not an embedded data set; choose mnist or photo"):
        data_set("minst")


@pytest.mark.parametrize("name", embedded.NAMES)
def test_denoisers_denoise(name: str) -> None:
    """Better than answering no noise at all, on held-out images under their own classes."""
    bundle, found = embedded.load(name), data_set(name.split("-")[0])
    images = found.held_out.first(14)
    noise = torch.randn(images.images.shape, generator=torch.Generator().manual_seed(0))
    timesteps = torch.full((14,), 400)
    noisy = bundle.scheduler.add_noise(images.images, noise, timesteps)
    with torch.no_grad():
        output = bundle.model(noisy, timestep=timesteps, **bundle.condition(images.labels)).sample
    assert float((output - noise).square().mean()) < 0.3


@pytest.mark.parametrize(("name", "least"), [("mnist", 0.95), ("photo", 0.7)])
def test_extractors_tell_the_classes_apart(name: str, least: float) -> None:
    held_out, extractor = data_set(name).held_out, load_extractor(name)
    features = extractor(as_bytes(held_out.images))
    assert features.shape == (len(held_out), extractor.num_features)
    right = (extractor.head(features).argmax(1) == held_out.labels).float().mean()
    assert float(right) >= least
    with pytest.raises(bgx.InputError, match="data='pets' has no feature extractor; one of mnist, photo has"):
        load_extractor("pets")
