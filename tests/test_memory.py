"""Writes through one name of a memory that is read under another: seen, and never moved across."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import bigain_fx as bgx
from bigain_fx.calls import flat_tensors
from bigain_fx.capture import capture
from bigain_fx.passes.canonical import canonicalize
from bigain_fx.passes.errors import CaptureError
from bigain_fx.passes.memory import written, written_by
from bigain_fx.passes.methods import Methods, normalize
from bigain_fx.passes.pipeline import Rewritten, rewrite
from bigain_fx.passes.surgery import Surgeon
from tests import oracle, toys
from tests.toys import C, H, N, Toy, W, heads

MERGE, KV = normalize(bgx.LaplacianMerge(0.5)), normalize(bgx.KVDownsample(2, 0.9))
GRID = (H, W)

NAMES: dict[str, Callable[[Tensor], Tensor]] = {
    # Another name of the memory of t (4, 6), or a copy of it.
    "itself": lambda t: t, "view": lambda t: t.view(24), "slice": lambda t: t[:, 1:3], "transpose": lambda t: t.mT,
    "detach": lambda t: t.detach(), "chunk": lambda t: t.chunk(2)[1], "split": lambda t: t.split([1, 3])[1],
    "unbind": lambda t: t.unbind(1)[2], "tensor_split": lambda t: t.tensor_split(2)[0],
    "contiguous": lambda t: t.contiguous(), "contiguous copy": lambda t: t.mT.contiguous(),
    "to": lambda t: t.to(torch.float32), "to copy": lambda t: t.to(torch.float64), "type_as": lambda t: t.type_as(t),
    "reshape": lambda t: t.reshape(2, 12), "expand": lambda t: t.expand_as(t), "diagonal": lambda t: t.diagonal(),
    "broadcast": lambda t: torch.broadcast_tensors(torch.ones(1), t)[1],
    "meshgrid": lambda t: torch.meshgrid(torch.ones(2), t[0], indexing="ij")[1][0],
    "einsum": lambda t: torch.einsum("ij->ji", t), "at least": lambda t: torch.atleast_2d(t),
    "dropout": lambda t: F.dropout(t, 0.5, False),
    "real": lambda t: torch.view_as_real(torch.view_as_complex(t.view(12, 2))),
    "unflatten": lambda t: t.unflatten(1, (2, 3)), "movedim": lambda t: t.movedim(0, 1), "clone": lambda t: t.clone(),
    "view of a view": lambda t: t[1:].chunk(3)[1].squeeze(0), "sum": lambda t: t.sum(0),
    "cat": lambda t: torch.cat([t]),
}  # fmt: skip
WRITES: dict[str, Callable[[Tensor], object]] = {
    "mul_": lambda t: t.mul_(2), "copy_": lambda t: t.copy_(torch.zeros_like(t)), "fill": lambda t: t.fill_(5),
    "out": lambda t: torch.add(t, 1, out=t), "foreach": lambda t: torch._foreach_mul_([torch.ones(1), t], 2),
    "index": lambda t: t.__setitem__(0, 7), "not in place": lambda t: t * 2,
    "only read": lambda t: torch.ones_like(t).mul_(t),
}  # fmt: skip


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("name", NAMES)
def test_a_write_is_seen_under_every_name(name: str, write: str) -> None:
    """Both ways: down, into a view of what is read, and up, into what the tensor that is read is a view of."""

    def changes(t: Tensor, down: bool) -> Tensor:
        base = t + 1
        view = NAMES[name](base)
        WRITES[write](view if down else base)
        return base if down else view

    for down in (True, False):
        graph = make_fx(changes, pre_dispatch=True)(torch.randn(4, 6), down).graph
        base = torch.randn(4, 6) + 1
        view = NAMES[name](base)
        read, target = (base, view) if down else (view, base)
        before = read.clone()
        WRITES[write](target)
        (node,) = graph.output_node().all_input_nodes
        if not torch.equal(read, before):
            assert written(node) or written_by(node) is not None, f"{graph}"
        elif name in ("clone", "sum", "cat") or write in ("not in place", "only read"):
            assert written_by(node) is None, f"{graph}"


def test_the_order_counts() -> None:
    def changes(t: Tensor) -> tuple[Tensor, ...]:
        base = t + 1
        view = base[:]
        base.mul_(2)
        return view.exp(), base[:2].exp()

    graph = make_fx(changes, pre_dispatch=True)(torch.randn(4, 6)).graph
    by_name = {node.name: node for node in graph.nodes}
    view, write, after = by_name["slice_1"], by_name["mul_"], by_name["slice_2"]
    assert written_by(view) is write
    assert written_by(view, until=write) is None
    assert written_by(view, until=after) is write
    assert written_by(after) is None


def run(model: nn.Module, methods: Methods, **inputs: Tensor) -> tuple[Rewritten, Tensor, Tensor]:
    """What became of the attentions, the output, and that of the model itself."""
    rewritten = rewrite(capture(model.eval(), inputs).module, methods)
    with torch.no_grad():
        expected = model(**{name: tensor.clone() for name, tensor in inputs.items()})
        return rewritten, rewritten.module(*(tensor.clone() for tensor in flat_tensors(inputs)))[0], expected


class Between(Toy):
    """Queries, then keys and values, are projected from a view of what is changed in between."""

    def __init__(self, renamed: Callable[[Tensor], Tensor], write: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.renamed, self.write = renamed, write

    def branch(self, x: Tensor, metric: Tensor) -> Tensor:
        base, x = x, self.renamed(x)
        q = heads(self.q(x))
        self.write(base)
        return self.out(self.attend(q, heads(self.k(x)), heads(self.v(x))))


@pytest.mark.parametrize("methods", [MERGE, KV], ids=["merge", "kv"])
@pytest.mark.parametrize("name", ["view", "slice", "detach", "item"])
def test_a_write_through_the_base_between_projections(name: str, methods: Methods) -> None:
    names: dict[str, Callable[[Tensor], Tensor]] = {
        "view": lambda t: t.view(-1, N, C), "slice": lambda t: t[:], "detach": lambda t: t.detach(),
        "item": lambda t: t.split([C, 0], -1)[0],
    }  # fmt: skip
    rewritten, output, expected = run(Between(names[name], lambda t: t.mul_(0.5)), methods, image=toys.image())
    (record,) = rewritten.records
    assert record.action == "kept"
    assert "is changed in place by mul_" in record.reason
    torch.testing.assert_close(output, expected)


def test_a_write_inside_of_a_context() -> None:
    """What runs in a graph of its own writes into what it is given."""

    def write(base: Tensor) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            base.mul_(0.5)
            base @ torch.ones(C, 1)

    rewritten, output, expected = run(Between(lambda t: t[:], write), MERGE, image=toys.image())
    assert any("autocast" in str(node.target) for node in rewritten.module.graph.nodes)
    assert "is changed in place by wrap_with_autocast" in rewritten.records[0].reason
    torch.testing.assert_close(output, expected)


class Copies(Toy):
    """Equal copies of one memory: before and after a write to it, or with a write to one of them."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def branch(self, x: Tensor, metric: Tensor) -> Tensor:
        first = x.clone()
        if self.kind == "source":
            x.view(-1).mul_(0.5)
        second = x.clone()
        if self.kind == "first":
            first.view(-1).mul_(0.5)
        elif self.kind == "second":
            second.view(-1).mul_(0.5)
        return self.out(self.attend(heads(self.q(first)), heads(self.k(second)), heads(self.v(second)))) + x.mean()


@pytest.mark.parametrize("methods", [(), MERGE, KV], ids=["dense", "merge", "kv"])
@pytest.mark.parametrize("kind", ["source", "first", "second"])
def test_copies_with_a_write_among_them_are_two(kind: str, methods: Methods) -> None:
    rewritten, output, expected = run(Copies(kind), methods, image=toys.image())
    assert rewritten.records[0].action == "kept"
    torch.testing.assert_close(output, expected)


def test_equal_copies_without_a_write_are_one() -> None:
    rewritten, _, _ = run(Copies("none"), MERGE, image=toys.image())
    assert rewritten.records[0].action == "merge"


class Company(Toy):
    """What meets the tokens from elsewhere, a mask or rotary angles, is a view; what it shows is changed before use."""

    def __init__(self, kind: str, when: str) -> None:
        super().__init__()
        self.kind, self.when = kind, when
        self.table = nn.Buffer(torch.randn(N, N if kind == "mask" else C // toys.HEADS))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        base = self.table.clone()
        seen = base[:]
        if self.when == "before":
            base.mul_(3)
        if self.kind == "mask":
            o = F.scaled_dot_product_attention(q, k, v, seen)
        else:
            o = F.scaled_dot_product_attention(q * seen, k * seen, v)
        base.mul_(3)
        return toys.join(o) * base.mean()


@pytest.mark.parametrize("methods", [MERGE, KV], ids=["merge", "kv"])
@pytest.mark.parametrize("kind", ["mask", "angles"])
def test_a_mask_or_angles_that_are_changed_before_they_are_read(kind: str, methods: Methods) -> None:
    rewritten, output, expected = run(Company(kind, "before"), methods, image=toys.image())
    assert rewritten.records[0].action == "kept"
    assert "meets slice_1, which mul_ changes in place" in rewritten.records[0].reason
    torch.testing.assert_close(output, expected)
    rewritten, output, expected = run(Company(kind, "afterwards"), methods, image=toys.image())
    assert rewritten.records[0].action in ("merge", "kv")


class Written(Toy):
    """What has a value for every token depends on the image by way of memory alone."""

    def branch(self, x: Tensor, metric: Tensor) -> Tensor:
        table = torch.zeros(2, N, C)
        table.view(-1).copy_(self.v(x).reshape(-1))
        seen = table.view(2, N, C)
        return self.out(self.attend(heads(self.q(x) + seen), heads(self.k(x)), heads(self.v(x))))


def test_what_is_written_depends_on_what_it_is_written_from() -> None:
    rewritten, output, expected = run(Written(), MERGE, image=toys.image())
    assert rewritten.records[0].action == "kept"
    assert "which has a value for every token" in rewritten.records[0].reason
    torch.testing.assert_close(output, expected)


class Turned(Toy):
    """The tokens are put in another order in place: where they lie is no longer known."""

    def tokens(self, image: Tensor) -> Tensor:
        h = super().tokens(image)
        seen = h[:]
        h.copy_(h.flip(1))
        return seen


def test_tokens_that_are_overwritten_have_no_grid() -> None:
    rewritten, output, expected = run(Turned(), MERGE, image=toys.image())
    assert rewritten.records[0].action == "kept"
    assert "no grid" in rewritten.records[0].reason
    torch.testing.assert_close(output, expected)


class Modulated(Toy):
    """Something lies between the norm and the attention's input, though no value shows it."""

    def forward(self, image: Tensor) -> Tensor:
        h = self.tokens(image)
        y = self.norm(h)
        y.unsqueeze(0).tanh_()
        x = y.view(-1, N, C)
        return h + self.branch(x, x)


def test_the_metric_is_the_input_where_that_was_changed_in_place() -> None:
    toy, image = Modulated(), toys.image()
    rewritten, output, _ = run(toy, MERGE, image=image)
    assert rewritten.records[0].action == "merge"
    plans: list[oracle.Plan] = []

    def squeeze(x: Tensor, metric: Tensor) -> Tensor:
        plans.append(oracle.merge_plan(metric, GRID, (2, 2), oracle.merged_count(GRID, (2, 2), 0.5)))
        return oracle.merge(x, plans[0])

    toy.squeeze, toy.spread = squeeze, lambda y: oracle.unmerge(y, plans[0])
    with torch.no_grad():
        torch.testing.assert_close(output, toy(image), rtol=1e-4, atol=1e-5)


class Above(Toy):
    """The residual stream, of which the plan is made, is changed between the norm and the attention's input."""

    def forward(self, image: Tensor) -> Tensor:
        base = self.tokens(image)
        h = base[:]
        x = self.norm(h)
        base.mul_(torch.linspace(-1, 1, C))
        x = x * self.norm.weight
        return h + self.branch(x, h)


def test_a_stream_that_is_changed_before_the_plan_is_made() -> None:
    rewritten, output, expected = run(Above(), MERGE, image=toys.image())
    assert "is changed in place by mul_" in rewritten.records[0].reason
    torch.testing.assert_close(output, expected)


class Exit(Toy):
    """Some rows of what the attention gives back are changed before it is read, by this name or that."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, image: Tensor) -> Tensor:
        h = self.tokens(image)
        base = self.branch(self.norm(h), h)
        y = base[:] if self.kind == "base" else base
        base[:, :2].mul_(3)
        y = y * torch.linspace(1, 2, C) if self.kind == "gated" else y
        y = y.unsqueeze(0).squeeze(0) if self.kind == "view" else y
        return h + y


@pytest.mark.parametrize("methods", [MERGE, KV], ids=["merge", "kv"])
@pytest.mark.parametrize("kind", ["itself", "base", "gated", "view"])
def test_what_is_given_back_may_be_changed(kind: str, methods: Methods) -> None:
    toy, image = Exit(kind), toys.image()
    rewritten, output, _ = run(toy, methods, image=image)
    assert rewritten.records[0].action != "kept"
    *_, out = (node for node in rewritten.module.graph.nodes if "linear" in str(node.target))
    fewer = methods is MERGE and kind == "itself"  # else the rows are given back before they are projected
    assert out.meta["val"].shape[1] == (N - oracle.merged_count(GRID, (2, 2), 0.5) if fewer else N)
    plans: list[oracle.Plan] = []

    def squeeze(x: Tensor, metric: Tensor) -> Tensor:
        plans.append(oracle.merge_plan(metric, GRID, (2, 2), oracle.merged_count(GRID, (2, 2), 0.5)))
        return oracle.merge(x, plans[0])

    if methods is MERGE:
        toy.squeeze, toy.spread = squeeze, lambda y: oracle.unmerge(y, plans[0])
    else:
        toy.squeeze_kv = lambda x, metric: oracle.kv_downsample(x, 0.9, GRID, 2)
    with torch.no_grad():
        torch.testing.assert_close(output, toy(image), rtol=1e-4, atol=1e-5)


class Overlapping(Toy):
    """Parts of one projection that share channels; the one that is not attended to is changed."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(C, 3 * C)

    def branch(self, x: Tensor, metric: Tensor) -> Tensor:
        y = self.qkv(x)
        q, k, v, other = y[..., :C], y[..., C : 2 * C], y[..., 2 * C :], y[..., C // 2 : 3 * C // 2]
        other.tanh_()
        return self.out(self.attend(heads(q), heads(k), heads(v))) + other


@pytest.mark.parametrize("methods", [MERGE, KV], ids=["merge", "kv"])
def test_parts_of_a_projection_that_overlap(methods: Methods) -> None:
    rewritten, output, expected = run(Overlapping(), methods, image=toys.image())
    assert rewritten.records[0].action == "kept"
    torch.testing.assert_close(output, expected)


class Timed(Toy):
    """The timestep is scaled in place before the attention."""

    def forward(self, image: Tensor, timestep: Tensor) -> Tensor:
        timestep.view(-1).mul_(0.001)
        return super().forward(image) * timestep[:, None, None]


def test_a_schedule_needs_the_timestep_that_was_given() -> None:
    methods = normalize(bgx.KVDownsample(2, bgx.LinearAlpha(0.8, 1.2, 999, 0)))
    given = {"image": toys.image(), "timestep": torch.tensor([400.0, 700.0])}
    rewritten, output, expected = run(Timed(), methods, **given)
    assert rewritten.records[0].reason == "alpha: timestep is changed in place by mul_"
    torch.testing.assert_close(output, expected)


class Constant(nn.Module):
    """``forward`` writes into a plain tensor, by another name of it."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, self.counts = name, torch.zeros(4, 6)

    def forward(self, image: Tensor) -> Tensor:
        NAMES[self.name](self.counts).add_(1)
        return image + self.counts


@pytest.mark.parametrize("name", ["itself", "chunk", "unbind", "broadcast", "view of a view"])
def test_a_constant_that_is_written_under_another_name_is_refused(name: str) -> None:
    with pytest.raises(CaptureError, match="writes into a tensor that is no buffer"):
        capture(Constant(name).eval(), {"image": torch.randn(4, 6)})


class OneHead(Toy):
    """One head, left out: batch and heads share a dimension, and it is the batch."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(*(t.transpose(1, 2).flatten(2) for t in (q, k, v)))


def test_weighed_attention_without_a_dimension_of_heads() -> None:
    toy, image = OneHead(), toys.image()
    methods = normalize(bgx.LaplacianMerge(0.5, proportional=True))
    rewritten, output, _ = run(toy, methods, image=image)
    assert rewritten.records[0].action == "merge"
    plans: list[oracle.Plan] = []

    def squeeze(x: Tensor, metric: Tensor) -> Tensor:
        plans.append(oracle.merge_plan(metric, GRID, (2, 2), oracle.merged_count(GRID, (2, 2), 0.5)))
        return oracle.merge(x, plans[0])

    toy.squeeze, toy.spread = squeeze, lambda y: oracle.unmerge(y, plans[0])
    toy.squeeze_kv = lambda x, metric: oracle.unmerge(oracle.merge(x, plans[0]), plans[0])  # each as often as it counts
    with torch.no_grad():
        torch.testing.assert_close(output, toy(image), rtol=1e-4, atol=1e-5)


class Activated(Toy):
    """The residual stream is changed in place before the attention; ``older`` is read afterwards under another name."""

    def __init__(self, change: Callable[[Tensor], Tensor], older: bool) -> None:
        super().__init__()
        self.change, self.older = change, older

    def forward(self, image: Tensor) -> Tensor:
        h = self.tokens(image).add(0.1)
        before = h[:]
        h = self.change(h)
        return (before if self.older else h) + self.branch(self.norm(h), h)


@pytest.mark.parametrize("older", [False, True], ids=["by its name", "by an older name"])
@pytest.mark.parametrize(
    "change",
    [
        torch.tanh_, torch.sigmoid_, torch.relu_, torch.exp_, torch.neg_, torch.square_, torch.abs_,
        lambda t: F.silu(t, inplace=True), lambda t: t.clamp_(-1, 1), lambda t: t.sub_(0.2), lambda t: t.div_(3),
        lambda t: t.masked_fill_(t > 1, 0.5),
    ],
    ids=["tanh", "sigmoid", "relu", "exp", "neg", "square", "abs", "silu", "clamp", "sub", "div", "masked_fill"],
)  # fmt: skip
def test_tokens_changed_in_place_lie_where_they_lay(change: Callable[[Tensor], Tensor], older: bool) -> None:
    toy, image = Activated(change, older), toys.image()
    rewritten, output, _ = run(toy, KV, image=image)
    assert (rewritten.records[0].action, rewritten.records[0].grid) == ("kv", GRID), rewritten.records[0].reason
    toy.squeeze_kv = lambda x, metric: oracle.kv_downsample(x, 0.9, GRID, 2)
    with torch.no_grad():
        torch.testing.assert_close(output, toy(image), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("order", ["ab", "ba"])
def test_a_constant_is_made_before_it_is_used(order: str) -> None:
    surgeon = Surgeon(capture(Toy().eval(), {"image": toys.image()}).module)
    like = next(iter(surgeon.graph.find_nodes(op="placeholder")))
    made = {name: surgeon.constant(name, torch.ones(1), like) for name in order}
    both = surgeon.once("sum", made["a"], lambda: surgeon.emit(torch.ops.aten.add.Tensor, (made["a"], made["b"]), like))
    assert max(made.values()) < both
    surgeon.graph.lint()


@pytest.mark.parametrize("write", [False, True], ids=["read", "written"])
def test_equal_views_are_one_unless_one_is_written(write: bool) -> None:
    class Twice(nn.Module):
        def forward(self, angles: Tensor) -> Tensor:
            angles = angles + 0
            first = angles.unsqueeze(1)
            second = angles.unsqueeze(1)
            if write:
                first.copy_(torch.zeros_like(first))
            return first * 2 + second

    surgeon = Surgeon(capture(Twice().eval(), {"angles": torch.randn(2, 3)}).module)
    canonicalize(surgeon)
    views = surgeon.graph.find_nodes(op="call_function", target=torch.ops.aten.unsqueeze.default)
    assert len(views) == 1 + write
