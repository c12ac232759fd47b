"""The go/no-go: what it compares, how it decides, what it keeps for the next time, and a tiny grid."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bigain_fx as bgx
from bigain_fx import select, settings
from bigain_fx.capture import capture
from bigain_fx.passes.methods import normalize
from bigain_fx.passes.pipeline import rewrite
from tests.damage import bytes_of, values_of
from tests.test_scope import Blocks
from tests.toys import C, H, N, Separate, W

Times = tuple[float, float]
"""Seconds of the dense attention, and of what the rewrite makes of it."""
INPUTS = {"image": torch.randn(2, 3, H, W), "text": torch.randn(2, 5, C)}
MERGE = bgx.LaplacianMerge(0.5)
BOTH = (MERGE, bgx.KVDownsample(2))


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(select, "cache_dir", lambda: str(tmp_path))


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[int]]:
    """Makes every round take the given times; returns the number of calls of each measurement."""

    def set_times(*times: Times) -> list[int]:
        measured: list[int] = []
        pending = list(times)

        def interleaved(calls: Sequence[Callable[[], object]], rounds: int, wait: Any) -> list[tuple[float, ...]]:
            for call in calls:
                call()
            if rounds == 1:
                measured.append(len(calls))
                return [(0.1,)] * len(calls)
            taken = pending.pop(0) if len(pending) > 1 else pending[0]
            return [(seconds,) * rounds for seconds in taken]

        monkeypatch.setattr(select, "interleaved", interleaved)
        return measured

    return set_times


def optimized(method: Any, model: nn.Module | None = None, inputs: Any = None, **kwargs: Any) -> bgx.OptimizedDenoiser:
    torch.manual_seed(0)
    model = Blocks().eval() if model is None else model
    return bgx.optimize(
        model, kwargs=inputs or INPUTS, method=method, **{"backend": "eager", "select": "auto"} | kwargs
    )


def merges(report: bgx.Report) -> list[str]:
    return [site.action for site in report.sites if site.grid is not None]


@pytest.mark.parametrize(("method", "backend"), [(MERGE, "eager"), (MERGE, "inductor"), (BOTH, "eager")], ids=str)
def test_where_nothing_is_won_the_graph_is_the_dense_one(
    method: Any, backend: str, timed: Callable[..., list[int]]
) -> None:
    timed((0.010, 0.011))
    model, image = Separate().eval(), {"image": torch.randn(1, 3, H, W)}
    fast = optimized(method, model, image, backend=backend)
    assert [site.action for site in fast.report.sites] == ["kept"]
    assert "no faster on this device: " in fast.report.sites[0].reason
    assert not [node for node in fast.prepare(**image).graph.graph.nodes if "bigain" in str(node.target)]
    with torch.no_grad():
        torch.testing.assert_close(fast(**image), model(**image), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_the_times_are_those_of_this_device(backend: str) -> None:
    fast = optimized(MERGE, Separate().eval(), {"image": torch.randn(1, 3, H, W)}, backend=backend)
    (site,) = fast.report.sites
    faster = site.action == "merge"
    assert site.ms > 0
    assert (site.ms_after < site.ms) if faster else ("no faster on this device: " in site.reason)


@pytest.mark.parametrize("method", [MERGE, bgx.KVDownsample(2)], ids=str)
@pytest.mark.parametrize(("times", "expected"), [((0.010, 0.005), "merge"), ((0.010, 0.011), "kept")])
def test_an_attention_is_rewritten_if_that_is_faster(
    method: Any, times: Times, expected: str, timed: Callable[..., list[int]]
) -> None:
    measured = timed(times)
    fast = optimized(method)
    assert measured == [2], "what is alike is measured once"
    expected = expected if method == MERGE or expected == "kept" else "kv"
    assert merges(fast.report) == [expected] * 2
    for site in fast.report.sites:
        if site.grid is None:
            assert (site.ms, site.ms_after) == (None, None)
            continue
        assert site.ms == pytest.approx(1e3 * times[0])
        assert site.ms_after == pytest.approx(site.ms if site.action == "kept" else 1e3 * times[1])
    saved = 2e3 * (times[0] - times[1]) if expected != "kept" else 0
    assert fast.report.saved_ms == pytest.approx(saved)
    assert f"measured {saved:.3g} ms less a call" in fast.report.headline
    assert fast.report.columns[-2] == "ms"


def test_the_output_is_that_of_the_rewrite_without_selection(timed: Callable[..., list[int]]) -> None:
    timed((0.010, 0.002))
    expected = optimized(MERGE, select="all")
    assert expected.report.saved_ms is None
    assert "ms" not in expected.report.columns
    torch.testing.assert_close(optimized(MERGE)(**INPUTS), expected(**INPUTS))


def test_attentions_that_differ_are_decided_apart(timed: Callable[..., list[int]]) -> None:
    measured = timed((0.010, 0.002), (0.010, 0.018))
    fast = optimized(bgx.LaplacianMerge((0.5, 0.25)))
    assert measured == [2, 2]
    assert merges(fast.report) == ["merge", "kept"]
    assert [site.tokens_after for site in fast.report.sites if site.grid] == [N - N // 2, N]


def test_a_gain_within_the_scatter_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    scattered = [(0.010, 0.011, 0.012) * 4, (0.0095, 0.0105, 0.0115) * 4]
    monkeypatch.setattr(select, "interleaved", lambda calls, rounds, wait: [each[:rounds] for each in scattered])
    for call in (False, True):
        scattered[1] = (0.004, 0.005, 0.006) * 4 if call else scattered[1]
        assert (
            merges(optimized(bgx.LaplacianMerge(0.5, unmerge="blend" if call else "copy")).report)
            == ["merge" if call else "kept"] * 2
        )


@pytest.mark.slow
def test_times_are_kept_and_belong_to_one_setup(timed: Callable[..., list[int]], tmp_path: Path) -> None:
    measured = timed((0.010, 0.002))
    for _ in range(2):
        assert merges(optimized(MERGE).report) == ["merge"] * 2
    assert measured == [2]
    (file,) = (tmp_path / "bigain_fx").iterdir()
    assert json.loads(file.read_text())["dense"]["median"] == pytest.approx(10)
    optimized(MERGE, backend="aot_eager")
    optimized(bgx.LaplacianMerge(0.25))
    optimized(MERGE, inputs={"image": INPUTS["image"][:1], "text": INPUTS["text"][:1]})
    assert measured == [2] * 4
    file.write_text('{"dense": {}}')  # as another version would have left it
    assert merges(optimized(MERGE).report) == ["merge"] * 2
    assert measured == [2] * 5


@pytest.mark.parametrize("what", ["backend", "option"])
def test_times_of_what_has_no_name_are_not_kept(
    what: str, timed: Callable[..., list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another function, of another process, may have the same address and the same name."""

    def backend(module: Any, inputs: Any, options: Any = None) -> Any:
        return module

    measured = timed((0.010, 0.002))
    given: dict[str, Any] = {"backend": backend}
    if what == "option":
        monkeypatch.setattr(settings, "compiler", lambda *_: backend)
        given = {"backend": "inductor", "options": {"post_grad_custom_post_pass": backend}}
    for _ in range(2):
        assert merges(optimized(MERGE, **given).report) == ["merge"] * 2
    assert measured == [2, 2]
    assert not list(tmp_path.rglob("*.json"))


def test_times_are_cleared_and_nothing_else(timed: Callable[..., list[int]], tmp_path: Path) -> None:
    measured = timed((0.010, 0.002))
    bgx.clear_times()  # of nothing
    optimized(MERGE)
    (file,) = (tmp_path / "bigain_fx").iterdir()
    other = file.with_name("other.json")
    other.write_text("{}")
    bgx.clear_times()
    assert list(file.parent.iterdir()) == [other]
    optimized(MERGE)
    assert measured == [2, 2]
    file.unlink()
    file.mkdir()
    with pytest.raises(bgx.InputError, match=f"{file.name} cannot be deleted"):
        bgx.clear_times()


def plausible(content: str | bytes) -> bool:
    """Whether times could have been kept so: positive, finite, and in order."""
    try:
        kept = json.loads(content)
        rows = [[kept[part][name] for name in ("fastest", "low", "median", "high")] for part in ("dense", "rewritten")]
        whole = len(kept) == 2 and all(len(kept[part]) == 4 for part in kept)
    except (ValueError, KeyError, TypeError, RecursionError):
        return False
    fine = all(type(each) in (int, float) and 0 < each < 1e38 for row in rows for each in row)
    return whole and fine and all(row == sorted(row) for row in rows)


def test_damaged_times_are_measured_again(timed: Callable[..., list[int]], tmp_path: Path) -> None:
    model = Separate().eval()
    inputs = {"image": INPUTS["image"]}
    timed((0.010, 0.002))
    optimized(MERGE, model, inputs)
    (file,) = (tmp_path / "bigain_fx").iterdir()
    good = file.read_bytes()
    damaged: list[str | bytes] = [*values_of(json.loads(good)), *bytes_of(good, 0, 300)]
    for content in damaged:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
        before, found = plausible(content), select._read(file)
        assert (found is not None) == before, content
    times = [value for value in damaged if not plausible(value)]
    measured = timed((0.010, 0.002))
    for count, content in enumerate(times[:: len(times) // 12], 1):
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
        report = optimized(MERGE, model, inputs).report
        assert merges(report) == ["merge"]
        assert len(measured) == count, "measured again"
        assert file.read_bytes() == good, "and kept again"
    file.unlink()
    file.mkdir()  # which cannot be replaced
    assert merges(optimized(MERGE, model, inputs).report) == ["merge"]


class Stop(BaseException):
    """As a test runner's own timeout is."""


@pytest.mark.parametrize("stop", [TimeoutError, InterruptedError, CancelledError, KeyboardInterrupt, Stop])
@pytest.mark.parametrize("wrapped", [False, True])
def test_what_stops_the_work_is_no_reason_to_stay_dense(stop: type[BaseException], wrapped: bool) -> None:
    def stopped(module: Any, inputs: Any) -> Any:
        if not wrapped:
            raise stop("enough")
        try:
            raise stop("enough")
        except stop as error:
            raise RuntimeError("cannot compile") from error

    with pytest.raises(stop, match="enough"):
        optimized(MERGE, backend=stopped)


def test_the_kernels_switch_belongs_to_the_setup(
    timed: Callable[..., list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = timed((0.010, 0.002))
    monkeypatch.delenv("BIGAIN_TRITON", raising=False)
    optimized(MERGE)
    monkeypatch.setenv("BIGAIN_TRITON", "1")
    optimized(MERGE)
    assert measured == [2, 2]


def test_where_times_cannot_be_kept_they_are_measured_again(
    timed: Callable[..., list[int]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(select, "cache_dir", lambda: str(tmp_path / "file"))
    measured = timed((0.010, 0.002))
    for _ in range(2):
        assert merges(optimized(MERGE).report) == ["merge"] * 2
    assert measured == [2, 2]


def test_what_cannot_be_measured_stays_dense_and_says_why() -> None:
    def broken(module: Any, inputs: Any) -> Any:
        raise RuntimeError("out of registers\nand more")

    report = optimized(MERGE, backend=broken).report
    assert merges(report) == ["kept"] * 2
    assert "out of registers" in report.sites[0].reason
    assert report.sites[0].reason.startswith("not measured: ")


def difference(method: Any) -> tuple[list[str], list[str]]:
    """Operators of the attention that is dense, and of what is there instead, at the one attention of a toy."""
    module = capture(Separate().eval(), {"image": torch.randn(2, 3, H, W)}).module
    dense, alone = rewrite(module, ()).module, rewrite(module, normalize(method)).module
    found = [select._changed(dense, alone), select._changed(alone, dense)]
    before, after = ([str(node.target).removesuffix(".default").split(".")[-1] for node in nodes] for nodes in found)
    return before, after


def test_what_is_compared_is_the_attention_and_nothing_else() -> None:
    before, after = difference(MERGE)
    assert before.count("linear") == after.count("linear") == 4
    assert {"merge_plan", "merge", "unmerge", "scaled_dot_product_attention"} <= set(after)
    assert "conv2d" not in before + after
    before, after = difference(bgx.KVDownsample(2))
    assert before.count("linear") == after.count("linear") == 2
    assert before.count("scaled_dot_product_attention") == after.count("scaled_dot_product_attention") == 1
    assert "kv_downsample" in after


def test_random_inputs_have_the_layout_of_the_real_ones() -> None:
    flat = torch.zeros(2, dtype=torch.int64)
    for like in (torch.empty(2, 3, 4).transpose(1, 2), torch.empty(3, 1).expand(3, 4), flat, torch.empty(())):
        made: Tensor = select._random(like)
        assert (made.shape, made.stride(), made.dtype) == (like.shape, like.stride(), like.dtype)
        assert bool(made.isfinite().all())


def test_select_is_checked() -> None:
    with pytest.raises(bgx.InputError, match="select='fast' must be 'all' or 'auto'"):
        bgx.optimize(Separate().eval(), method=MERGE, select="fast")  # type: ignore[call-overload]
