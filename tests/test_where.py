"""``where``: the attentions that it names are rewritten as by hand, all others are kept and say so, on every path."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bigain_fx as bgx
from bigain_fx import select
from bigain_fx.passes.grammar import parse
from bigain_fx.passes.where import Where
from bigain_fx.select import Cost, Span
from tests import toys
from tests.processors import Downsample, Merge, apply
from tests.test_calibration import calls
from tests.test_models import BLOCKS, COARSE, FINE, cross, dit_inputs, make_dit, make_unet, relative, unet_inputs
from tests.test_sample import tiny

LAST = "transformer_blocks.[12].*"


@pytest.mark.parametrize(
    ("where", "blocks"),
    [
        (LAST, {1, 2}),
        ("*.2.attn1", {2}),
        (("transformer_blocks.0.attn?", "*.2.*"), {0, 2}),
        (lambda site: site.name.endswith("1.attn1") and site.tokens == 256 and site.grid == (16, 16), {1}),
        (None, {0, 1, 2}),
    ],
    ids=["pattern", "another", "several", "function", "all"],
)
@pytest.mark.parametrize("kind", ["merge", "block", "kv"])
@torch.no_grad()
def test_it_is_the_model_with_operators_in_these_attentions(kind: str, where: Where, blocks: set[int]) -> None:
    model, (args, kwargs) = make_dit(), dit_inputs([7, 900])
    methods: dict[str, Any] = {
        "merge": bgx.LaplacianMerge(0.6, where=where), "block": bgx.ToMe(0.6, scope="block", where=where),
        "kv": bgx.KVDownsample(2, where=where),
    }  # fmt: skip
    fast = bgx.optimize(model, args, kwargs, method=methods[kind], backend="eager")
    chosen = [name for index, name in enumerate(BLOCKS) if index in blocks]
    assert [site.name for site in fast.report.rewritten] == chosen
    said = "/".join(where) if isinstance(where, tuple) else where if isinstance(where, str) else "<lambda>"
    left_out = f"where={said} leaves it out"
    assert [site.reason for site in fast.report.sites] == ["" if name in chosen else left_out for name in BLOCKS]
    if kind != "block":
        hand = {"merge": Merge(0.6)} if kind == "merge" else {"downsample": Downsample(2)}
        slow, _ = apply(model, args, kwargs, only=chosen, **hand)  # type: ignore[arg-type]
        assert relative(fast(*args, **kwargs).sample, slow(*args, **kwargs).sample) <= 1e-4


@torch.no_grad()
def test_each_method_has_its_own_and_levels_count_all_grids() -> None:
    """The blocks that go up again do not make the half grid the finest one."""
    model, inputs = make_unet(), unet_inputs((16, 16), [7])
    method = (bgx.ToMe(0.5, where="up_blocks.0.*"), bgx.KVDownsample(2, levels=2, where=lambda site: site.level == 2))
    report = bgx.inspect(model, inputs, method=method)
    assert [site.name for site in report.rewritten] == COARSE
    assert {site.action for site in report.rewritten} == {"kv"}
    reasons = {site.name: site.reason for site in report.sites}
    left_out = "where=up_blocks.0.* leaves it out"
    assert reasons[FINE[0]] == f"where=<lambda> leaves it out; {left_out}"
    assert [reasons[name] for name in COARSE] == [left_out] * 2 + ["level 2 of the grids, finest first; levels=1"] * 2
    assert all("cross-attention" in reasons[name] for name in cross(FINE + COARSE))


def test_ratios_are_those_of_the_attentions_that_are_left() -> None:
    model, (args, kwargs) = make_dit(), dit_inputs([7, 900])
    report = bgx.inspect(model, args, kwargs, method=bgx.LaplacianMerge((0.25, 0.75), where=LAST))
    assert [site.tokens_after for site in report.sites] == [256, 192, 64]
    message = (
        r"ratio=\(0.25, 0.75, 0.5\) has 3 numbers, and the graph 2 self-attentions on the grids of levels=1 that "
        r"where=transformer_blocks.\[12\].\* leaves"
    )
    with pytest.raises(bgx.RewriteError, match=message):
        bgx.inspect(model, args, kwargs, method=bgx.LaplacianMerge((0.25, 0.75, 0.5), where=LAST))


def fails(site: Any) -> bool:
    raise KeyError(site.name)


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("blocks.*", r"where='blocks.\*' matches no attention; there are transformer_blocks.0.attn1, transformer_bl"),
        ("transformer_blocks.1", "where='transformer_blocks.1' matches no attention"),
        ((LAST, "Transformer*"), r"where='Transformer\*' matches no attention"),
        (fails, "where=fails raises KeyError for transformer_blocks.0.attn1: 'transformer_blocks.0.attn1'"),
    ],
)
def test_what_matches_nothing_is_an_error_in_one_line(where: Where, message: str) -> None:
    model, (args, kwargs) = make_dit(), dit_inputs([7, 900])
    with pytest.raises(bgx.RewriteError, match=message) as caught:
        bgx.inspect(model, args, kwargs, method=bgx.BlockPool(0.5, where=where))
    assert "\n" not in str(caught.value)


def test_a_function_may_leave_out_all(caplog: pytest.LogCaptureFixture) -> None:
    """As where it asks for a size that this call has not: a warning, no error."""
    model, (args, kwargs) = make_dit(), dit_inputs([7, 900])
    report = bgx.inspect(model, args, kwargs, method=bgx.ToDo(2, where=lambda site: site.tokens > 1024))
    assert report.unchanged == "todo:2:where=<lambda> changed nothing: where=<lambda> leaves it out (3 of 3)"


class Parted(nn.Module):
    """Two toys with a graph break between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = toys.Separate(), toys.Separate()

    def forward(self, image: Tensor) -> Tensor:
        found: Tensor = self.first(image)
        torch._dynamo.graph_break()
        return found + self.second(image)


@torch.no_grad()
def test_in_the_backend_of_dynamo_each_part_takes_what_is_its_own() -> None:
    torch.manual_seed(0)
    model, image, method = Parted().eval(), toys.image(), bgx.ToMe(0.5, where="second")
    options = {"method": method, "backend": "eager"}
    fast = torch.compile(model, backend="bigain", dynamic=False, options=options)
    merged = bgx.optimize(model.second, method=bgx.ToMe(0.5), backend="eager")(image)
    torch.testing.assert_close(fast(image), model.first(image) + merged)


@pytest.mark.slow
def test_exports_have_it(tmp_path: Path) -> None:
    model, (args, kwargs) = make_dit(), dit_inputs([7, 900])
    method = bgx.LaplacianMerge(0.6, where=("*.0.attn1", "*.2.attn1"))
    record = bgx.export_onnx(model, args, tmp_path / "a.onnx", kwargs=kwargs, method=method)
    assert [site.name for site in record.graphs[0].report.rewritten] == [BLOCKS[0], BLOCKS[2]]
    assert record.operators["bigain::LaplacianMergePlan"] == 2
    assert parse(bgx.OrtDenoiser(tmp_path / "a.onnx").interface.method) == (method,)


def test_a_function_is_written_by_its_name(tmp_path: Path) -> None:
    """Not by its address, which differs from process to process."""
    model, (args, kwargs) = make_dit(), dit_inputs([7, 900])
    bgx.export_onnx(model, args, tmp_path / "a.onnx", kwargs=kwargs, verify=False,
                    method=bgx.ToDo(2, where=lambda site: site.name == BLOCKS[1]))  # fmt: skip
    assert bgx.OrtDenoiser(tmp_path / "a.onnx").interface.method == "ToDo(where=<lambda>)"


def test_select_measures_none_that_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (args, kwargs) = make_dit(), dit_inputs([7, 900])
    span = Span(1.0, 1.0, 1.0, 1.0)
    monkeypatch.setattr(select, "_cost", lambda *_: Cost(Span(2.0, 2.0, 2.0, 2.0), span))
    fast = bgx.optimize(model, args, kwargs, method=bgx.ToMe(0.5, where=LAST), backend="eager", select="auto")
    assert [(site.action, site.ms) for site in fast.report.sites] == [("kept", None), ("merge", 2.0), ("merge", 2.0)]


def test_calibration_finds_ratios_for_these_alone() -> None:
    torch.manual_seed(1)
    model = tiny(layers=3).model
    found = bgx.calibrate(model, calls(), method=bgx.LaplacianMerge(0.5, where=LAST), cells=())
    assert len(found.tried) == 2
    assert found.method.where == LAST
    report = bgx.inspect(model, (), calls()[0], method=found.method)
    assert report.sites[0].reason == f"where={LAST} leaves it out"
