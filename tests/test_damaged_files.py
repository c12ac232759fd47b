"""Files of strangers, files that disks or people damaged: one line of ours, when they are opened, and nothing lost."""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

import bigain_fx as bgx
from bigain_fx.deployed import OrtDenoiser
from bigain_fx.export import files
from bigain_fx.export.interface import Interface
from bigain_fx.passes.errors import BigainError, ExportError
from tests.test_deployed import KWARGS, edited, interface_of, save

Wreck = Callable[[onnx.ModelProto], None]


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    """A file with its weight in another one beside it."""
    return save(tmp_path / "toy.onnx", interface_of(KWARGS), external=True)


def rewrite(path: Path, wreck: Wreck) -> None:
    model = onnx.load(path, load_external_data=False)
    wreck(model)
    path.write_bytes(model.SerializeToString())


def place(**entries: str) -> Wreck:
    """Say of the weight that it is elsewhere."""

    def wreck(model: onnx.ModelProto) -> None:
        tensor = model.graph.initializer[0]
        kept = {entry.key: entry.value for entry in tensor.external_data} | entries
        del tensor.external_data[:]
        for key, value in kept.items():
            tensor.external_data.add(key=key, value=value)

    return wreck


def refused(path: Path, message: str) -> None:
    with pytest.raises(ExportError, match=message) as caught:
        OrtDenoiser(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "location",
    ["../toy.onnx.data", "/etc/passwd", "sub/../toy.onnx.data", "./toy.onnx.data", "..", ".", "", "a\\b", "C:x", "a\0b",
     "*/_ORT_MEM_ADDR_/*", "sub/toy.onnx.data"],
)  # fmt: skip
def test_weights_that_are_elsewhere(toy: Path, location: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (toy.parent / "sub").mkdir()
    for other in (toy.parent.parent, toy.parent / "sub"):
        shutil.copy(toy.with_name("toy.onnx.data"), other)
    rewrite(toy, place(location=location))
    monkeypatch.setattr("onnxruntime.InferenceSession", lambda *args, **options: pytest.fail("the runtime saw it"))
    refused(toy, "has weights in .*, which is no file of its own folder; refused")


def test_links_out_of_the_folder(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    data, elsewhere = toy.with_name("toy.onnx.data"), tmp_path_factory.mktemp("elsewhere")
    shutil.move(data, elsewhere / "secret")
    data.symlink_to(elsewhere / "secret")
    refused(toy, "is no file of its own folder")
    data.unlink()
    shutil.copy(elsewhere / "secret", toy.with_name("kept"))
    data.symlink_to("kept")
    OrtDenoiser(toy)


def test_a_cache_of_links(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """As the Hugging Face hub keeps files: the graph and its weights both link to one folder of contents."""
    names = tmp_path_factory.mktemp("snapshot")
    for path in (toy, toy.with_name("toy.onnx.data")):
        (names / path.name).symlink_to(path)
    assert OrtDenoiser(names / "toy.onnx")(**KWARGS).sample.shape == (2, 4, 8, 8)


FIELDS = [
    (place(offset="-1"), "no number of bytes"),
    (place(offset="1e3"), "no number of bytes"),
    (place(offset="1_0"), "no number of bytes"),
    (place(offset="\u0661"), "no number of bytes"),
    (place(length="9" * 5000), "no number of bytes"),
    (place(length="15"), r"has 15 bytes, its shape \(1, 4, 1, 1\) takes 16"),
    (place(offset=str(10**17)), r"has its weights in .*: \d+ bytes, but 16 are there"),
    (place(location="other.data"), r"has its weights in .*other.data \(16 bytes\), which is not there"),
    (lambda m: m.graph.initializer[0].external_data.add(key="location", value="b"), "names its place twice"),
    (lambda m: m.graph.initializer[0].dims.__setitem__(0, -1), "shape"),
    (lambda m: m.graph.initializer[0].dims.__setitem__(0, 2**62), "bytes"),
    (lambda m: setattr(m.graph.initializer[0], "data_type", 0), "damaged"),
    (lambda m: setattr(m.graph.initializer[0], "data_type", 1000), "damaged"),
    (lambda m: setattr(m.graph.initializer[0], "data_type", TensorProto.INT4), "damaged"),
    (lambda m: m.graph.initializer[0].ClearField("external_data"), "damaged .KeyError: 'location'"),
    (lambda m: m.graph.node.append(helper.make_node("Constant", [], ["c"], value=TensorProto(
        data_location=TensorProto.EXTERNAL))), "data in another file that is no weight of its graph"),
]  # fmt: skip


@pytest.mark.parametrize(("wreck", "message"), FIELDS, ids=range(len(FIELDS)))
def test_fields_of_external_data(toy: Path, wreck: Wreck, message: str) -> None:
    rewrite(toy, wreck)
    refused(toy, message)


PORT = {"name": "out_sample", "path": ["sample"], "shape": [2, 4, 8, 8], "dtype": "float32"}
DEEP = "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize(
    "metadata",
    [
        *(edited(outputs=[{**PORT, "path": [name]}]) for name in
          ("__init__", "_x", "items", "keys", "to_tuple", "update", "None", "a b", "\ufb01eld", "class", True, 1.5)),
        *({**edited(), name: DEEP} for name in ("interface", "config", "grid")),
        {**edited(), "interface": edited()["interface"].replace('"constants": {}', f'"constants": {{"a": {DEEP}}}')},
        {**edited(), "interface": edited()["interface"].replace('"format": 1', '"format": ' + "9" * 5000)},
        edited(outputs=[{**PORT, "path": ["sample", *["a"] * 5000]}]),
        edited(outputs=[{**PORT, "shape": [True, 4, 8, 8]}]),
        edited(outputs=[{**PORT, "shape": [10**30, 4, 8, 8]}]),
        edited(outputs=[{**PORT, "shape": [2**62, 2**62]}]),
        edited(outputs=[{**PORT, "dtype": ["float32"]}]),
        edited(outputs=PORT),
        edited(parameters="sample"),
        edited(parameters=[1]),
        edited(parameters=None),
        edited(model=3),
        edited(defaults=[]),
        edited(defaults=[["a", 1]]),
        edited(constants={"scale": [1]}),
        edited(constants={"scale": {"a": 1}}),
        edited(versions={"a": 1}),
        {**edited(), "config": "[]"},
        {**edited(), "config": '[["a", 1]]'},
        {**edited(), "config": "3"},
        {**edited(), "grid": "8xtall"},
        {**edited(), "grid": "9" * 5000 + "x1"},
    ],
    ids=lambda metadata: None,
)  # fmt: skip
def test_metadata_that_no_export_writes(tmp_path: Path, metadata: dict[str, str]) -> None:
    refused(save(tmp_path / "toy.onnx", interface_of(KWARGS), metadata=metadata), "malformed")


def test_a_config_that_no_model_has(tmp_path: Path) -> None:
    config = json.dumps({"__class__": 3})
    refused(save(tmp_path / "toy.onnx", interface_of(KWARGS), metadata={**edited(), "config": config}), "malformed")


class Small(nn.Module):
    """Two weights, one beside the graph and one in it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(32, 32)

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.layer(sample))


def exported(folder: Path) -> list[Path]:
    examples = [((torch.randn(batch, 32),), {}) for batch in (1, 2)]
    model = Small().eval()
    record = bgx.export_onnx(model, None, folder / "small.onnx", method=(), example_inputs=examples, verify=False)
    return [graph.path for graph in record.graphs]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return exported(tmp_path_factory.mktemp("small"))


def copied(paths: list[Path], folder: Path) -> list[Path]:
    shutil.copytree(paths[0].parent, folder, dirs_exist_ok=True)
    return [folder / path.name for path in paths]


def test_one_bit_of_the_weights(small: list[Path], tmp_path: Path) -> None:
    paths = copied(small, tmp_path)
    (data,) = tmp_path.glob("*.data")
    content = bytearray(data.read_bytes())
    content[1234] ^= 1
    data.write_bytes(content)
    message = rf"{paths[0].name} and {data.name}: the weights are not those that were exported"
    for opened in (paths, paths[0]):
        with pytest.raises(ExportError, match=message):
            OrtDenoiser(opened)


def test_one_bit_of_weights_within_the_graph(small: list[Path], tmp_path: Path) -> None:
    path = copied(small, tmp_path)[0]
    model = onnx.load(path, load_external_data=False)
    bias = next(tensor for tensor in model.graph.initializer if tensor.data_location != TensorProto.EXTERNAL)
    bias.raw_data = bytes([bias.raw_data[0] ^ 1]) + bias.raw_data[1:]
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ExportError, match="the weights are not those that were exported"):
        OrtDenoiser(path)


def test_a_weight_of_another_shape_or_name(small: list[Path], tmp_path: Path) -> None:
    """The bytes are the same, what they are is not."""
    path = copied(small, tmp_path)[0]
    rewrite(path, lambda model: model.graph.initializer[0].dims.insert(0, 1))
    with pytest.raises(ExportError, match="the weights are not those that were exported"):
        OrtDenoiser(path)


def unlisted(second: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """May be written to and searched, not listed."""

    scandir = os.scandir

    def refused(path: Any) -> Any:
        if Path(path) == second.parent:
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refused)


def linked(second: Path) -> None:
    elsewhere = second.with_suffix("")
    elsewhere.mkdir()
    second.rename(elsewhere / second.name)
    (data,) = second.parent.glob("*.data")
    (elsewhere / data.name).symlink_to(data)


NEIGHBOURS: dict[str, Callable[[Path, pytest.MonkeyPatch], object]] = {
    "readable": lambda second, _: None,
    "empty": lambda second, _: second.write_bytes(b""),
    "no graph": lambda second, _: second.write_bytes(b"no graph"),
    "cut short": lambda second, _: os.truncate(second, second.stat().st_size - 5),
    "another suffix": lambda second, _: second.rename(second.with_suffix(".onnx.bak")),
    "elsewhere, with a link": lambda second, _: linked(second),
    "unlisted": unlisted,
}


@pytest.mark.parametrize("neighbour", NEIGHBOURS)
def test_weights_of_other_graphs_are_never_deleted(
    neighbour: str, small: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever reads them, and whether or not that is to be seen from here."""
    first, second = copied(small, tmp_path)
    (data,) = tmp_path.glob("*.data")
    staged = tmp_path / "staged"
    staged.mkdir()
    save(staged / first.name, interface_of(KWARGS))
    with monkeypatch.context() as patch, caplog.at_level("WARNING"):
        NEIGHBOURS[neighbour](second, patch)
        files.publish(staged, tmp_path)
    OrtDenoiser(first)
    assert data.is_file()
    assert f"{data.name} (0.0 MB) held weights of the graphs that were replaced" in caplog.text


ODD: list[Any] = [
    None,
    True,
    False,
    -1,
    0,
    10**30,
    1e308,
    float("nan"),
    "",
    "__init__",
    "a" * 4000,
    "\ud800",
    "\0",
    [],
    {},
    [[]],
    {"a": {"b": [None]}},
    "../x",
    "float32",
    ["sample"],
    json.loads("[" * 90 + "]" * 90),
]


def mutated(value: Any, draw: random.Random) -> Any:
    """``value`` with one part of it changed, dropped or doubled."""
    if isinstance(value, dict) and value and draw.random() < 0.9:
        key = draw.choice(list(value))
        kind = draw.randrange(6)
        if kind == 0:
            return {name: item for name, item in value.items() if name != key}
        if kind == 1:
            return {**value, draw.choice(["__init__", "self", "items", "1", ""]): value[key]}
        return {**value, key: mutated(value[key], draw)}
    if isinstance(value, list) and value and draw.random() < 0.9:
        at = draw.randrange(len(value))
        kind = draw.randrange(5)
        if kind == 0:
            return value[:at] + value[at + 1 :]
        if kind == 1:
            return [*value, value[at]]
        return [*value[:at], mutated(value[at], draw), *value[at + 1 :]]
    return copy.deepcopy(draw.choice(ODD))


def text(value: Any) -> str:
    return json.dumps(value).encode("utf-8", "replace").decode()


def attempt(action: Callable[[], Any], allowed: type[BigainError]) -> Any:
    """What ``action`` returns, or None after an error of ours, in one line; of another error the test fails."""
    try:
        return action()
    except allowed as error:
        said = str(error)
    assert "\n" not in said
    assert len(said) < 1000
    return None


def test_no_metadata_breaks_the_reader() -> None:
    """Interfaces with some parts changed: they are read, and then a call works, or it is an error of ours."""
    draw, good, until = random.Random(16), edited(center=True), time.monotonic() + 4
    outcomes = Counter[bool]()
    while outcomes.total() < 3000 and time.monotonic() < until:
        metadata = dict(good)
        for entry in draw.choices(["interface", "interface", "config", "grid", "method"], k=draw.randrange(1, 4)):
            if entry in ("grid", "method"):
                metadata[entry] = str(draw.choice(ODD))
            else:
                metadata[entry] = text(mutated(json.loads(good[entry]), draw))
        if draw.random() < 0.1:
            metadata["interface"] = metadata["interface"][: draw.randrange(len(metadata["interface"]))]
        interface = attempt(lambda metadata=metadata: Interface.from_metadata(metadata), ExportError)
        outcomes[interface is not None] += 1
        if interface:
            interface.output([torch.zeros(1)] * len(interface.outputs))
    assert outcomes[True] > 5
    assert outcomes[False] > 50


def scrambled(model: onnx.ModelProto, draw: random.Random) -> None:
    """Change one field of a tensor, its place, or the metadata."""
    tensor = draw.choice(list(model.graph.initializer))
    kind = draw.randrange(8)
    if kind == 0:
        tensor.data_type = draw.choice([0, 2, 8, 14, 16, 17, 21, 22, 23, 99, -1])
    elif kind == 1 and tensor.dims:
        tensor.dims[draw.randrange(len(tensor.dims))] = draw.choice([-1, 0, 3, 2**31, 2**62, 2**63 - 1])
    elif kind == 2:
        tensor.dims.append(draw.choice([-5, 0, 1, 2**40]))
    elif kind == 3 and tensor.external_data:
        draw.choice(list(tensor.external_data)).value = str(draw.choice(ODD)).encode("utf-8", "replace").decode()
    elif kind == 4:
        key = draw.choice(["location", "offset", "length", "x", ""])
        tensor.external_data.add(key=key, value=draw.choice(["../a", "-1", "0", "4096", "1e9", "", "/", str(2**70)]))
    elif kind == 5:
        tensor.data_location = draw.choice([0, 1])
    elif kind == 6:
        tensor.name = draw.choice(["", "sample", "x" * 500])
    else:
        draw.choice(list(model.metadata_props)).value = draw.choice(["", "{", "[]", "null", "9" * 5000, "[" * 9999])


def test_no_field_breaks_the_loader(toy: Path, small: list[Path], tmp_path: Path) -> None:
    """Files with some fields changed, some bytes flipped or cut off: they run, or it is an error of ours."""
    draw, until = random.Random(16), time.monotonic() + 5
    folder = tmp_path / "several"
    path = copied(small, folder)[0]
    models = [(toy, toy.read_bytes(), KWARGS), (path, path.read_bytes(), {"sample": torch.ones(1, 32)})]
    outcomes = Counter[bool]()
    while outcomes.total() < 400 and time.monotonic() < until:
        where, content, kwargs = draw.choice(models)
        if draw.random() < 0.7:
            model = onnx.load_model_from_string(content)
            for _ in range(draw.randrange(1, 4)):
                scrambled(model, draw)
            where.write_bytes(model.SerializeToString())
        elif draw.random() < 0.5:
            where.write_bytes(content[: draw.randrange(len(content))])
        else:
            broken = bytearray(content)
            # Not within names of operators or the like, where the runtime's own checks are the ones at work.
            at = content.index(b"interface") + draw.randrange(600)
            broken[at % len(broken)] ^= 1 << draw.randrange(8)
            where.write_bytes(broken)
        denoiser = attempt(lambda where=where: OrtDenoiser(where), ExportError)
        outcomes[denoiser is not None] += 1
        if denoiser:
            attempt(lambda denoiser=denoiser, kwargs=kwargs: denoiser(**kwargs), bgx.InputError)
        where.write_bytes(content)
    assert outcomes[True] > 0
    assert outcomes[False] > 20
