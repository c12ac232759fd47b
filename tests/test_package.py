"""AOTInductor packages: the numbers of the rewritten graph, in another process, with no compiler to be found."""

from __future__ import annotations

import errno
import inspect
import json
import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import pytest
import torch
import torch._inductor.package.package
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

import bigain_fx as bgx
from bigain_fx.calls import CallBinder, flat_tensors
from bigain_fx.capture import capture
from bigain_fx.deployed import PackagedDenoiser, load_package
from bigain_fx.export import package as package_module
from bigain_fx.export.archive import read_metadata
from bigain_fx.export.interface import Interface, describe
from bigain_fx.export.package import Package, write_package
from bigain_fx.families import resolve
from bigain_fx.passes.errors import ExportError
from bigain_fx.passes.methods import normalize
from bigain_fx.passes.pipeline import rewrite
from tests import toys
from tests.test_optimize import dit, unet

METHODS = (bgx.LaplacianMerge(0.5), bgx.KVDownsample(2))
IMAGE = toys.image()


def exported(model: nn.Module, kwargs: dict[str, Any], methods: Any) -> tuple[ExportedProgram, Interface]:
    """The rewritten graph on flat inputs, and its interface."""
    binder = CallBinder(model)
    arguments, _ = binder.bind((), kwargs)
    captured = capture(model, arguments)
    methods = resolve(normalize(methods), model)
    rewritten = rewrite(captured.module, methods)
    flat = flat_tensors(arguments)
    with torch.no_grad():
        program = torch.export.export(rewritten.module, tuple(flat), strict=False)
        outputs = pytree.tree_leaves(rewritten.module(*flat))
    versions = {"bigain_fx": bgx.__version__, "torch": torch.__version__}
    method = "+".join(map(str, methods)) or "dense"
    return program, describe(
        model, binder.signature, arguments, captured.out_spec, outputs, method, None, versions
    )  # fmt: skip


def toy() -> nn.Module:
    torch.manual_seed(0)
    return toys.Separate().eval()


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One real compilation, for the tests of this file."""
    path = tmp_path_factory.mktemp("package") / "toy.pt2"
    report = bgx.export_package(toy(), (IMAGE,), path, method=METHODS)
    assert [site.action for site in report.sites] == ["merge+kv"]
    assert [file.name for file in path.parent.iterdir()] == ["toy.pt2"]
    return path


def reference(model: nn.Module, kwargs: dict[str, Any], methods: Any) -> Any:
    return bgx.optimize(model, None, kwargs, method=methods, backend="eager")(**kwargs)


def test_a_package_gives_the_rewritten_graphs_numbers(package: Path) -> None:
    deployed = load_package(package)
    assert isinstance(deployed, PackagedDenoiser)
    assert (deployed.interface.method, deployed.dtype, deployed.device.type) == (
        "bigain-td:2:0.9+bigain-tm:0.5", torch.float32, "cpu",
    )  # fmt: skip
    for image in (IMAGE, torch.randn_like(IMAGE), IMAGE.to(memory_format=torch.channels_last), IMAGE.flip(0)):
        expected = reference(toy(), {"image": image}, METHODS)
        torch.testing.assert_close(deployed(image), expected, atol=1e-5, rtol=1e-5)
    sliced = torch.cat([IMAGE.new_zeros(1), IMAGE.flatten()])[1:].view_as(IMAGE)
    assert torch.equal(deployed(sliced), deployed(IMAGE))
    assert not torch.equal(deployed(IMAGE), toy()(IMAGE))


@pytest.mark.slow
def test_a_package_of_a_grid_that_the_factor_does_not_divide(tmp_path: Path) -> None:
    kwargs = {"image": torch.randn(2, 3, 5, 7)}
    report = bgx.export_package(toy(), None, tmp_path / "odd.pt2", kwargs=kwargs, method=bgx.KVDownsample(3))
    assert [(site.tokens, site.tokens_after) for site in report.sites] == [(35, 6)]
    found = load_package(tmp_path / "odd.pt2")(**kwargs)
    torch.testing.assert_close(found, reference(toy(), kwargs, bgx.KVDownsample(3)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("image", [IMAGE[:1], IMAGE.half(), IMAGE.to("meta")], ids=["shape", "dtype", "device"])
def test_a_wrong_input_does_not_reach_the_machine_code(package: Path, image: Tensor) -> None:
    with pytest.raises(bgx.InputError, match="image"):
        load_package(package)(image)


def test_the_metadata_is_read_without_loading(package: Path) -> None:
    metadata = read_metadata(package)
    _, interface = exported(toy(), {"image": IMAGE}, METHODS)
    found = Interface.from_metadata(metadata)
    assert found.grid is not None
    assert replace(found, grid=None) == interface
    assert metadata["AOTI_DEVICE_KEY"] == "cpu"
    assert Package(package).graphs[0].metadata == metadata


ELSEWHERE = """
import subprocess, sys, torch
import torch._inductor.codecache, torch._inductor.compile_fx, torch._dynamo.utils

def refuse(*args, **kwargs):
    raise AssertionError("compiled, traced or started a process")

torch.compile = torch.export.export = torch._inductor.compile_fx.compile_fx = subprocess.Popen = refuse
torch._inductor.codecache.CppCodeCache.load_async = torch._inductor.codecache.AotCodeCompiler.compile = refuse
from bigain_fx.deployed import load_package
path, data = sys.argv[1:]
kwargs, expected = torch.load(data)
output = load_package(path)(**kwargs, return_dict=False)
found = output[0] if isinstance(output, tuple) else output
torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
assert not torch._dynamo.utils.counters
print("same")
"""


def runs_elsewhere(path: Path, kwargs: dict[str, Any], expected: Tensor, folder: Path) -> None:
    """In a process that has no compiler, no cache, and fails when it traces or compiles."""
    data, cache = folder / "data.pt", folder / "cache"
    torch.save((kwargs, expected), data)
    environment = {key: value for key, value in os.environ.items() if key not in ("PATH", "CXX", "CC")}
    environment |= {"PATH": str(folder / "empty"), "TORCHINDUCTOR_CACHE_DIR": str(cache)}
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, str(path), str(data)], capture_output=True, text=True, timeout=120,
        env=environment, cwd=Path(__file__).parent.parent,
    )  # fmt: skip
    assert done.stdout.strip() == "same", done.stderr
    assert not [file for file in cache.rglob("*") if file.is_file()]


@pytest.mark.slow
def test_a_package_runs_in_another_process(package: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere.pt2"
    shutil.copy(package, moved)
    runs_elsewhere(moved, {"image": IMAGE}, reference(toy(), {"image": IMAGE}, METHODS), tmp_path)


UNET = {
    "sample": torch.randn(2, 4, 8, 8),
    "timestep": torch.tensor(5.0),
    "encoder_hidden_states": torch.randn(2, 5, 16),
}
DIT = {"hidden_states": torch.randn(2, 4, 16, 16), "timestep": torch.tensor([3.0, 8.0]),
       "class_labels": torch.tensor([1, 2])}  # fmt: skip
SCHEDULED = (bgx.LaplacianMerge(0.5), bgx.KVDownsample(2, bgx.LinearAlpha()))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "kwargs", "methods"),
    [
        (unet, UNET, SCHEDULED[:1]),
        (unet, UNET, SCHEDULED[1:]),
        (unet, UNET, SCHEDULED),
        (dit, DIT, SCHEDULED),
        (dit, DIT, (bgx.LaplacianMerge(0.5, proportional=True, unmerge="blend", cell_layout="row"),)),
        (dit, DIT, (bgx.BlockPool(0.5),)),
    ],
    ids=["unet-tm", "unet-td", "unet-both", "dit-both", "dit-blend", "dit-pool"],
)
def test_denoisers(make: Any, kwargs: dict[str, Any], methods: Any, tmp_path: Path) -> None:
    program, interface = exported(make(), kwargs, methods)
    path = tmp_path / "denoiser.pt2"
    write_package([(program, interface.to_metadata())], path)
    expected = reference(make(), kwargs, methods).sample
    deployed = load_package(path)
    torch.testing.assert_close(deployed(**kwargs).sample, expected, atol=1e-5, rtol=1e-5)
    assert deployed.config.sample_size == make().config.sample_size
    runs_elsewhere(path, kwargs, expected, tmp_path)


def damage(kind: str, path: Path) -> None:
    whole = path.read_bytes()
    if kind == "missing":
        path.unlink()
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "noise":
        path.write_bytes(b"no package at all")
    elif kind == "half":
        path.write_bytes(whole[: len(whole) // 2])
    elif kind == "one byte less":
        path.write_bytes(whole[:-1])
    else:
        with zipfile.ZipFile(path) as archive:
            entries = {name: archive.read(name) for name in archive.namelist()}
        keep = {
            "other zip": "byteorder",
            "no code": ("json", "weights"),
            "no metadata": (".so", "weights", "index.json"),
            "no weights": (".so", "json"),
        }[kind]
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in entries.items():
                if name.endswith(keep):
                    archive.writestr(name, content)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "toy.pt2 is not there"),
        ("empty", "toy.pt2 is cut short, or no AOTInductor package"),
        ("noise", "toy.pt2 is cut short, or no AOTInductor package"),
        ("half", "toy.pt2 is cut short, or no AOTInductor package"),
        ("one byte less", "toy.pt2 is cut short, or no AOTInductor package"),
        ("other zip", "toy.pt2 is an archive, but no whole AOTInductor package"),
        ("no metadata", "toy.pt2 is an archive, but no whole AOTInductor package"),
        ("no code", "toy.pt2 is damaged .*its weights or its code are not those that were exported"),
        ("no weights", "toy.pt2 is damaged .*bigain/weights"),
    ],
)
def test_a_damaged_package(package: Path, tmp_path: Path, kind: str, message: str) -> None:
    path = Path(shutil.copy(package, tmp_path))
    damage(kind, path)
    with pytest.raises(ExportError, match=message) as caught:
        load_package(path)
    assert "\n" not in str(caught.value)


def test_code_that_torch_cannot_load(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any) -> None:
        raise RuntimeError("undefined symbol\nand more")

    monkeypatch.setattr(torch._C._aoti, "AOTIModelPackageLoader", fails)
    with pytest.raises(ExportError, match=r"torch .* cannot load .*toy.pt2, made with torch .*: undefined symbol$"):
        load_package(package)


def rewritten_metadata(package: Path, path: Path, metadata: str) -> Path:
    with zipfile.ZipFile(package) as source, zipfile.ZipFile(path, "w") as target:
        for name in source.namelist():
            target.writestr(name, metadata if name.endswith("_metadata.json") else source.read(name))
    return path


def test_a_package_of_someone_else_is_not_loaded(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = rewritten_metadata(package, tmp_path / "other.pt2", '{"AOTI_DEVICE_KEY": "cpu"}')
    monkeypatch.setattr(torch._C._aoti, "AOTIModelPackageLoader", lambda *args: pytest.fail("its code was loaded"))
    with pytest.raises(ExportError, match=r"other.pt2: not made by bigain-fx"):
        load_package(path)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"AOTI_DEVICE_KEY": "cuda"}, "toy.pt2 is compiled for cuda, which torch does not see here"),
        ({"AOTI_DEVICE_KEY": "xpu"}, "toy.pt2 is compiled for xpu, which torch does not see here"),
        ({"AOTI_CPU_ISA": "AVX512 AVX512_VNNI"}, "toy.pt2 is compiled for AVX512 AVX512_VNNI, this processor has AVX2"),
    ],
)
def test_a_package_for_what_is_not_there(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, entry: dict[str, str], message: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    metadata = {**read_metadata(package), "AOTI_CPU_ISA": "AVX2", **entry}
    path = rewritten_metadata(package, tmp_path / "toy.pt2", json.dumps(metadata))
    with pytest.raises(bgx.InputError, match=message):
        load_package(path)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("before", [None, b"an older file"])
def test_a_failed_write_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, before: bytes | None
) -> None:
    program, interface = exported(toy(), {"image": IMAGE}, ())
    path = tmp_path / "toy.pt2"
    if before is not None:
        path.write_bytes(before)

    def full(package_path: IO[bytes], files: Any) -> None:
        package_path.write(b"half")
        raise error

    monkeypatch.setattr(package_module, "_compile", lambda program, metadata: ([], {}))
    monkeypatch.setattr(torch._inductor.package.package, "package_aoti", full)
    with pytest.raises((ExportError, KeyboardInterrupt)) as caught:
        write_package([(program, interface.to_metadata())], path)
    if isinstance(error, OSError):
        assert str(caught.value) == f"{path} is not written: [Errno 28] No space left on device"
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == ([("toy.pt2", before)] if before else [])


def test_a_file_that_torch_cut_short_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program, interface = exported(toy(), {"image": IMAGE}, ())
    monkeypatch.setattr(package_module, "_compile", lambda program, metadata: ([], {}))
    monkeypatch.setattr(torch._inductor.package.package, "package_aoti", lambda path, files: path.write(b"half"))
    with pytest.raises(ExportError, match=r"toy.pt2 is not written: .*cut short"):
        write_package([(program, interface.to_metadata())], tmp_path / "toy.pt2")
    assert not list(tmp_path.iterdir())


FULL = """
import resource, signal, sys, torch, torch._inductor.package.package
from pathlib import Path
from torch.export.pt2_archive._package import PT2ArchiveWriter
from bigain_fx.export import package

def archive(package_path, files):
    with PT2ArchiveWriter(package_path) as writer:
        writer.write_bytes("data/aotinductor/model/weights", bytes(100_000))

package._compile = lambda program, metadata: ([], {})
torch._inductor.package.package.package_aoti = archive
program = torch.export.export(torch.nn.ReLU(), (torch.zeros(3),))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
try:
    package.write_package([(program, {"a": "b"})], Path(sys.argv[1]))
except Exception as error:
    print(type(error).__name__, error)
"""


def test_a_real_write_that_fails(tmp_path: Path) -> None:
    """Files may grow to 10,000 bytes; torch's archive writer would end the process."""
    path = tmp_path / "toy.pt2"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FULL, str(path)], capture_output=True, text=True, timeout=120,
        cwd=Path(__file__).parent.parent,
    )  # fmt: skip
    assert (done.returncode, done.stdout.strip()) == (
        0,
        f"ExportError {path} is not written: [Errno 27] File too large",
    )
    assert not list(tmp_path.iterdir())


def test_without_a_compiler(tmp_path: Path) -> None:
    program, interface = exported(toy(), {"image": IMAGE}, ())
    with (
        torch._inductor.config.patch({"cpp.cxx": (str(tmp_path / "no-such-compiler"),)}),
        pytest.raises(ExportError, match=r"toy.pt2 is not written: ") as caught,
    ):
        write_package([(program, interface.to_metadata())], tmp_path / "toy.pt2")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["toy.onnx", "none/toy.pt2"])
def test_a_path_that_cannot_be(tmp_path: Path, name: str) -> None:
    program, interface = exported(toy(), {"image": IMAGE}, ())
    with pytest.raises(bgx.InputError, match=r"path=.* must end in .pt2, in a folder that is there"):
        write_package([(program, interface.to_metadata())], tmp_path / name)


def test_a_strided_example_is_refused(tmp_path: Path) -> None:
    program, interface = exported(toy(), {"image": IMAGE.to(memory_format=torch.channels_last)}, ())
    with pytest.raises(ExportError, match="example input 0 is not contiguous"):
        write_package([(program, interface.to_metadata())], tmp_path / "toy.pt2")


def test_a_tensor_is_an_output(package: Path) -> None:
    interface = Package(package).graphs[0].interface
    assert [(port.name, port.path) for port in interface.outputs] == [("out_image", ())]
    assert replace(interface, grid=(4, 6)).grid == (4, 6)
    assert interface.parameters == tuple(inspect.signature(toys.Separate.forward).parameters)[1:]
