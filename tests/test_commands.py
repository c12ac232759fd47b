"""``generate`` and ``classify`` on embedded denoisers and on saved pipelines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from PIL import Image

import bigain_fx as bgx
from bigain_fx import commands, pictures
from bigain_fx.passes.grammar import parse_list
from bigain_fx.sample import sample
from bigain_fx.subject import Subject, decode, image_size, open_subject
from tests import pipes
from tests.test_sample import _one_thread, tiny  # noqa: F401

CLASSES = ("a", "b/c", "d")


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Subject:
    torch.manual_seed(0)
    subject = Subject(tiny(), CLASSES, (1, 8, 8))
    monkeypatch.setattr(commands, "open_subject", lambda model, prompts: subject)
    return subject


def generate(out: Path, **changed: Any) -> None:
    options = {"count": 4, "steps": 2, "guidance": 2.0, "batch": 4, "seed": 3, "backend": "eager"} | changed
    commands.generate("toy", parse_list("dense,bigain-tm:0.5"), (), out=out, **options)


def test_generate_leaves_what_the_sampler_makes(toy: Subject, tmp_path: Path) -> None:
    generate(tmp_path / "new")
    names = sorted(path.name for path in (tmp_path / "new").iterdir())
    classes = ["a", "b-c", "d", "a"]
    assert names == sorted(
        f"{method}-{index:04}-{name}.png" for method in ("dense", "bigain-tm-0.5") for index, name in enumerate(classes)
    )
    noise = torch.randn((4, 1, 8, 8), generator=torch.Generator().manual_seed(3))
    labels = torch.tensor([0, 1, 2, 0])
    made = sample(toy.bundle.model, toy.bundle, labels, steps=2, guidance=2.0, noise=noise, batch=4).clamp(-1, 1)
    for index, name in enumerate(classes):
        pixels = np.array(Image.open(tmp_path / "new" / f"dense-{index:04}-{name}.png")).astype(float)
        assert np.abs(pixels - (made[index, 0].numpy() + 1) * 127.5).max() <= 0.51


def test_classify_prints_what_the_classifier_finds(
    toy: Subject, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = []
    for index in range(2):
        files.append(tmp_path / f"{index}.png")
        Image.fromarray(np.random.default_rng(index).integers(0, 256, (8, 8), dtype=np.uint8)).save(files[-1])
    options: Any = {
        "n_samples": (2, 4), "to_keep": (2, 1), "batch": 4, "seed": 5, "backend": "eager", "as_json": True
    }  # fmt: skip
    commands.classify("toy", files, (), (), **options)
    printed = json.loads(capsys.readouterr().out)
    images = torch.stack([pictures.read(path, (1, 8, 8)) for path in files])
    classifier = bgx.DiffusionClassifier(
        toy.bundle.model, toy.bundle.scheduler, toy.bundle.condition(torch.arange(3)), n_samples=(2, 4),
        to_keep=(2, 1), batch=4, seed=5,
    )  # fmt: skip
    found = classifier(images)
    assert printed["calls"] == found.calls
    for row, path, best, second in zip(printed["images"], files, found.predicted, found.runner_up, strict=True):
        assert (row["image"], row["class"], row["runner-up"]) == (str(path), CLASSES[best], CLASSES[second])
    commands.classify("toy", files, (), (), **options | {"as_json": False})
    assert CLASSES[found.predicted[0]] in capsys.readouterr().out


def test_pictures_are_read_as_they_were_written(tmp_path: Path) -> None:
    images = torch.randint(0, 256, (2, 3, 4, 6), dtype=torch.uint8)
    pictures.write(images, tmp_path, ["x", "y"])
    read = torch.stack([pictures.read(tmp_path / f"{name}.png", (3, 4, 6)) for name in ("x", "y")])
    torch.testing.assert_close(read, images.float() / 127.5 - 1)


def test_pictures_are_cut_at_the_centre(tmp_path: Path) -> None:
    wide = np.zeros((4, 12), dtype=np.uint8)
    wide[:, 4:8] = 255
    Image.fromarray(wide).save(tmp_path / "wide.png")
    assert (pictures.read(tmp_path / "wide.png", (1, 4, 4)) == 1).all()


@pytest.mark.parametrize(("content", "message"), [(None, "is not there"), (b"text", "cannot be read as an image")])
def test_files_that_are_no_images(content: bytes | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(bgx.InputError, match=message):
        pictures.read(path, (1, 8, 8))


def test_nothing_is_left_where_nothing_is_made(toy: Subject, tmp_path: Path) -> None:
    with pytest.raises(bgx.InputError, match="count=0 must be an integer from 1"):
        generate(tmp_path, count=0)
    with pytest.raises(bgx.InputError, match="steps=0 must be an integer from 1"):
        generate(tmp_path, steps=0)
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------- pipelines


def test_stable_diffusion_is_asked_by_prompts(tmp_path: Path) -> None:
    pipe = pipes.text_to_image()
    pipe.vae.register_to_config(shift_factor=None)  # this pipeline would not look at it
    pipe.save_pretrained(tmp_path)
    subject = open_subject(str(tmp_path), ("cat", "dog"))
    assert subject.classes == ("cat", "dog")
    side = image_size(pipe)
    assert subject.image_shape == (3, side, side)
    expected, _ = pipe.encode_prompt(["cat", "dog", ""], "cpu", 1, False)
    given = subject.bundle.condition(torch.tensor([1, 2]))["encoder_hidden_states"]
    torch.testing.assert_close(given, expected[1:])
    assert subject.encode is not None
    assert subject.decode is not None
    latents = subject.encode(torch.rand(2, *subject.image_shape) * 2 - 1)
    assert latents.shape == (2, *subject.bundle.sample_shape)
    noise = torch.randn(2, *subject.bundle.sample_shape)
    made = sample(
        subject.bundle.model, subject.bundle, torch.tensor([0, 1]), steps=2, guidance=2.0, noise=noise, batch=4
    )
    output = pipe(
        ["cat", "dog"], latents=noise, num_inference_steps=2, guidance_scale=2.0, output_type="pt"
    ).images  # fmt: skip
    torch.testing.assert_close(subject.decode(made), output * 2 - 1, rtol=1e-3, atol=1e-3)


def test_a_class_conditional_dit_knows_its_classes(tmp_path: Path) -> None:
    pipe = pipes.class_dit()
    pipe.register_to_config(id2label={"3": "cat, house cat", "5": "dog"})
    pipe.save_pretrained(tmp_path)
    subject = open_subject(str(tmp_path), ("dog", "cat"))
    labels = subject.bundle.condition(torch.tensor([0, 1, 2]))["class_labels"]
    assert labels.tolist() == [5, 3, 1000]  # the last is no class
    everything = open_subject(str(tmp_path))
    assert len(everything.classes) == 1000
    assert everything.classes[3] == "cat"
    with pytest.raises(bgx.InputError, match=r"prompts=\['bird'\] are no classes of"):
        open_subject(str(tmp_path), ("bird", "cat"))


def test_latents_are_decoded_as_they_were_scaled() -> None:
    vae = pipes.vae()
    latents = torch.randn(2, 4, 4, 4)
    expected = vae.decode(latents / vae.config.scaling_factor + vae.config.shift_factor).sample
    torch.testing.assert_close(decode(vae, latents), expected.clamp(-1, 1))


@pytest.mark.parametrize(
    ("model", "prompts", "message"),
    [
        ("mnist-dit", ("one", "two"), "mnist-dit knows its classes; leave them out"),
        ("mnist-dti", (), "model='mnist-dti' is neither one of mnist-dit, mnist-unet, photo-dit, photo-unet nor"),
    ],
)
def test_what_cannot_be_opened(model: str, prompts: tuple[str, ...], message: str) -> None:
    with pytest.raises(bgx.InputError, match=message):
        open_subject(model, prompts)


def test_prompts_that_are_missing(tmp_path: Path) -> None:
    pipes.text_to_image().save_pretrained(tmp_path / "sd")
    with pytest.raises(bgx.InputError, match=r"prompts=\[\] must be two or more, one for each class"):
        open_subject(str(tmp_path / "sd"))
    pipes.image_to_image().save_pretrained(tmp_path / "half")
    with pytest.raises(bgx.InputError, match=r"half. cannot be loaded: Pipeline .* expected"):
        open_subject(str(tmp_path / "half"))
    unet = UNet2DModel(8, 1, 1, block_out_channels=(8,), norm_num_groups=4, down_block_types=("DownBlock2D",),
                       up_block_types=("UpBlock2D",))  # fmt: skip
    pipe = DDPMPipeline(unet, DDPMScheduler())
    pipe.save_pretrained(tmp_path / "other")
    with pytest.raises(bgx.InputError, match="is a DDPMPipeline; StableDiffusionPipeline and DiTPipeline can"):
        open_subject(str(tmp_path / "other"))
    with pytest.raises(bgx.InputError, match="the model is a DDPMPipeline, without a denoiser of latents"):
        image_size(pipe)
