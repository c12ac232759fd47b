"""The benchmark: its free bounds as graphs, its arithmetic on hand-made numbers, and one run of a tiny U-Net."""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel, UNet2DConditionModel
from torch import Tensor, nn
from torch.fx import GraphModule

import bigain_fx as bgx
from bigain_fx import families
from bigain_fx.bench import BenchError, bound, result, rows, timing, tomesd_rows
from bigain_fx.bench.run import run
from bigain_fx.calls import CallBinder
from bigain_fx.capture import capture
from bigain_fx.models import Workload
from bigain_fx.passes.grammar import parse, parse_list
from bigain_fx.passes.methods import LinearAlpha, Methods
from bigain_fx.passes.pipeline import Rewritten, rewrite

bigain = torch.ops.bigain


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Models this small lose time to a second thread, and very much of it where the machine is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def unet_workload() -> Workload:
    """One level of attention: 3 self-attentions of 10 x 12 tokens, 3 cross-attentions."""
    model = UNet2DConditionModel(
        sample_size=(10, 12),
        in_channels=4,
        out_channels=4,
        block_out_channels=(16, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        mid_block_type=None,
        layers_per_block=1,
        cross_attention_dim=8,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    inputs = {
        "sample": torch.randn(2, 4, 10, 12),
        "timestep": torch.tensor(500),
        "encoder_hidden_states": torch.randn(2, 3, 8),
    }
    return Workload("tiny", model.eval(), (), inputs)


def dit_workload() -> Workload:
    """Two blocks on a grid of 8 x 8; the sample goes in by position."""
    model = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        num_layers=2,
        sample_size=16,
        patch_size=2,
        norm_num_groups=8,
    )
    kwargs = {"timestep": torch.tensor([7, 900]), "class_labels": torch.tensor([1, 2])}
    return Workload("tiny-dit", model.eval(), (torch.randn(2, 4, 16, 16),), kwargs)


def rewritten(workload: Workload, methods: Methods) -> Rewritten:
    """The graph that ``optimize`` would run."""
    arguments, _ = CallBinder(workload.model).bind(workload.args, workload.kwargs)
    return rewrite(capture(workload.model, arguments).module, families.resolve(methods, workload.model))


def targets(module: GraphModule) -> Counter[Any]:
    """How often each function is called."""
    return Counter(node.target for node in module.graph.nodes if node.op == "call_function")


def key_value_shapes(module: GraphModule) -> list[tuple[int, int]]:
    """Rows of the queries and of the keys of each attention, in graph order."""
    attention = torch.ops.aten.scaled_dot_product_attention.default
    return [
        (node.args[0].meta["val"].shape[-2], node.args[1].meta["val"].shape[-2])
        for node in module.graph.nodes
        if node.target is attention
    ]


# ------------------------------------------------------------------------------------- the free bound

METHODS = [
    "bigain-tm:0.7", "tome:0.2", "todo:2", "todo:5", "bigain-td:2:0.8..1.2", "tome:0.7+bigain-td:2",
    "bigain-tm:0.7:proportional=true:unmerge=blend",
]  # fmt: skip


@pytest.mark.parametrize("make", [unet_workload, dit_workload])
@pytest.mark.parametrize("text", METHODS)
@torch.no_grad()
def test_bound_has_the_shapes_of_its_method_and_no_plan(make: Callable[[], Workload], text: str) -> None:
    workload = make()
    method = rewritten(workload, parse(text)).module
    shapes, calls = key_value_shapes(method), targets(method)
    assert any(str(target).startswith("bigain.") for target in calls)

    free = bound.free(rewritten(workload, parse(text)).module)
    assert key_value_shapes(free) == shapes
    assert not [target for target in targets(free) if str(target).startswith("bigain.")]
    repeat = torch.ops.aten.repeat.default
    assert targets(free)[repeat] - calls[repeat] == calls[bigain.unmerge.default] + calls[bigain.blend.default]
    assert all("val" in node.meta for node in free.graph.nodes if node.op == "call_function")

    built = bound.build(workload, parse(text), backend="eager")
    dense = workload.model(*workload.args, **workload.kwargs)
    output = built.call()
    assert type(output) is type(dense)
    assert output.sample.shape == dense.sample.shape
    assert built.sites == (3 if make is unet_workload else 2)
    assert built.flops > 0


def regions_of(module: torch.fx.GraphModule) -> Counter[int]:
    """How often each region is called."""
    calls = [node.target for node in module.graph.nodes if node.op == "call_function"]
    return Counter(id(target) for target in calls if getattr(target, "__name__", "") == "region")


@pytest.mark.parametrize("text", ["bigain-tm:0.7", "bigain-tm:0.7:block", "tome:0.7+bigain-td:2"])
def test_bound_is_compiled_in_the_regions_of_its_method(text: str) -> None:
    workload = dit_workload()
    fast = bgx.optimize(workload.model, workload.args, workload.kwargs, method=parse(text), backend="aot_eager")
    method = regions_of(fast.prepare(*workload.args, **workload.kwargs).graph)
    free = regions_of(bound.build(workload, parse(text), backend="aot_eager").graph)
    assert len(free) == len(method) - 1 > 0, "all but the plan"
    assert set(free.values()) == set(method.values())


@torch.no_grad()
def test_bound_counts_the_flops_of_its_method_without_the_plan() -> None:
    workload = dit_workload()
    method = bgx.inspect(workload.model, workload.args, workload.kwargs, method=parse("tome:0.7"))
    plan = 2 * 2 * (64 - 16) * 16 * 16  # 2 a multiply-add, batch 2, 48 sources, 16 destinations, 16 channels
    assert bound.build(workload, parse("tome:0.7"), backend="eager").flops == method.flops_after - 2 * plan


@torch.no_grad()
def test_downsampling_bound_takes_what_todo_takes() -> None:
    workload = unet_workload()
    todo = bgx.optimize(workload.model, kwargs=workload.kwargs, method=bgx.ToDo(), backend="eager")
    free = bound.build(workload, parse("bigain-td:2"), backend="eager")
    torch.testing.assert_close(free.call().sample, todo(**workload.kwargs).sample)


@torch.no_grad()
def test_bound_slices_the_first_tokens_and_tiles_them() -> None:
    """`merge` keeps rows 0..M-1, `unmerge` gives row i the row i % M."""
    workload = unet_workload()
    free = bound.free(rewritten(workload, parse("tome:0.7")).module)
    slices = [node for node in free.graph.nodes if node.target is torch.ops.aten.contiguous.default]
    first, whole = slices[0], slices[1]
    left = 120 - int(120 * 0.7)
    assert [part.meta["val"].shape[1] for part in (first, whole)] == [left, 120]
    y = torch.randn(2, left, 16)
    x = torch.randn(2, 120, 16)
    assert torch.equal(_evaluate(first, x), x[:, :left])
    assert torch.equal(_evaluate(whole, y), y[:, torch.arange(120) % left])


def _evaluate(node: Any, leaf: Tensor) -> Tensor:
    """Run the chain of slice, repeat and contiguous that ends in ``node`` on ``leaf``."""
    value = leaf
    chain = [node]
    while chain[0].args[0].target in (torch.ops.aten.slice.Tensor, torch.ops.aten.repeat.default):
        chain.insert(0, chain[0].args[0])
    for link in chain:
        value = link.target(value, *link.args[1:])
    return value


def test_bound_refuses_a_plan_that_something_else_reads() -> None:
    module = rewritten(unet_workload(), parse("tome:0.7")).module
    output = next(node for node in module.graph.nodes if node.op == "output")
    assign = next(node for node in module.graph.nodes if node.target is bigain.merge.default).args[1]
    output.args = ((*output.args[0], assign),)
    with pytest.raises(BenchError, match="is also read by output"):
        bound.free(module)


@pytest.mark.parametrize(
    ("methods", "name"),
    [
        ((), None),
        ((bgx.ToMe(0.0),), None),
        ((bgx.ToMe(0.7, seed=3),), "bound:merge:0.7"),
        ((bgx.LaplacianMerge(0.7),), "bound:merge:0.7"),
        ((bgx.LaplacianMerge(0.8, cell=(2, 4)),), "bound:merge:0.8:cell=2x4"),
        ((bgx.ToDo(2),), "bound:kv:2"),
        ((bgx.KVDownsample(2, LinearAlpha()),), "bound:kv:2"),
        ((bgx.KVDownsample(4, levels=2),), "bound:kv:4:levels=2"),
        ((bgx.ToDo(2, levels=None), bgx.ToMe(0.5)), "bound:kv:2:levels=all+merge:0.5"),
        ((bgx.ToMe(0.5, where=("a.*", "b.*")),), "bound:merge:0.5:where=a.*/b.*"),
    ],
)
def test_bound_names(methods: Methods, name: str | None) -> None:
    assert bound.bound_name(methods) == name


# ------------------------------------------------------------------------------------- timing


def test_interleave_takes_turns_and_times_only_the_calls() -> None:
    """A clock that only the calls and the device move: checking and ticking are not timed."""
    now, log = [0.0], []

    def call(name: str, seconds: float) -> Callable[[], str]:
        def made() -> str:
            log.append(name)
            now[0] += seconds
            return name

        return made

    def check(name: str, output: str) -> None:
        assert name == output
        now[0] += 100

    waits = []

    def synchronize() -> None:
        waits.append(now[0])
        if len(waits) % 2 == 0:
            now[0] += 0.5  # the device ends half a second after the call returned

    ticks: list[int] = []
    calls = {"a": call("a", 1), "b": call("b", 2), "c": call("c", 3)}
    seconds = timing.interleave(
        calls, 3, 2, check=check, synchronize=synchronize, clock=lambda: now[0], tick=lambda: ticks.append(1)
    )
    assert "".join(log) == "abc" * 5
    assert len(ticks) == 15
    assert seconds == {"a": (1.5,) * 3, "b": (2.5,) * 3, "c": (3.5,) * 3}


def test_interleave_stops_at_the_first_bad_output() -> None:
    outputs = {"good": torch.ones(2), "bad": torch.tensor([1.0, math.nan])}
    calls: dict[str, Callable[[], Tensor]] = {name: (lambda name=name: outputs[name]) for name in outputs}  # type: ignore[misc]
    with pytest.raises(BenchError, match=r"row 'bad': 1 of 2 output values are nan or infinite"):
        timing.interleave(calls, 1, 0, check=timing.check_finite)


def test_speedup_is_paired() -> None:
    """The machine halves its speed for two rounds: the ratio within each round does not notice."""
    base, row = [2.0, 2.0, 4.0, 4.0, 2.0], [1.0, 1.0, 2.0, 2.0, 1.0]
    assert timing.speedup(base, row, seed=0) == timing.Estimate(2.0, 2.0, 2.0)
    assert timing.speedup([2.0, 4.0, 9.0], [1.0, 1.0, 9.0], seed=0).median == 2.0, "not 4 / 1, the ratio of the medians"


def test_speedup_median_and_interval() -> None:
    """Ratios 1..5: of 5 ** 5 resamples, 181 have median 1 and 181 have median 5, 5.8 % each."""
    found = timing.speedup([1.0, 2.0, 3.0, 4.0, 5.0], [1.0] * 5, seed=3)
    assert found == timing.Estimate(3.0, 1.0, 5.0)
    assert found == timing.speedup([5.0, 4.0, 3.0, 2.0, 1.0], [1.0] * 5, seed=4)
    narrow = timing.speedup([1.0, *[2.0] * 19], [1.0] * 20, seed=0)
    assert narrow == timing.Estimate(2.0, 2.0, 2.0)


def test_efficiency_is_paired_and_has_an_interval() -> None:
    """Dense 4 s, bound 2 s: 3 s are half of the gain, 2 s all of it."""
    assert timing.efficiency([4.0], [3.0], [2.0], seed=0) == timing.Estimate(0.5, 0.5, 0.5)
    found = timing.efficiency([4.0] * 5, [2.0, 3.0, 3.0, 3.0, 2.0], [2.0] * 5, seed=0)
    assert found == timing.Estimate(0.5, 0.5, 1.0)
    slower = timing.efficiency([4.0, 4.0, 8.0], [3.0, 3.0, 6.0], [2.0, 2.0, 4.0], seed=0)
    assert slower == timing.Estimate(0.5, 0.5, 0.5), "the machine halves its speed for a round"
    assert timing.efficiency([2.0, 2.0], [1.0, 1.0], [2.0, 1.0], seed=0).low == 0, "where a bound gains nothing"


def test_speedup_of_one_round() -> None:
    assert timing.speedup([3.0], [2.0], seed=0) == timing.Estimate(1.5, 1.5, 1.5)


def test_relative_error_and_decibels() -> None:
    reference = [torch.tensor([3.0, 0.0]), torch.tensor([[4.0]])]
    relative = timing.relative_error(reference, [torch.tensor([3.0, 0.3]), torch.tensor([[4.4]])])
    assert relative == pytest.approx(0.1)
    assert timing.decibels(relative) == pytest.approx(20)
    assert timing.relative_error(reference, reference) == 0
    assert timing.decibels(0.0) is None
    assert timing.relative_error([torch.zeros(2)], [torch.ones(2)]) is None
    assert timing.decibels(None) is None
    with pytest.raises(BenchError, match="output shapes"):
        timing.relative_error(reference, reference[:1])


def test_check_finite_wants_tensors() -> None:
    timing.check_finite("row", {"sample": torch.ones(2), "steps": 3})
    with pytest.raises(BenchError, match="holds no floating-point tensor"):
        timing.check_finite("row", {"steps": 3})


def test_peak_bytes_by_hand() -> None:
    """Two live at once (8 MB), then one freed and one made: never 12 MB; what was there before does not count."""
    kept = torch.ones(1_000_000)

    def call() -> Tensor:
        first = kept + 1
        second = first + 1
        del first
        return second + kept

    peak = timing.peak_bytes(call, torch.device("cpu"))
    assert peak is not None
    assert 8_000_000 <= peak < 8_000_100, "two tensors, and the scalars"
    assert timing.peak_bytes(call, torch.device("meta")) is None


# ------------------------------------------------------------------------------------- a run


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[result.BenchResult, Path]:
    """One run of every kind of row, without compiling."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("bench") / "made" / "here"
    methods = parse_list("dense,tome:0.7,bigain-tm:0.7,bigain-td:4,block-pool:0.01,tome:0.5+todo:2")
    arguments, sys.argv = (
        sys.argv,
        ["/somewhere/bin/bigain-fx", "bench", "/models/tiny", "--out=/else/where", "--x", "a b"],
    )
    try:
        return run(unet_workload(), methods, rounds=2, backend="eager", out=folder, progress=False), folder
    finally:
        sys.argv = arguments


def test_run_has_every_row_in_order(found: tuple[result.BenchResult, Path]) -> None:
    rows = {row.name: row for row in found[0].rows}
    methods = ["tome:0.7", "bigain-tm:0.7", "bigain-td:4", "block-pool:0.01", "tome:0.5+todo:2"]
    # One in a hundred of 10 x 12 tokens is no whole cell: that row is dense, and has no bound.
    bounds = ["bound:merge:0.7", "bound:kv:4", "bound:kv:2+merge:0.5"]
    assert list(rows) == ["dense eager", "dense", *methods, *bounds]
    assert {name: row.bound for name, row in rows.items() if row.bound} == {
        "tome:0.7": "bound:merge:0.7",
        "bigain-tm:0.7": "bound:merge:0.7",
        "bigain-td:4": "bound:kv:4",
        "tome:0.5+todo:2": "bound:kv:2+merge:0.5",
    }
    assert [row.sites for row in rows.values()] == [0, 0, 3, 3, 3, 0, 3, 3, 3, 3]
    assert (
        rows["dense"].flops == rows["dense eager"].flops > rows["bigain-tm:0.7"].flops > rows["bound:merge:0.7"].flops
    )


def test_run_measures_every_row(found: tuple[result.BenchResult, Path]) -> None:
    rows = {row.name: row for row in found[0].rows}
    assert all(len(row.seconds) == 2 and min(row.seconds) > 0 for row in rows.values())
    assert rows["dense"].speedup == timing.Estimate(1.0, 1.0, 1.0)
    assert rows["dense eager"].relative_l2 == rows["dense"].relative_l2 == rows["block-pool:0.01"].relative_l2 == 0
    for name in ("tome:0.7", "bigain-td:4", "bound:merge:0.7"):
        assert 0 < (rows[name].relative_l2 or 0) < 1
    assert all((row.peak_bytes or 0) > 2 * 16 * 120 * 4 for row in rows.values())
    assert all(row.compile_s is None and row.compile_cached is None for row in rows.values())
    assert [row.capture_s is None for row in rows.values()] == [True] + [False] * 9


def test_run_describes_itself_without_the_paths_of_the_machine(found: tuple[result.BenchResult, Path]) -> None:
    report = found[0]
    assert report.command == "bigain-fx bench tiny --out=where --x 'a b'"
    assert report.model == "UNet2DConditionModel"
    assert report.inputs == {"sample": [2, 4, 10, 12], "timestep": [], "encoder_hidden_states": [2, 3, 8]}
    assert report.weight_bytes == 4 * report.parameters
    assert (report.device, report.dtype, report.stem) == ("cpu", "float32", "tiny-2x4x10x12-cpu-float32-eager")
    assert report.versions["torch"] == torch.__version__
    assert report.versions["bigain_fx"] == bgx.__version__
    assert report.machine["threads"] == 1
    assert report.date.endswith("+00:00")


def test_run_writes_two_files(found: tuple[result.BenchResult, Path]) -> None:
    report, folder = found
    assert sorted(path.name for path in folder.iterdir()) == [f"{report.stem}.json", f"{report.stem}.md"]
    data = json.loads((folder / f"{report.stem}.json").read_text())
    assert data == report.to_dict()
    assert data["rows"][0]["deviation_db"] is None
    assert [row["name"] for row in data["rows"]] == [row.name for row in report.rows]
    text = (folder / f"{report.stem}.md").read_text()
    assert text == report.to_markdown()
    lines = text.splitlines()
    assert sum(line.startswith("| ") for line in lines) == 2 + len(report.rows)
    assert {line.count("|") for line in lines if line.startswith("| ")} == {len(result.COLUMNS) + 1}
    assert "nan" not in text
    assert str(folder) not in text + json.dumps(data)


@pytest.mark.parametrize(
    ("low", "expected"), [(1.5, 0.5), (1.0, None)], ids=["a bound that gains", "a bound that may not"]
)
def test_efficiency(low: float, expected: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dense 4 s, method 3 s, bound 2 s: half of what there is to gain, if there is."""
    seconds = {"dense": 4.0, "tome:0.5": 3.0, "bound:merge:0.5": 2.0, "dense eager": 8.0}
    monkeypatch.setattr(timing, "interleave", lambda calls, *_, **__: {name: (seconds[name],) * 2 for name in calls})
    if low == 1:
        monkeypatch.setattr(timing, "speedup", lambda *_: timing.Estimate(2.0, low, 2.5))
    report = run(dit_workload(), parse_list("tome:0.5"), rounds=2, backend="eager", progress=False)
    rows = {row.name: row for row in report.rows}
    found = rows["tome:0.5"].efficiency
    assert (found and found.median) == expected
    assert rows["bound:merge:0.5"].efficiency is None
    assert rows["tome:0.5"].median_s == 3


@pytest.mark.slow
def test_onnx_rows_are_compared_with_onnx_dense() -> None:
    methods = parse_list("dense,tome:0.5")
    report = run(dit_workload(), {}, onnx=methods, rounds=2, backend="eager", progress=False)
    rows = {row.name: row for row in report.rows}
    assert list(rows) == ["dense eager", "dense", "onnx:dense", "onnx:tome:0.5"]
    assert [row.base for row in rows.values()] == ["dense", "dense", "dense", "onnx:dense"]
    assert [row.sites for row in rows.values()] == [0, 0, 0, 2]
    assert rows["onnx:tome:0.5"].flops < rows["onnx:dense"].flops == rows["dense"].flops
    assert (rows["onnx:dense"].deviation_db or 0) > 100
    assert 0 < (rows["onnx:tome:0.5"].relative_l2 or 0) < 1
    for name in ("onnx:dense", "onnx:tome:0.5"):
        assert rows[name].peak_bytes is rows[name].compile_s is rows[name].compile_cached is rows[name].bound is None
        assert (rows[name].capture_s or 0) > 0
    ratios = [a / b for a, b in zip(rows["onnx:dense"].seconds, rows["onnx:tome:0.5"].seconds, strict=True)]
    assert rows["onnx:tome:0.5"].speedup.median == pytest.approx(sum(ratios) / 2)
    assert report.versions["onnxruntime"]


@pytest.mark.parametrize(
    ("missing", "dtype", "reason"),
    [
        ("onnxscript", torch.float32, "no ONNX rows: onnxscript is not installed; pip install 'bigain-fx[onnx]'"),
        (None, torch.bfloat16, "no ONNX rows: torch.bfloat16 is not exported; use float32 or float16"),
    ],
)
def test_without_onnx_a_line_says_so(
    missing: str | None, dtype: torch.dtype, reason: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr("bigain_fx.deploy.find_spec", lambda name: None if name == missing else name)
    workload = dit_workload()
    workload.model.to(dtype)
    inputs = (workload.args[0].to(dtype),)
    report = run(
        Workload("tiny", workload.model, inputs, workload.kwargs), {}, onnx=parse_list("dense"), rounds=1,
        backend="eager", progress=False,
    )  # fmt: skip
    assert [row.name for row in report.rows] == ["dense eager", "dense"]
    assert reason in capsys.readouterr().err


def test_rows_without_compiling() -> None:
    report = run(
        dit_workload(), {}, eager=parse_list("dense,tome:0.5"), rounds=1, warmup=0, backend="aot_eager", progress=False
    )
    rows = {row.name: row for row in report.rows}
    assert list(rows) == ["dense eager", "torch.compile", "dense", "tome:0.5 eager"]
    assert rows["torch.compile"].flops == rows["dense"].flops
    assert (rows["torch.compile"].relative_l2 or 0) < 1e-5
    assert rows["torch.compile"].capture_s is None
    eager = rows["tome:0.5 eager"]
    assert (eager.base, eager.bound, eager.compile_s, eager.sites) == ("dense", None, None, 2)
    assert eager.flops < rows["dense"].flops
    assert report.tokens == 64


# ------------------------------------------------------------------------------------- tomesd


def tokens_merged(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Fills with the tokens of each attention that tomesd merges from now on, and how many of them go."""
    tomesd = pytest.importorskip("tomesd")
    match, found = tomesd.merge.bipartite_soft_matching_random2d, []

    def counted(metric: Tensor, *args: Any, **kwargs: Any) -> Any:
        found.append((metric.shape[1], args[4]))
        return match(metric, *args, **kwargs)

    monkeypatch.setattr(tomesd.merge, "bipartite_soft_matching_random2d", counted)
    return found


@pytest.mark.parametrize("make", [unet_workload, dit_workload])
@torch.no_grad()
def test_tomesd_merges_what_tome_merges_on_our_graph(
    make: Callable[[], Workload], monkeypatch: pytest.MonkeyPatch
) -> None:
    merged = tokens_merged(monkeypatch)
    workload = make()
    patched = tomesd_rows.patch(workload, 0.7)
    output = patched.call("eager", None)().sample
    assert output.shape == workload.model(*workload.args, **workload.kwargs).sample.shape
    ours = [(site.tokens, site.tokens - site.tokens_after) for site in patched.report.rewritten]
    assert merged == ours
    assert len(merged) == (3 if make is unet_workload else 2)


@pytest.mark.parametrize("make", [unet_workload, dit_workload])
@torch.no_grad()
def test_tomesd_patches_a_copy_with_the_same_weights(make: Callable[[], Workload]) -> None:
    """At a ratio that merges nothing the patched forward is the model's own; the model itself is not touched."""
    pytest.importorskip("tomesd")
    workload = make()
    before = workload.model(*workload.args, **workload.kwargs).sample
    classes, state = [type(module) for module in workload.model.modules()], dir(workload.model)
    unmerged = tomesd_rows.patch(workload, 0.001)
    torch.testing.assert_close(unmerged.call("eager", None)().sample, before)
    patched = tomesd_rows.patch(workload, 0.7)
    assert not torch.equal(patched.call("eager", None)().sample, before)
    assert torch.equal(workload.model(*workload.args, **workload.kwargs).sample, before)
    assert [type(module) for module in workload.model.modules()] == classes
    assert dir(workload.model) == state
    assert not workload.model._forward_pre_hooks
    for own, theirs in zip(workload.model.parameters(), patched.model.parameters(), strict=True):
        assert own is theirs


def test_tomesd_merges_the_finest_grid_where_that_is_coarser_than_the_latent(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in SDXL, whose first blocks have no attention: tomesd's default would merge nothing."""
    merged = tokens_merged(monkeypatch)
    model = UNet2DConditionModel(
        sample_size=16, block_out_channels=(8, 8, 8), norm_num_groups=4, attention_head_dim=2, layers_per_block=1,
        cross_attention_dim=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    inputs = {
        "sample": torch.randn(2, 4, 16, 16),
        "timestep": torch.tensor(3),
        "encoder_hidden_states": torch.randn(2, 3, 8),
    }
    workload = Workload("tiny", model.eval(), (), inputs)
    tomesd_rows.patch(workload, 0.5).call("eager", None)()
    assert merged == [(64, 32)] * 3


def test_what_breaks_is_compiled_once_and_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """More variants of a function than torch compiles by default: all are compiled, and later calls compile nothing."""
    graphs: list[GraphModule] = []

    def keep(graph: GraphModule, _: Any) -> GraphModule:
        graphs.append(graph)
        return graph

    def variant(x: Tensor) -> Tensor:
        return x + 1

    def broken() -> list[Tensor]:
        found = []
        for size in range(1, 12):
            torch._dynamo.graph_break()
            found.append(variant(torch.ones(size)))
        return found

    torch._dynamo.reset()
    compiled = torch.compile(broken, dynamic=False, backend=keep)
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        call = tomesd_rows.Settled(compiled)
        assert [len(output) for output in call()] == [*range(1, 12)]
        assert len(graphs) == 11
        call()
        assert len(graphs) == 11
        torch._dynamo.reset()
        monkeypatch.setattr(tomesd_rows, "RECOMPILES", torch._dynamo.config.recompile_limit)
        with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
            tomesd_rows.Settled(compiled)()


@pytest.mark.slow
def test_tomesd_rows() -> None:
    pytest.importorskip("tomesd")
    report = run(
        dit_workload(), parse_list("tome:0.7"), tomesd=(0.7, 0.25), rounds=2, backend="aot_eager", progress=False
    )
    rows = {row.name: row for row in report.rows}
    assert list(rows) == [
        "dense eager", "torch.compile", "dense", "tome:0.7", "tomesd:0.7 eager", "tomesd:0.7", "tomesd:0.25 eager",
        "tomesd:0.25", "bound:merge:0.7",
    ]  # fmt: skip
    peer = rows["tomesd:0.7"]
    assert (peer.flops, peer.sites, peer.base) == (rows["tome:0.7"].flops, 2, "dense")
    assert [name for name, row in rows.items() if row.bound] == ["tome:0.7", "tomesd:0.7"], "0.25 has no bound here"
    assert rows["tomesd:0.7 eager"].compile_s is None
    assert (peer.compile_s or 0) > 0
    assert all(0 < (rows[name].relative_l2 or 0) < 1 for name in rows if name.startswith("tomesd"))
    assert report.notes == ()
    assert report.versions["tomesd"]


@pytest.mark.parametrize(
    ("missing", "name", "reason"),
    [
        (True, "dit", "no tomesd rows: tomesd is not installed; pip install 'bigain-fx[bench]'"),
        (False, "conv", "no tomesd rows: tomesd patches BasicTransformerBlock, and Conv2d has none"),
        (False, "single", "no tomesd rows: tomesd's BasicTransformerBlock does not know the norm 'ada_norm_single'"),
    ],
)
def test_without_tomesd_a_line_says_so(
    missing: bool, name: str, reason: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("bigain_fx.bench.tomesd_rows.find_spec", lambda name: None if missing else name)
    workload = dit_workload()
    if name == "conv":
        workload = Workload("conv", nn.Conv2d(1, 1, 1), (torch.randn(1, 1, 2, 2),), {})
    elif name == "single":
        for block in workload.model.transformer_blocks:  # type: ignore[union-attr]
            block.norm_type = "ada_norm_single"  # type: ignore[union-attr]
        monkeypatch.setattr("bigain_fx.bench.run._prepare_all", lambda *_: pytest.fail("too late"))
    asked = rows.Asked({}, {}, {}, (0.7,), "eager", None)
    left, notes = rows.possible(workload, asked)
    assert left.tomesd == ()
    assert notes[0].startswith(reason)
    if missing:
        report = run(workload, {}, tomesd=(0.7,), rounds=1, backend="eager", progress=False)
        assert [row.name for row in report.rows] == ["dense eager", "dense"]
        assert report.notes == (reason,)
        assert reason in capsys.readouterr().err
        assert f"- {reason}\n" in report.to_markdown()


def test_a_row_of_tomesd_that_fails_is_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tomesd = pytest.importorskip("tomesd")

    def apply_patch(*_: Any, **__: Any) -> None:
        raise RuntimeError("no U-Net")

    monkeypatch.setattr(tomesd, "apply_patch", apply_patch)
    report = run(dit_workload(), {}, tomesd=(0.7,), rounds=1, backend="eager", progress=False)
    assert [row.name for row in report.rows] == ["dense eager", "dense"]
    assert len(report.notes) == 2
    assert report.notes[0].startswith("row 'tomesd:0.7 eager' fails with backend='eager': no U-Net")
    assert report.notes[0] in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [("x", BenchError, "tomesd='x' must be ratios such as"), ("1.5", bgx.MethodError, r"ratio=1\.5")],
)
def test_tomesd_refuses_what_is_no_ratio(text: str, error: type[Exception], message: str) -> None:
    assert tomesd_rows.parse("") == ()
    assert tomesd_rows.parse("0.7, 0.5") == (0.7, 0.5)
    with pytest.raises(error, match=message):
        tomesd_rows.parse(text)


@pytest.mark.slow
def test_run_compiles_and_says_how_long() -> None:
    report = run(dit_workload(), parse_list("dense"), rounds=1, warmup=0, progress=False)
    eager, plain, dense = report.rows
    assert (eager.name, plain.name, dense.name) == ("dense eager", "torch.compile", "dense")
    assert eager.compile_s is None
    assert plain.compile_s is not None
    assert dense.compile_s is not None
    assert dense.compile_s > 0
    assert isinstance(dense.compile_cached, bool)
    assert dense.deviation_db is None or dense.deviation_db > 80
    assert report.stem == "tiny-dit-2x4x16x16-cpu-float32"


# ------------------------------------------------------------------------------------- bad input


def test_run_refuses_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is built: hours of compiling are not thrown away."""
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setattr("bigain_fx.bench.rows.optimize", lambda *_, **__: pytest.fail("built a row"))
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(BenchError, match="cannot be written"):
            run(dit_workload(), {}, out=out, backend="eager", progress=False)


def test_write_replaces_the_old_file_or_leaves_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    result.write(path, "old")
    result.write(path, "new")
    assert path.read_text() == "new"
    with pytest.raises(BenchError, match="cannot be written"):
        result.write(tmp_path / "absent" / "a.json", "x")
    (tmp_path / "folder").mkdir()
    with pytest.raises(BenchError, match="cannot be written"):
        result.write(tmp_path / "folder", "x")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(BenchError, match=r"'a.json' cannot be written: No space left"):
        result.write(path, "half")
    assert path.read_text() == "new"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a.json", "folder"]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_run_refuses_a_model_whose_output_is_not_finite(value: float) -> None:
    workload = dit_workload()
    next(iter(workload.model.proj_out_2.parameters())).data[0, 0] = value  # type: ignore[union-attr]
    with pytest.raises(BenchError, match=r"row 'dense eager': \d+ of 2048 output values are nan or infinite"):
        run(workload, {}, backend="eager", progress=False)


@pytest.mark.parametrize(
    ("methods", "options", "message"),
    [
        ({}, {"rounds": 0}, "rounds=0 must be an integer from 1"),
        ({}, {"warmup": -1}, "warmup=-1 must be an integer from 0"),
        ({"dense": parse("tome:0.5")}, {}, "methods has 'dense', the name of a row that is not a method"),
        ({"bound:x": parse("tome:0.5")}, {}, "methods has 'bound:x'"),
        ({"x eager": parse("tome:0.5")}, {}, "methods has 'x eager'"),
        ({"tomesd:x": parse("tome:0.5")}, {}, "methods has 'tomesd:x'"),
    ],
)
def test_run_refuses_arguments(methods: dict[str, Methods], options: dict[str, int], message: str) -> None:
    with pytest.raises(BenchError, match=message):
        run(dit_workload(), methods, backend="eager", progress=False, **options)  # type: ignore[arg-type]


def test_run_refuses_a_model_without_weights() -> None:
    workload = dit_workload()
    for model in (workload.model.to("meta"), nn.Identity()):
        with pytest.raises(BenchError, match="has no weights in memory"):
            run(Workload("shapes", model, workload.args, workload.kwargs), {}, backend="eager", progress=False)


def test_run_names_the_row_that_does_not_compile() -> None:
    with pytest.raises(
        BenchError, match=r"row 'torch.compile' fails with backend='no-such-thing'.*try backend 'eager'"
    ):
        run(dit_workload(), {}, backend="no-such-thing", progress=False)
