"""Several shapes in one package: a graph for each, the weights once in the file and in memory."""

from __future__ import annotations

import gc
import json
import random
import time
import zipfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bigain_fx as bgx
from bigain_fx.export import package as package_module
from bigain_fx.export.archive import Archive
from bigain_fx.export.interface import Interface
from bigain_fx.passes.errors import BigainError, ExportError
from tests.test_damaged_files import attempt, mutated, text

SIDE = 256
pytestmark = pytest.mark.slow


class Toy(nn.Module):
    """Two layers of one weight, what a compiled graph folds, and a weight that is not dense."""

    def __init__(self) -> None:
        super().__init__()
        self.config = {"sample_size": 8}
        self.first = nn.Linear(SIDE, SIDE)
        self.second = nn.Linear(SIDE, SIDE)
        self.second.weight = self.first.weight
        self.register_buffer("turned", torch.randn(SIDE, SIDE).t())
        self.register_buffer("table", torch.arange(3 * SIDE).reshape(3, SIDE)[:, ::3])

    def forward(self, sample: Tensor, timestep: Tensor, text: Tensor, return_dict: bool = True) -> Any:
        hidden = torch.relu(self.second(self.first(sample))) @ self.turned + timestep + self.table.sum() * 1e-6
        return (hidden + text.mean(),)


def call(batch: int, text: int = 5) -> dict[str, Any]:
    return {"sample": torch.randn(batch, SIDE), "timestep": torch.tensor(5.0), "text": torch.randn(batch, text)}


CALLS = [call(1), call(2)]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return Toy().eval().requires_grad_(False)


@pytest.fixture(scope="module")
def package(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("shapes") / "toy.pt2"
    bgx.export_package(model, None, path, method=(), example_inputs=[((), kwargs) for kwargs in CALLS])
    assert [file.name for file in path.parent.iterdir()] == ["toy.pt2"]
    return path


def test_each_shape_is_answered_by_its_graph(package: Path, model: nn.Module) -> None:
    deployed = bgx.load_package(package)
    for kwargs in (*CALLS, call(1)):
        for timestep in (5, torch.tensor([5.0]), kwargs["timestep"]):
            given = kwargs | {"timestep": timestep}
            torch.testing.assert_close(deployed(**given)[0], model(**given)[0], atol=1e-5, rtol=1e-5)
    with pytest.raises(bgx.InputError, match=rf"sample has shape \(3, {SIDE}\), there are graphs for \(1, {SIDE}\) or"):
        deployed(**call(3))
    with pytest.raises(bgx.InputError, match=r"text has shape \(2, 9\), the graph takes \(2, 5\)"):
        deployed(**call(2, text=9))
    with pytest.raises(bgx.InputError, match="sample is missing"):
        deployed(timestep=1, text=CALLS[0]["text"])


def test_weights_are_there_once(package: Path, model: nn.Module) -> None:
    weights = sum(tensor.nbytes for tensor in (*model.parameters(), model.turned))  # type: ignore[misc]
    with zipfile.ZipFile(package) as archive:
        held = {info.filename.split("/", 1)[1]: info.file_size for info in archive.infolist()}
        index = json.loads(archive.read("archive/bigain/index.json"))
    assert weights <= held["bigain/weights"] < weights + 8 * 4096
    assert all(size < 2_500_000 for name, size in held.items() if name != "bigain/weights")
    assert len(index["graphs"]) == len(CALLS)
    graphs = list(Archive(package).constants(torch.device("cpu")).values())
    assert len(graphs) == len(CALLS)
    for name, tensor in graphs[0].items():
        assert {other[name].data_ptr() for other in graphs if name in other} == {tensor.data_ptr()}
    # Mapped, not read: a private copy would be another one for each call.
    again = Archive(package).constants(torch.device("cpu"))
    assert {tensor.untyped_storage().nbytes() for tensor in again["graph-000"].values()} == {package.stat().st_size}


def test_two_of_one_size(model: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(bgx.InputError, match="example_inputs has two of one size"):
        bgx.export_package(model, None, tmp_path / "t.pt2", method=(), example_inputs=[((), CALLS[0])] * 2)
    with pytest.raises(bgx.InputError, match="example_inputs is given beside args or kwargs"):
        bgx.export_package(model, None, tmp_path / "t.pt2", kwargs=CALLS[0], method=(), example_inputs=[((), CALLS[1])])
    assert not list(tmp_path.iterdir())


def damaged(package: Path, folder: Path, entry: str, change: Any) -> Path:
    """A copy of the package with the bytes of one entry changed, its archive whole."""
    path = folder / "damaged.pt2"
    with zipfile.ZipFile(package) as source, zipfile.ZipFile(path, "w") as target:
        for name in source.namelist():
            content = source.read(name)
            target.writestr(name, change(content) if name.endswith(entry) else content)
    return path


def flipped(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


@pytest.mark.parametrize("entry", ["bigain/weights", ".so"])
def test_one_bit_of_weights_or_code(package: Path, tmp_path: Path, entry: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = damaged(package, tmp_path, entry, flipped)
    monkeypatch.setattr(torch._C._aoti, "AOTIModelPackageLoader", lambda *args: pytest.fail("its code was loaded"))
    with pytest.raises(ExportError, match=r"damaged.pt2 is damaged .*not those that were exported\); export it again"):
        bgx.load_package(path)


def test_an_archive_that_was_packed_again_still_loads(package: Path, model: nn.Module, tmp_path: Path) -> None:
    """Weights then lie where no compiled code would read them: they are copied."""
    path = damaged(package, tmp_path, "nothing", flipped)
    torch.testing.assert_close(bgx.load_package(path)(**CALLS[0])[0], model(**CALLS[0])[0], atol=1e-5, rtol=1e-5)


def test_a_package_of_an_older_version(package: Path, tmp_path: Path) -> None:
    path = tmp_path / "old.pt2"
    with zipfile.ZipFile(package) as source, zipfile.ZipFile(path, "w") as target:
        for name in source.namelist():
            if "bigain" not in name:
                target.writestr(name.replace("graph-000", "model"), source.read(name))
    with pytest.raises(ExportError, match=r"old.pt2 was made by another version of bigain-fx; export it again"):
        bgx.load_package(path)


def test_graphs_of_two_models_are_no_package(package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = Interface.from_metadata
    names = iter(["one", "two"])

    def renamed(metadata: dict[str, str]) -> Interface:
        return read({**metadata, "method": next(names)})

    monkeypatch.setattr(package_module.Interface, "from_metadata", renamed)
    with pytest.raises(ExportError, match="damaged: its graphs are not of one model"):
        bgx.load_package(package)


def test_no_field_breaks_the_loader(package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packages with some fields of the index or the metadata changed: an error of ours, or what was exported."""
    monkeypatch.setattr(torch._C._aoti, "AOTIModelPackageLoader", lambda *args: SimpleNamespace(load_constants=len))
    monkeypatch.setattr(package_module.Package, "_load", lambda self, name, weights, metadata: weights)
    draw, until, outcomes = random.Random(16), time.monotonic() + 4, Counter[bool]()
    expected = [package_module.Package(package).graphs[number].run for number in range(len(CALLS))]
    while outcomes.total() < 300 and time.monotonic() < until:
        entry = draw.choice(["index.json", "index.json", "_metadata.json"])

        def change(content: bytes) -> bytes:
            value = mutated(json.loads(content), draw)
            return text(value if draw.random() < 0.9 else [value]).encode()

        path = damaged(package, tmp_path, entry, change)
        found = attempt(lambda path=path: package_module.Package(path), BigainError)
        outcomes[found is not None] += 1
        if found:  # a part that nothing depends on
            assert [list(graph.run) for graph in found.graphs] == [list(weights) for weights in expected]
            for graph, weights in zip(found.graphs, expected, strict=True):
                assert all(torch.equal(graph.run[name], tensor) for name, tensor in weights.items())
    assert outcomes[False] > 20


def test_the_weights_of_two_names_swapped(package: Path, tmp_path: Path) -> None:
    def change(content: bytes) -> bytes:
        index = json.loads(content)
        first, second = (field for field in index["graphs"]["graph-000"].values() if field["shape"] == [SIDE])
        first["offset"], second["offset"] = second["offset"], first["offset"]
        return json.dumps(index).encode()

    with pytest.raises(ExportError, match="not those that were exported"):
        bgx.load_package(damaged(package, tmp_path, "index.json", change))


def test_memory_on_a_device_is_freed_with_the_last_graph() -> None:
    """What torch itself would keep for good; a CPU's weights are pages of the file."""
    runs, weight = [lambda: 1, lambda: 2], torch.ones(4)
    package_module.free_with(runs, [weight])
    runs.pop()
    gc.collect()
    assert weight.untyped_storage().nbytes() == 16
    runs.pop()
    gc.collect()
    assert weight.untyped_storage().nbytes() == 0
