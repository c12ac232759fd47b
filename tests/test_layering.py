"""Folders depend one way, importing does nothing, and the public names are what is documented."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import bigain_fx

ROOT = Path(__file__).parent.parent
MAY_IMPORT = {
    "passes": {"bigain_fx.passes", "torch", "triton"},
    "export": {"bigain_fx.export", "bigain_fx.passes", "torch", "numpy", "onnx", "onnx_ir", "onnxscript",
               "onnxruntime"},
    "bigain_fx": {
        "bigain_fx", "torch", "diffusers", "rich", "typer", "safetensors", "matplotlib", "mlxtend", "numpy",
        "onnxruntime", "datasets", "skimage", "torchmetrics", "PIL",
    },
    "bench": {"bigain_fx", "torch", "diffusers", "matplotlib", "rich", "typer", "numpy", "onnxruntime", "tomesd"},
}  # fmt: skip


def sources(folder: str) -> list[Path]:
    links = [ROOT / "bigain_fx" / name for name in ("passes", "export", "bench")]
    return [path for path in (ROOT / folder).rglob("*.py") if not any(map(path.is_relative_to, links))]


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.split(".")[0] not in sys.stdlib_module_names}


def within(name: str, packages: set[str]) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_folders_depend_one_way(folder: str) -> None:
    for path in sources(folder):
        for name in imports(path):
            assert within(name, MAY_IMPORT[folder]), f"{path.relative_to(ROOT)} imports {name}"
            if folder == "bigain_fx" and path.name != "cli.py":
                assert not within(name, {"bigain_fx.bench"}), f"{path.relative_to(ROOT)} reaches up to {name}"


def test_only_surgery_creates_nodes() -> None:
    makers = {"call_function", "get_attr", "call_module", "placeholder", "create_node", "node_copy", "graph_copy"}
    for path in sources("passes"):
        calls = {node.func.attr for node in ast.walk(ast.parse(path.read_text()))
                 if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)}  # fmt: skip
        assert path.name == "surgery.py" or not calls & makers, f"{path.name} creates nodes"


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_files_stay_small(folder: str) -> None:
    for path in sources(folder):
        assert len(path.read_text().splitlines()) <= 320, path.name


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_is_lazy() -> None:
    out = python("import sys, bigain_fx; print(sorted({'torch', 'diffusers', 'onnx', 'rich'} & set(sys.modules)))")
    assert out.strip() == "[]"


def test_passes_need_torch_alone() -> None:
    blocked = ("diffusers", "onnx", "onnxruntime", "onnxscript", "rich", "typer", "matplotlib", "mlxtend", "triton")
    code = f"import sys\nfor n in {blocked!r}: sys.modules[n] = None\n"
    assert python(code + "import bigain_fx.passes.pipeline as p; print(p.REWRITES.keys())").strip()


def test_triton_is_imported_by_the_kernels_alone() -> None:
    users = [path.name for path in sources("passes") if any(within(name, {"triton"}) for name in imports(path))]
    assert users == ["triton_kernels.py"]
    code = "import sys, bigain_fx.passes.pipeline; print('bigain_fx.passes.ops.triton_kernels' in sys.modules)"
    assert python(code).strip() == "False"


def test_optimize_needs_no_diffusers() -> None:
    code = "import sys; sys.modules['diffusers'] = None; import bigain_fx; bigain_fx.optimize; bigain_fx.ToMe; print(1)"
    assert python(code).strip() == "1"


def test_importing_changes_no_global_state() -> None:
    code = """
import os, random, warnings, logging, torch
import torch._dynamo, torch._inductor.config as inductor
import diffusers.configuration_utils, diffusers.utils  # what requests does to the filters is its own
def state():
    return (dict(os.environ), torch.get_default_dtype(), torch.get_num_threads(), torch.get_float32_matmul_precision(),
            torch.is_grad_enabled(), torch.get_rng_state().tolist(), random.getstate(), list(warnings.filters),
            torch._dynamo.config.shallow_copy_dict(), inductor.shallow_copy_dict(), logging.getLogger().handlers[:],
            logging.getLogger().level, torch.cuda.is_initialized())
before = state()
import bigain_fx.denoiser, bigain_fx.report, bigain_fx.models, bigain_fx.cli, bigain_fx.bench
import bigain_fx.passes.pipeline, bigain_fx.backend, bigain_fx.deploy
after = state()
print([i for i, (a, b) in enumerate(zip(before, after)) if a != b])
"""
    assert python(code).strip() == "[]"


def test_the_public_api() -> None:
    assert sorted(bigain_fx.__all__) == [
        "AlphaCalibration", "BigainError", "BlockPool", "CaptureError", "Classification", "Destinations",
        "DiffusionClassifier", "ExportError", "ExportRecord", "GridError", "InputError", "KVDownsample",
        "LaplacianMerge", "LinearAlpha", "Merge", "MethodError", "OptimizedDenoiser", "OrtDenoiser", "PackagedDenoiser",
        "RatioCalibration", "Report", "RewriteError", "Summary", "ToDo", "ToMe", "calibrate", "clear_times",
        "destination_rule", "disable", "enable", "export_onnx", "export_package", "inspect", "load_package", "optimize",
        "preset", "summary",
    ]  # fmt: skip
    for name in bigain_fx.__all__:
        assert getattr(bigain_fx, name).__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        bigain_fx.nothing  # noqa: B018


def test_ci_runs_the_readme_test_command() -> None:
    readme, ci = (ROOT / "README.md").read_text(), (ROOT / ".ci" / "run").read_text()
    command = next(line.strip() for line in readme.splitlines() if "pytest" in line and "pip install" in line)
    assert command in ci.replace(" -q -e", " -e")
