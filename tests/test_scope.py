"""Scope, alignment and metric of merging, and rotary angles on a case worked by hand (docs/operators.md)."""

from __future__ import annotations

import cmath
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bigain_fx as bgx
from bigain_fx.capture import capture
from bigain_fx.passes.methods import normalize
from bigain_fx.passes.pipeline import Rewritten, rewrite
from tests import oracle
from tests.toys import HEADS, C, H, LiteralSizes, N, Toy, W, heads, join

GRID = (H, W)
RATIO = 0.5
MERGED = oracle.merged_count(GRID, (2, 2), RATIO)
Plan = Callable[[Tensor], oracle.Plan]
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class Blocks(nn.Module):
    """Two blocks of self-attention, cross-attention and MLP, then a head without a residual join.

    In `planned` mode every branch works on merged tokens, by the plan that its block's attention made; but none of the
    second block, where its attention is `refused`.
    """

    def __init__(self, norm_before_cross: bool = True, gate: bool = False, refused: Attend | None = None) -> None:
        super().__init__()
        self.embed, self.head = nn.Conv2d(3, C, 1), nn.Linear(C, 3)
        self.norms = nn.ModuleList(nn.LayerNorm(C) for _ in range(6))
        self.layers = nn.ModuleList(nn.Linear(C, C) for _ in range(20))
        self.norm_before_cross, self.gate, self.refused = norm_before_cross, gate, refused
        self.planned: Plan | None = None

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        h = self.embed(image).flatten(2).transpose(1, 2)
        for block in range(2):
            norms = self.norms[3 * block : 3 * block + 3]
            layers = self.layers[10 * block : 10 * block + 10]
            own = self.refused if block and self.refused else attend
            plan = None if self.planned is None or own is not attend else self.planned(h)

            def branch(x: Tensor, run: Callable[[Tensor], Tensor], plan: oracle.Plan | None = plan) -> Tensor:
                return run(x) if plan is None else oracle.unmerge(run(oracle.merge(x, plan)), plan)

            h = h + branch(norms[0](h), lambda x, m=layers, a=own: m[3](a(m[0](x), m[1](x), m[2](x))))
            y = norms[1](h) if self.norm_before_cross else h
            h = h + branch(y, lambda x, m=layers: m[7](attend(m[4](x), m[5](text), m[6](text))))
            scale = text.mean(1, keepdim=True).tanh() if self.gate else 1.0
            h = h + branch(norms[2](h), lambda x, m=layers, s=scale: s * m[9](F.gelu(m[8](x))))
        return self.head(h)


class Parallel(Toy):
    """Attention and MLP side by side on one input, projected together."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.out = nn.Linear(C, 2 * C), nn.Linear(3 * C, C)

    def branch(self, x: Tensor, metric: Tensor) -> Tensor:
        x = self.squeeze(x, metric)
        attention = self.attend(heads(self.q(x)), heads(self.k(x)), heads(self.v(x)))
        return self.spread(self.out(torch.cat([attention, F.gelu(self.up(x))], 2)))


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return join(F.scaled_dot_product_attention(heads(q), heads(k), heads(v)))


def run(model: nn.Module, method: Any, *inputs: Tensor) -> tuple[Rewritten, Tensor]:
    names = ("image", "text")[: len(inputs)]
    module = capture(model.eval(), dict(zip(names, inputs, strict=True))).module
    rewritten = rewrite(module, normalize(method))
    with torch.no_grad():
        return rewritten, rewritten.module(*inputs)[0]


def merges(rewritten: Rewritten) -> int:
    return sum("bigain.merge." in str(node.target) for node in rewritten.module.graph.nodes)


@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("norm_before_cross", [True, False])
@pytest.mark.parametrize("batch", [1, 2])
def test_every_branch_of_a_block_runs_on_merged_tokens(norm_before_cross: bool, gate: bool, batch: int) -> None:
    torch.manual_seed(0)
    model = Blocks(norm_before_cross, gate)
    inputs = torch.randn(batch, 3, H, W), torch.randn(batch, 5, C)
    rewritten, output = run(model, bgx.LaplacianMerge(RATIO, scope="block"), *inputs)
    assert [record.action for record in rewritten.records] == ["merge", "kept", "merge", "kept"]
    assert merges(rewritten) == 6
    attention, _ = run(model, bgx.LaplacianMerge(RATIO), *inputs)
    assert merges(attention) == 2
    assert rewritten.flops_after < attention.flops_after < attention.flops
    with torch.no_grad():
        dense = model(*inputs)
        model.planned = lambda metric: oracle.merge_plan(metric, GRID, (2, 2), MERGED)
        expected = model(*inputs)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    assert (expected - dense).norm() > 1e-2 * dense.norm()


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return join(F.scaled_dot_product_attention(heads(q), heads(k), heads(v), is_causal=True))


def spelled_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return join((heads(q) @ heads(k).mT).softmax(-1) @ heads(v))


def linear_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return join(heads(q).relu() @ (heads(k).relu().mT @ heads(v)))


def mixing_rows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(q, k.cumsum(1), v)


@pytest.mark.parametrize("refused", [causal, spelled_out, linear_attention, mixing_rows])
def test_a_block_ends_at_an_attention_that_is_refused(refused: Attend) -> None:
    torch.manual_seed(0)
    model = Blocks(refused=refused)
    inputs = torch.randn(2, 3, H, W), torch.randn(2, 5, C)
    rewritten, output = run(model, bgx.LaplacianMerge(RATIO, scope="block"), *inputs)
    first, *others = rewritten.records
    assert (first.action, {record.action for record in others}) == ("merge", {"kept"})
    assert merges(rewritten) == 3
    with torch.no_grad():
        model.planned = lambda metric: oracle.merge_plan(metric, GRID, (2, 2), MERGED)
        torch.testing.assert_close(output, model(*inputs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("scope", "merged"), [("block", True), ("attention", False)])
def test_a_parallel_mlp_belongs_to_the_block_not_to_the_attention(scope: str, merged: bool) -> None:
    torch.manual_seed(0)
    toy, image = Parallel(), torch.randn(2, 3, H, W)
    rewritten, output = run(toy, bgx.LaplacianMerge(RATIO, scope=scope), image)
    linears = [node for node in rewritten.module.graph.nodes if "linear" in str(node.target)]
    up = next(node for node in linears if node.meta["val"].shape[-1] == 2 * C)
    assert up.meta["val"].shape[1] == (N - MERGED if merged else N)
    with torch.no_grad():
        h = toy.tokens(image)
        plan = oracle.merge_plan(h, GRID, (2, 2), MERGED)
        x = toy.norm(h)
        few = oracle.merge(x, plan)
        attention = toy.attend(heads(toy.q(few)), heads(toy.k(few)), heads(toy.v(few)))
        if merged:
            expected = h + oracle.unmerge(toy.out(torch.cat([attention, F.gelu(toy.up(few))], 2)), plan)
        else:
            expected = h + toy.out(torch.cat([oracle.unmerge(attention, plan), F.gelu(toy.up(x))], 2))
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("ratio", [0.25, 0.7])
def test_one_plan_for_the_whole_batch(ratio: float) -> None:
    """The plan of samples side by side: scores and similarities run over the channels of all."""
    torch.manual_seed(0)
    toy, image = Toy(), torch.randn(3, 3, H, W)
    _, output = run(toy, bgx.LaplacianMerge(ratio, align="batch"), image)
    merged = oracle.merged_count(GRID, (2, 2), ratio)

    def squeeze(x: Tensor, metric: Tensor) -> Tensor:
        plan = oracle.merge_plan(torch.cat([*metric], 1).unsqueeze(0), GRID, (2, 2), merged)
        plans.append(oracle.Plan(plan.assign.expand(3, -1), plan.rep.expand(3, -1)))
        return oracle.merge(x, plans[0])

    plans: list[oracle.Plan] = []
    toy.squeeze, toy.spread = squeeze, lambda y: oracle.unmerge(y, plans[0])
    with torch.no_grad():
        torch.testing.assert_close(output, toy(image), rtol=1e-4, atol=1e-5)
    alone = [token for sample in image for token in oracle.merge_plan(
        toy.tokens(sample.unsqueeze(0)), GRID, (2, 2), merged).token_map()]  # fmt: skip
    assert alone != plans[0].token_map(), "the samples would have agreed anyway"


class Scaled(Toy):
    """A scale between the norm and the attention: the metric is the attention's input."""

    def forward(self, image: Tensor) -> Tensor:
        h = self.tokens(image)
        scale = image.mean((2, 3))[:, :1, None].sigmoid()
        return h + self.branch(self.norm(h) * scale * torch.linspace(0.1, 3, C), h)


@pytest.mark.parametrize("toy_class", [Toy, Scaled])
def test_the_metric_is_the_stream_or_the_input(toy_class: type[Toy]) -> None:
    torch.manual_seed(0)
    toy, image = toy_class(), torch.randn(2, 3, H, W)
    _, output = run(toy, bgx.LaplacianMerge(RATIO), image)
    stream = toy_class is Toy
    plans: list[oracle.Plan] = []

    def squeeze(x: Tensor, residual: Tensor) -> Tensor:
        plans.append(oracle.merge_plan(residual if stream else x, GRID, (2, 2), MERGED))
        other = oracle.merge_plan(x if stream else residual, GRID, (2, 2), MERGED)
        assert other.token_map() != plans[0].token_map(), "the two metrics would have agreed anyway"
        return oracle.merge(x, plans[0])

    toy.squeeze, toy.spread = squeeze, lambda y: oracle.unmerge(y, plans[0])
    with torch.no_grad():
        torch.testing.assert_close(output, toy(image), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["block", "row", "pool"])
def test_the_choices_for_comparison(kind: str) -> None:
    torch.manual_seed(0)
    toy, image = Toy(), torch.randn(2, 3, H, W)
    method: Any = bgx.LaplacianMerge(RATIO, cell_layout=kind) if kind != "pool" else None
    rewritten, output = run(toy, method or bgx.BlockPool(0.55), image)
    assert rewritten.records[0].action == "merge"
    plans: list[oracle.Plan] = []

    def squeeze(x: Tensor, residual: Tensor) -> Tensor:
        if kind == "pool":
            plans.append(oracle.pool_plan(residual, GRID, (2, 2), 4))  # int(24 * 0.55) = 13 tokens: four cells go
        elif kind == "block":
            plans.append(oracle.merge_plan(residual, GRID, (2, 2), MERGED))
        else:
            positions = oracle.row_positions(oracle.laplacian_score(residual, GRID), GRID, (2, 2))
            single = [oracle.merge_plan(residual[b : b + 1], GRID, (2, 2), MERGED, positions[b]) for b in range(len(x))]
            plans.append(oracle.Plan(*(torch.cat([getattr(p, name) for p in single]) for name in ("assign", "rep"))))
        return oracle.merge(x, plans[0])

    toy.squeeze, toy.spread = squeeze, lambda y: oracle.unmerge(y, plans[0])
    with torch.no_grad():
        torch.testing.assert_close(output, toy(image), rtol=1e-4, atol=1e-5)


class Joint(Toy):
    """Queries, keys and values of a text stand before and behind those of the image."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = (nn.Parameter(torch.randn(1, HEADS, n, C // HEADS)) for n in (2, 3))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        sides = [each.expand(len(q), -1, -1, -1) for each in (self.first, self.last)]
        q, k, v = (torch.cat([sides[0], t, sides[1]], 2) for t in (q, k, v))
        return join(F.scaled_dot_product_attention(q, k, v)[:, :, 2:-3])


@pytest.mark.parametrize("toy_class", [Toy, Joint])
@pytest.mark.parametrize("method", [bgx.LaplacianMerge, bgx.ToMe, bgx.BlockPool])
@pytest.mark.parametrize("scope", ["attention", "block"])
def test_proportional_attention_repeats_each_key(method: Any, scope: str, toy_class: type[Toy]) -> None:
    """A key that counts for its group is a key repeated as often as the group has tokens."""
    torch.manual_seed(0)
    toy, image = toy_class(), torch.randn(2, 3, H, W)
    _, plain = run(toy, method(RATIO, scope=scope), image)
    rewritten, output = run(toy, method(RATIO, scope=scope, proportional=True), image)
    (node,) = (node for node in rewritten.module.graph.nodes if "_plan" in str(node.target))
    with torch.no_grad():
        h = toy.tokens(image)
        plan = oracle.Plan(*node.target(h, *node.args[1:4], *[torch_position(rewritten, node)][: len(node.args) - 4]))
        few = oracle.merge(toy.norm(h), plan)
        every = oracle.unmerge(few, plan)
        expected = h + oracle.unmerge(toy.out(toy.attend(*map(heads, (toy.q(few), toy.k(every), toy.v(every))))), plan)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    assert (output - plain).norm() > 1e-3 * plain.norm()


class Beside(Toy):
    """Learned tokens before and after those of the image, in one sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Parameter(torch.randn(1, 2, C)), nn.Parameter(torch.randn(1, 3, C))

    def forward(self, image: Tensor) -> Tensor:
        sides = [each.expand(len(image), -1, -1) for each in (self.first, self.last)]
        h = torch.cat([sides[0], self.tokens(image), sides[1]], 1)
        return h + self.branch(self.norm(h), h)


@pytest.mark.parametrize("align", ["sample", "batch"])
@pytest.mark.parametrize("toy_class", [Toy, Beside])
@pytest.mark.parametrize("method", [bgx.LaplacianMerge, bgx.ToMe, bgx.BlockPool])
def test_blended_tokens(method: Any, toy_class: type[Toy], align: str) -> None:
    torch.manual_seed(0)
    toy, image = toy_class(), torch.randn(2, 3, H, W)
    first = 2 if toy_class is Beside else 0
    _, copied = run(toy, method(RATIO, align=align), image)
    rewritten, output = run(toy, method(RATIO, align=align, unmerge="blend"), image)
    (node,) = (node for node in rewritten.module.graph.nodes if "_plan" in str(node.target))
    made: list[tuple[Tensor, oracle.Plan]] = []

    def squeeze(x: Tensor, residual: Tensor) -> Tensor:
        metric = residual[:, first : first + N]
        metric = metric if align == "sample" else metric.transpose(0, 1).reshape(1, N, -1)
        position = [torch_position(rewritten, node)][: len(node.args) - 4]
        plan = oracle.Plan(*(each.expand(2, -1) for each in node.target(metric, *node.args[1:4], *position)))
        made.append((metric.expand(2, -1, -1), plan))
        few = oracle.merge(x[:, first : first + N], plan)
        return torch.cat([x[:, :first], few, x[:, first + N :]], 1)

    def spread(y: Tensor) -> Tensor:
        (metric, plan) = made[0]
        few = y[:, first : first + plan.rep.shape[1]]
        return torch.cat([y[:, :first], oracle.blend(few, metric, plan), y[:, first + few.shape[1] :]], 1)

    toy.squeeze, toy.spread = squeeze, spread
    with torch.no_grad():
        torch.testing.assert_close(output, toy(image), rtol=1e-4, atol=1e-5)
    assert (output - copied).norm() > 1e-3 * copied.norm()


def torch_position(rewritten: Rewritten, plan: Any) -> Tensor | None:
    """Where the given plan has its destinations."""
    position = plan.args[4] if len(plan.args) > 4 else None
    return None if position is None else getattr(rewritten.module, str(position.target))


class Masked(Toy):
    """An attention with a mask of its own."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return join(F.scaled_dot_product_attention(q, k, v, torch.zeros(q.shape[-2], k.shape[-2])))


@pytest.mark.parametrize(
    ("toy_class", "reason"),
    [
        (Masked, "proportional: its attention has a mask already"),
        (LiteralSizes, "proportional: batch and heads share a dimension"),
    ],
)
def test_attention_that_cannot_be_weighed_is_left_alone(toy_class: type[Toy], reason: str) -> None:
    image = torch.randn(2, 3, H, W)
    rewritten, _ = run(toy_class(), bgx.LaplacianMerge(RATIO, proportional=True), image)
    assert (rewritten.records[0].action, rewritten.records[0].reason) == ("kept", reason)
    assert run(toy_class(), bgx.LaplacianMerge(RATIO), image)[0].records[0].action == "merge"


def test_downsampled_keys_are_no_groups() -> None:
    torch.manual_seed(0)
    toy, image = Toy(), torch.randn(2, 3, H, W)
    both = [run(toy, (bgx.LaplacianMerge(RATIO, proportional=p), bgx.KVDownsample(2)), image)[1] for p in (False, True)]
    assert torch.equal(*both)


class Turned(nn.Module):
    """Attention of complex tokens: position p turns queries and keys by p radians; the value is the token itself."""

    angle: Tensor

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(2, 2, bias=False) for _ in range(3))
        for layer in (self.q, self.k, self.v):
            layer.weight.data = torch.eye(2)
        self.register_buffer("angle", torch.arange(float(tokens)))

    def forward(self, image: Tensor) -> Tensor:
        x = image.flatten(2).transpose(1, 2)
        turn = torch.polar(torch.ones_like(self.angle), self.angle)
        q, k = (torch.view_as_real(torch.view_as_complex(p(x)) * turn).unsqueeze(1) for p in (self.q, self.k))
        return F.scaled_dot_product_attention(q, k, self.v(x).unsqueeze(1), scale=1.0).squeeze(1)


def attention_by_hand(queries: list[complex], keys: list[complex], values: list[complex]) -> list[complex]:
    result = []
    for query in queries:
        weights = [cmath.exp((query * key.conjugate()).real) for key in keys]
        result.append(sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights))
    return result


def turned(token: complex, position: int) -> complex:
    return token * cmath.exp(1j * position)


IMAGE = [3 + 1j, 3 + 1.1j, -1 + 2j, 1 - 2j]
"""Row-major tokens 0 to 3: 0 and 1 are alike, 2 and 3 are not.

Laplacian scores with zero padding, real and imaginary part apart: token 0 has neighbours 1 and 2,
|2 - 12| + |3.1 - 4| = 10.9; token 1 has 0 and 3, |4 - 12| + |-1 - 4.4| = 13.4; token 2 has 0 and 3,
|4 + 4| + |-1 - 8| = 17; token 3 has 1 and 2, |2 - 4| + |3.1 + 8| = 13.1. So 0 is the destination, and at a
ratio of 0.25 token 1 alone merges into it.
"""


def test_rotary_angles_of_merged_tokens_are_those_of_the_destination() -> None:
    image = torch.tensor([[[t.real for t in IMAGE], [t.imag for t in IMAGE]]]).view(1, 2, 2, 2)
    rewritten, output = run(Turned(4), bgx.LaplacianMerge(0.25), image)
    assert rewritten.records[0].action == "merge"
    kept = [((IMAGE[0] + IMAGE[1]) / 2, 0), (IMAGE[2], 2), (IMAGE[3], 3)]
    rows = [turned(token, position) for token, position in kept]
    merged = attention_by_hand(rows, rows, [token for token, _ in kept])
    expected = [merged[0], merged[0], merged[1], merged[2]]
    torch.testing.assert_close(torch.view_as_complex(output[0]), torch.tensor(expected), rtol=1e-5, atol=1e-6)


def test_rotary_angles_of_downsampled_keys_are_those_of_the_nearest_token() -> None:
    """On a 2x4 grid each 2x2 block leaves one key, with the angle of its bottom-right token: 5 and 7."""
    torch.manual_seed(0)
    tokens = [complex(*pair) for pair in torch.randn(8, 2).tolist()]
    blocks = [[0, 1, 4, 5], [2, 3, 6, 7]]
    kept = [0.9 * tokens[block[-1]] + 0.1 * sum(tokens[token] for token in block) / 4 for block in blocks]
    keys = [turned(token, block[-1]) for token, block in zip(kept, blocks, strict=True)]
    expected = attention_by_hand([turned(token, i) for i, token in enumerate(tokens)], keys, kept)
    image = torch.tensor([[[t.real for t in tokens], [t.imag for t in tokens]]]).view(1, 2, 2, 4)
    rewritten, output = run(Turned(8), bgx.KVDownsample(2, 0.9), image)
    assert rewritten.records[0].action == "kv"
    torch.testing.assert_close(torch.view_as_complex(output[0]), torch.tensor(expected), rtol=1e-5, atol=1e-6)
