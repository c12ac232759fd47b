"""``export_onnx``: every architecture, every method, judged by ONNX Runtime; and files that are whole or not there."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import diffusers
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import bigain_fx as bgx
from bigain_fx import embedded
from bigain_fx.export import files, onnx_graph
from bigain_fx.models import KNOWN, example_inputs
from bigain_fx.passes.grammar import parse
from tests.test_optimize import dit, unet
from tests.test_sample import _one_thread  # noqa: F401

BETTER = "bigain-tm:0.7:proportional=true:unmerge=blend"
CHEAP = "bigain-tm:0.7:window=8"
METHODS = [
    "dense",
    "bigain-tm:0.7",
    "bigain-td:2",
    "bigain-td:2:0.8..1.2",
    "bigain-tm:0.7+bigain-td:2:0.8..1.2",
    BETTER,
]
BOUNDS = {torch.float32: 1e-4, torch.float16: 1e-2}
SMALL: dict[str, dict[str, Any]] = {
    "sd2": {"block_out_channels": (32, 64, 64, 64), "attention_head_dim": (2, 4, 4, 4), "cross_attention_dim": 32},
    "sdxl": {
        "block_out_channels": (32, 64, 64), "attention_head_dim": (2, 4, 4), "cross_attention_dim": 32,
        "transformer_layers_per_block": (1, 2, 3), "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 80,
    },
    "dit-xl-2": {"num_layers": 3, "num_attention_heads": 4, "attention_head_dim": 16},
    "pixart": {
        "num_layers": 3, "num_attention_heads": 4, "attention_head_dim": 16, "cross_attention_dim": 64,
        "caption_channels": 32,
    },
}  # fmt: skip
"""What is less than in the published configuration: width everywhere, depth of the transformers."""
REWRITTEN = {"mnist-unet": 3, "mnist-dit": 6, "sd2": 5, "sdxl": 10, "dit-xl-2": 3, "pixart": 3}
"""Attentions on the finest grid."""
OURS = {
    "dense": {},
    "bigain-tm:0.7": {"LaplacianMergePlan": 1, "Merge": 1, "Unmerge": 1},
    "bigain-td:2": {"KVDownsample": 1},
    "bigain-td:2:0.8..1.2": {"KVDownsample": 1, "LinearAlpha": 0},
    "bigain-tm:0.7+bigain-td:2:0.8..1.2": {
        "KVDownsample": 1, "LaplacianMergePlan": 1, "LinearAlpha": 0, "Merge": 1, "Unmerge": 1,
    },
    BETTER: {"LaplacianMergePlan": 1, "Merge": 1, "GroupSizes": 1, "NearestGroups": 1, "Blend": 1},
    CHEAP: {"LaplacianMergePlan": 1, "Merge": 1, "Unmerge": 1},
}  # fmt: skip
"""Functions of ours, as many a rewritten attention; 0 is one for all of them."""


def model_of(name: str) -> tuple[nn.Module, dict[str, Any]]:
    if name in SMALL:
        torch.manual_seed(0)
        kind, config = KNOWN[name]
        model = getattr(diffusers, kind)(**config | SMALL[name] | {"sample_size": 16}).eval().requires_grad_(False)
        if kind == "DiTTransformer2DModel":
            nn.init.normal_(model.proj_out_2.weight)
        return model, example_inputs(model, 16, 2)
    model = embedded.load(name).model
    return model, example_inputs(model, 32, 2)


@pytest.fixture(scope="module")
def inputs() -> dict[str, Any]:
    return {"sample": torch.randn(2, 4, 8, 8), "timestep": 7, "encoder_hidden_states": torch.randn(2, 5, 16)}


FAST = {
    ("mnist-unet", "bigain-tm:0.7+bigain-td:2:0.8..1.2", torch.float32), ("dit-xl-2", "bigain-td:2", torch.float32),
    ("mnist-dit", BETTER, torch.float16), ("pixart", "bigain-tm:0.7", torch.float32),
}  # fmt: skip
CASES = [
    pytest.param(*case, marks=[] if case in FAST else pytest.mark.slow)
    for case in ((name, method, dtype) for name in REWRITTEN for method in METHODS for dtype in BOUNDS)
] + [pytest.param("mnist-unet", CHEAP, torch.float32, marks=pytest.mark.slow)]


@pytest.mark.parametrize(("name", "method", "dtype"), CASES)
def test_onnx_runtime_agrees_with_torch(name: str, method: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model, kwargs = model_of(name)
    path = tmp_path / "model.onnx"
    record = bgx.export_onnx(model, (), path, kwargs=kwargs, method=parse(method), dtype=dtype)
    assert record.deviations[0].relative_l2 <= BOUNDS[dtype]
    assert (record.graphs[0].plan_agreement is None) == ("LaplacianMergePlan" not in OURS[method])
    sites = REWRITTEN[name]
    expected = {f"bigain::{function}": count * sites or 1 for function, count in OURS[method].items()}
    assert {key: count for key, count in record.operators.items() if key.startswith("bigain")} == expected
    assert len(record.graphs[0].report.rewritten) == (0 if method == "dense" else sites)
    attentions = len(record.graphs[0].report.sites)
    masked = sites * ((name == "pixart") + (method == BETTER))  # its cross-attention; proportional attention
    assert record.operators["com.microsoft::MultiHeadAttention"] == attentions - masked
    proto = onnx.load(path)
    onnx.checker.check_model(proto)
    first = next(iter(kwargs))
    assert [value.name for value in proto.graph.output] == [f"out_{first}"]
    assert proto.graph.input[0].name == first
    assert {value.name for value in proto.graph.input} >= {"timestep"}
    assert record.bytes == path.stat().st_size


@pytest.mark.slow
@pytest.mark.parametrize(("opset", "expected"), [(18, "Softmax"), (22, "Softmax"), (23, "Attention")])
def test_standard_attention_is_what_the_opset_has(opset: int, expected: str, inputs: Any, tmp_path: Path) -> None:
    record = bgx.export_onnx(
        unet(), (), tmp_path / "a.onnx", kwargs=inputs, method=bgx.ToMe(0.5), opset=opset, attention="standard"
    )
    attentions = len(record.graphs[0].report.sites)
    assert record.opset == opset
    assert record.operators[expected] == attentions
    assert record.operators["bigain::MergePlan"] == 3
    assert not any(name.startswith("com.microsoft") for name in record.operators)
    proto = onnx.load(tmp_path / "a.onnx")
    assert {imported.domain: imported.version for imported in proto.opset_import} == {"": opset, "bigain": 1}


@pytest.mark.slow
def test_the_file_says_what_it_is_and_not_where_it_was_made(inputs: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.onnx"
    bgx.export_onnx(unet(), (), path, kwargs=inputs, method=bgx.KVDownsample(2, 0.5))
    proto = onnx.load(path)
    metadata = {entry.key: entry.value for entry in proto.metadata_props}
    assert metadata["method"] == "bigain-td:2:0.5"
    assert metadata["grid"] == "8x8"
    assert metadata["torch"] == torch.__version__
    assert metadata["bigain_fx"] == bgx.__version__
    assert metadata["opset"] == "20"
    assert '"cross_attention_dim": 16' in metadata["config"]
    content = path.read_bytes()
    for trace in (os.fspath(Path(torch.__file__).parent.parent), os.fspath(Path(__file__).parent.parent), 'File "'):
        assert trace.encode() not in content
    modules = {entry.value for node in proto.graph.node for entry in node.metadata_props}
    assert "down_blocks.0.attentions.0.transformer_blocks.0.attn1" in modules
    assert "conv_in.weight" in {tensor.name for tensor in proto.graph.initializer}


@pytest.mark.slow
def test_a_method_that_the_grammar_cannot_say_is_written_as_python(inputs: Any, tmp_path: Path) -> None:
    given = bgx.KVDownsample(2, bgx.LinearAlpha(t_noisy=900, t_clean=100))
    bgx.export_onnx(unet(), (), tmp_path / "a.onnx", kwargs=inputs, method=given)
    method = bgx.OrtDenoiser(tmp_path / "a.onnx").interface.method
    assert method == "KVDownsample(alpha=LinearAlpha(noisy=0.8, clean=1.2, t_noisy=900, t_clean=100))"


@pytest.mark.slow
def test_a_grid_that_the_factor_does_not_divide(inputs: Any, tmp_path: Path) -> None:
    odd, method = inputs | {"sample": torch.randn(2, 4, 7, 9)}, bgx.KVDownsample(2, bgx.LinearAlpha())
    record = bgx.export_onnx(unet(), (), tmp_path / "u.onnx", kwargs=odd, method=method)
    assert {(site.tokens, site.tokens_after) for site in record.graphs[0].report.rewritten} == {(63, 20)}
    assert record.operators["bigain::KVDownsampleCut"] > 0
    assert "bigain::KVDownsample" not in record.operators
    expected = bgx.optimize(unet(), method=method, backend="eager")(**odd).sample
    torch.testing.assert_close(bgx.OrtDenoiser(tmp_path / "u.onnx")(**odd).sample, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_sizes_share_one_weight_file(inputs: Any, tmp_path: Path) -> None:
    model = unet()
    wide = inputs | {"sample": torch.randn(2, 4, 8, 16)}
    record = bgx.export_onnx(
        model, None, tmp_path / "u.onnx", method=parse("tome:0.5"), example_inputs=[((), inputs), ((), wide)]
    )
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names[0] == "u-2x4x8x16.onnx"
    assert names[1] == "u-2x4x8x8.onnx"
    assert names[2].startswith("u-")
    assert names[2].endswith(".data")
    assert len(names) == 3
    assert record.bytes == sum(path.stat().st_size for path in tmp_path.iterdir())
    weights = sum(parameter.nbytes for parameter in model.parameters())
    assert (tmp_path / names[2]).stat().st_size < 1.5 * weights + 4096 * 200
    denoiser = bgx.OrtDenoiser([graph.path for graph in record.graphs])
    reference = bgx.optimize(model, method=parse("tome:0.5"), backend="eager")
    for kwargs in (inputs, wide):
        torch.testing.assert_close(denoiser(**kwargs).sample, reference(**kwargs).sample, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_weights_beside_the_graph_above_the_limit(
    inputs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(files, "LIMIT", 1000)
    path = tmp_path / "u.onnx"
    bgx.export_onnx(unet(), (), path, kwargs=inputs, method=())
    (first,) = tmp_path.glob("u-*.data")
    changed = unet()
    nn.init.zeros_(changed.conv_in.weight)
    for _ in range(2):
        bgx.export_onnx(changed, (), path, kwargs=inputs, method=(), verify=False)
    (second,) = set(tmp_path.glob("u-*.data")) - {first}  # named after what is in it
    assert sorted(tmp_path.iterdir()) == sorted([first, second, path])
    told = [record.message for record in caplog.records if record.name == "bigain_fx"]
    assert [message.split(" (")[0] for message in told] == [str(first)], "said once, when it is left"
    whole = second.read_bytes()
    second.write_bytes(whole[:-5000])
    with pytest.raises(bgx.ExportError, match="has its weights in"):
        bgx.OrtDenoiser(path)
    second.unlink()
    with pytest.raises(bgx.ExportError, match="is not there"):
        bgx.OrtDenoiser(path)


@pytest.mark.slow
def test_a_truncated_file(inputs: Any, tmp_path: Path) -> None:
    path = tmp_path / "u.onnx"
    bgx.export_onnx(unet(), (), path, kwargs=inputs, method=())
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(bgx.ExportError, match="cut short"):
        bgx.OrtDenoiser(path)


def test_pooling_has_no_onnx_form(inputs: Any, tmp_path: Path) -> None:
    with pytest.raises(bgx.ExportError, match=r"bigain.*has no ONNX form"):
        bgx.export_onnx(unet(), (), tmp_path / "u.onnx", kwargs=inputs, method=bgx.BlockPool(0.5))
    assert not list(tmp_path.iterdir())


def wrong_alpha(where: Any, x: Any, alpha: Any, grid: Any, factor: int) -> Any:
    return onnx_graph._kv_downsample(where, x, 0.1, grid, factor)


@pytest.mark.slow
def test_a_wrong_graph_leaves_nothing(inputs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "u.onnx"
    path.write_text("before")
    monkeypatch.setitem(onnx_graph._TABLE, torch.ops.bigain.kv_downsample.default, wrong_alpha)
    with pytest.raises(bgx.ExportError, match=r"out_sample deviates from torch by .*nothing is left"):
        bgx.export_onnx(unet(), (), path, kwargs=inputs, method=bgx.KVDownsample(2, 1.2))
    assert [path.read_text() for path in tmp_path.iterdir()] == ["before"]


@pytest.mark.slow
def test_outputs_that_are_not_finite_leave_nothing(inputs: Any, tmp_path: Path) -> None:
    model = unet()
    nn.init.constant_(model.conv_out.bias, 1e6)
    with pytest.raises(bgx.ExportError, match="512 of 512 values of out_sample are nan or infinite"):
        bgx.export_onnx(model, (), tmp_path / "u.onnx", kwargs=inputs, method=(), dtype=torch.float16)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_full_disk_leaves_what_was_there(inputs: Any, tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk: the write fails half way, as it would there."""
    path = tmp_path / "u.onnx"
    path.write_text("before")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(bgx.ExportError, match="cannot be written: File too large; nothing was left"):
            bgx.export_onnx(unet(), (), path, kwargs=inputs, method=())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.read_text() for path in tmp_path.iterdir()] == ["before"]


@pytest.mark.slow
def test_killed_while_writing_leaves_the_old_file(inputs: Any, tmp_path: Path) -> None:
    """Killed between the two renames: the new weights are there, the old graph still reads the old ones."""
    code = """
import os, signal, sys, torch
import bigain_fx as bgx
from bigain_fx.export import files
from tests.test_optimize import unet
files.LIMIT = 1000
model, path = unet(), sys.argv[1]
inputs = {"sample": torch.randn(2, 4, 8, 8), "timestep": 7, "encoder_hidden_states": torch.randn(2, 5, 16)}
bgx.export_onnx(model, (), path, kwargs=inputs, method=(), verify=False)
replace = os.replace
def stop_at_the_graph(source, target):
    if str(target).endswith("u.onnx"):
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)
os.replace = stop_at_the_graph
torch.nn.init.zeros_(model.conv_in.weight)
bgx.export_onnx(model, (), path, kwargs=inputs, method=(), verify=False)
"""
    path = tmp_path / "u.onnx"
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code, os.fspath(path)], cwd=root, timeout=300, capture_output=True)
    assert done.returncode == -9, done.stderr.decode()
    assert len(list(tmp_path.glob("u-*.data"))) == 2
    expected = bgx.optimize(unet(), method=(), backend="eager")(**inputs).sample
    torch.testing.assert_close(bgx.OrtDenoiser(path)(**inputs).sample, expected, rtol=1e-4, atol=1e-5)


class Twins(nn.Module):
    """Two attentions on the same tokens: the exporter makes one plan of two. Then a third one."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(4, 16, 1), nn.Conv2d(16, 4, 1)
        self.norms = nn.ModuleList(nn.LayerNorm(16) for _ in range(2))
        self.project = nn.ModuleList(nn.Linear(16, 16) for _ in range(12))

    def attend(self, x: torch.Tensor, first: int) -> torch.Tensor:
        q, k, v = (layer(x).unflatten(2, (2, 8)).transpose(1, 2) for layer in self.project[first : first + 3])
        out = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.project[first + 3](out.transpose(1, 2).flatten(2))

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        x = self.conv(sample).flatten(2).transpose(1, 2)
        n = self.norms[0](x)
        x = x + self.attend(n, 0) + self.attend(n, 4)
        x = x + self.attend(self.norms[1](x), 8)
        return self.head(x.transpose(1, 2).unflatten(2, sample.shape[2:])) * (1 + timestep.sum())


@pytest.mark.parametrize("timestep", [torch.tensor(0.5), torch.full((2, 3), 0.5)])
def test_equal_plans_that_became_one_node(timestep: torch.Tensor, tmp_path: Path) -> None:
    model, sample, path = Twins().eval(), torch.randn(2, 4, 8, 6), tmp_path / "t.onnx"
    record = bgx.export_onnx(model, (sample, timestep), path, method=bgx.LaplacianMerge(0.5))
    assert record.operators["bigain::LaplacianMergePlan"] == 2
    assert len(record.graphs[0].report.rewritten) == 3
    assert record.deviations[0].relative_l2 < 1e-5
    assert record.graphs[0].plan_agreement == 1
    expected = bgx.optimize(model, method=bgx.LaplacianMerge(0.5), backend="eager")(sample, timestep)
    torch.testing.assert_close(bgx.OrtDenoiser(path)(sample, timestep), expected, rtol=1e-4, atol=1e-5)


class Names(nn.Module):
    """A parameter named as an input is, one as a node of the graph, and an integer timestep that is an index."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.add = nn.Parameter(torch.full((4, 1, 1), 3.0)), nn.Parameter(torch.ones(4, 1, 1))
        self.table = nn.Embedding(10, 4)

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return (sample + scale) * self.scale + self.add + self.table(timestep)[:, None, None]


def test_names_that_meet_and_a_timestep_that_is_an_index(tmp_path: Path) -> None:
    model, path = Names().eval(), tmp_path / "n.onnx"
    inputs = (torch.randn(2, 4, 4, 4), torch.tensor(7), torch.randn(4, 1, 1))
    bgx.export_onnx(model, inputs, path, method=())
    torch.testing.assert_close(bgx.OrtDenoiser(path)(*inputs), model(*inputs))


class Odd(nn.Module):
    """What torch promotes and ONNX does not, what ONNX Runtime has no kernel for, and what ONNX has no operator for."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))

    def forward(self, sample: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        wide = torch.einsum("...n,d->...nd", sample, torch.arange(3, dtype=torch.float64))
        wide = torch.stack([sample, wide.sum(-1)], -1) + torch.hstack([sample, wide[..., 1]]).mean()
        mask = torch.where(mask.roll(1, 0), mask, sample > 0).masked_fill(mask, False)
        mask = torch.where(sample < 1, mask, True)
        wide = nn.functional.scaled_dot_product_attention(*[wide.reshape(1, 2, 5, 4)] * 3).mean((0, 1))
        return (wide * mask).float() @ torch.linalg.qr(self.weight + 1)[0]


def test_what_the_exporter_leaves_to_others(tmp_path: Path) -> None:
    model, sample, mask = Odd().eval(), torch.randn(5, 4), torch.randn(5, 4) > 0
    bgx.export_onnx(model, (sample, mask), tmp_path / "o.onnx", method=())
    other = torch.randn(5, 4), torch.randn(5, 4) > 0
    torch.testing.assert_close(bgx.OrtDenoiser(tmp_path / "o.onnx")(*other), model(*other), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_an_output_of_zeros_is_right(inputs: Any, tmp_path: Path) -> None:
    model = unet()
    nn.init.zeros_(model.conv_out.weight)
    nn.init.zeros_(model.conv_out.bias)
    (deviation,) = bgx.export_onnx(model, (), tmp_path / "z.onnx", kwargs=inputs, method=()).deviations
    assert (deviation.relative_l2, deviation.db) == (0, None)


@pytest.mark.slow
def test_graphs_of_other_weights_are_not_used_together(inputs: Any, tmp_path: Path) -> None:
    model, wide = unet(), inputs | {"sample": torch.randn(2, 4, 8, 16)}
    bgx.export_onnx(model, (), tmp_path / "a.onnx", kwargs=inputs, method=(), verify=False)
    nn.init.ones_(model.conv_in.bias)
    bgx.export_onnx(model, (), tmp_path / "b.onnx", kwargs=wide, method=(), verify=False)
    with pytest.raises(bgx.ExportError, match=r"b.onnx is of another model, method or weights than .*a.onnx"):
        bgx.OrtDenoiser([tmp_path / "a.onnx", tmp_path / "b.onnx"])


@pytest.mark.slow
def test_a_folder_of_the_graphs_name(inputs: Any, tmp_path: Path) -> None:
    (tmp_path / "u-2x4x8x8.onnx").mkdir()
    with pytest.raises(bgx.ExportError, match=r"'u-2x4x8x8.onnx' is a folder; .*nothing was left"):
        bgx.export_onnx(unet(), None, tmp_path / "u.onnx", method=(), example_inputs=[((), inputs)], verify=False)
    assert [path.name for path in tmp_path.iterdir()] == ["u-2x4x8x8.onnx"]


@pytest.mark.parametrize(("graphs", "left"), [(0, "nothing was left"), (1, "only a.onnx was replaced")])
def test_a_move_that_fails_says_what_was_moved(
    graphs: int, left: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    staged, folder = tmp_path / "staged", tmp_path / "folder"
    for place in (staged, folder):
        place.mkdir()
    for name in ("u-0123456789ab.data", "a.onnx", "b.onnx"):
        (staged / name).write_text("new")
    replace, calls = os.replace, []

    def fails(source: Any, target: Any) -> None:
        calls.append(source)
        if len(calls) > 1 + graphs:
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(bgx.ExportError, match=f"cannot be written: No space left on device; {left}"):
        files.publish(staged, folder)
    assert sorted(path.name for path in folder.iterdir()) == (["a.onnx", "u-0123456789ab.data"] if graphs else [])


@pytest.mark.parametrize("export", [bgx.export_onnx, bgx.export_package])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "unet"}, "model=str is not an nn.Module"),
        ({"model": bgx.optimize(unet(), method=())}, "model is a OptimizedDenoiser; export the original"),
        ({"dtype": "float16"}, "dtype='float16' must be a floating torch.dtype"),
        ({"dtype": torch.int8}, r"dtype=torch.int8 must be a floating torch.dtype"),
        ({"args": torch.randn(2, 4, 8, 8)}, r"args=Tensor \(2, 4, 8, 8\) must be a tuple"),
    ],
)
def test_what_cannot_be_exported(
    export: Any, changes: dict[str, Any], message: str, inputs: Any, tmp_path: Path
) -> None:
    suffix = ".onnx" if export is bgx.export_onnx else ".pt2"
    arguments = {"model": unet(), "args": (), "path": tmp_path / f"u{suffix}", "kwargs": inputs} | changes
    with pytest.raises(bgx.InputError, match=message):
        export(**arguments, method=())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kwargs": None, "example_inputs": [1]}, "kwargs=1 must be a mapping"),
        ({"kwargs": None, "example_inputs": [(1, 2)]}, "args=1 must be a tuple"),
        ({"path": "u.pb"}, r"path='.*u.pb' must end in .onnx"),
        ({"path": "no/u.onnx"}, "in a folder that is there"),
        ({"opset": 17}, "opset=17 must be an integer from 18 to 23"),
        ({"attention": "flash"}, "attention='flash' must be 'MultiHeadAttention' or 'standard'"),
        ({"dtype": torch.bfloat16}, "dtype torch.bfloat16 is not exported to ONNX: .* use dtype=torch.float16"),
        ({"example_inputs": []}, "example_inputs is given beside args or kwargs"),
        ({"kwargs": None, "example_inputs": []}, "example_inputs is empty"),
        ({"kwargs": {"sample": torch.randn(2, 4, 8, 8)}}, "the denoiser cannot be called so"),
    ],
)
def test_bad_arguments(changes: dict[str, Any], message: str, inputs: Any, tmp_path: Path) -> None:
    arguments = {"path": "u.onnx", "kwargs": inputs} | changes
    arguments["path"] = tmp_path / arguments["path"]
    with pytest.raises(bgx.InputError, match=message):
        bgx.export_onnx(unet(), None, method=bgx.ToMe(0.5), **arguments)
    assert not list(tmp_path.iterdir())


def test_two_of_one_size(inputs: Any, tmp_path: Path) -> None:
    with pytest.raises(bgx.InputError, match="example_inputs has two of one size"):
        bgx.export_onnx(unet(), None, tmp_path / "u.onnx", method=(), example_inputs=[((), inputs)] * 2)


def test_the_model_is_left_as_it_is(tmp_path: Path) -> None:
    model, kwargs = dit(), {"timestep": torch.tensor([3, 4]), "class_labels": torch.tensor([1, 2])}
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    sample = torch.randn(2, 4, 16, 16)
    record = bgx.export_onnx(model, (sample,), tmp_path / "d.onnx", kwargs=kwargs, method=(), dtype=torch.float16)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert onnxruntime.InferenceSession(record.graphs[0].path).get_inputs()[0].type == "tensor(float16)"
    assert onnxruntime.InferenceSession(record.graphs[0].path).get_inputs()[1].type == "tensor(float)"
    assert "relative L2" in str(record)
