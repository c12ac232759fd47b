"""What stands beside an attention: a second one on the same input, a control, another order of samples or axes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bigain_fx as bgx
from bigain_fx.passes.pipeline import Rewritten
from tests import oracle
from tests.test_scope import GRID, MERGED, RATIO, merges, run
from tests.toys import HEADS, C, H, N, Toy, W, heads, join

IMAGE = torch.randn(2, 3, H, W, generator=torch.Generator().manual_seed(0))
SCOPES = ("attention", "block")


def plan_of(h: Tensor) -> oracle.Plan:
    return oracle.merge_plan(h, GRID, (2, 2), MERGED)


class Pair(Toy):
    """Two attentions on one normed input, each with layers of its own; `second` says of what kind the other is."""

    def __init__(self, second: str) -> None:
        super().__init__()
        self.others, self.second = nn.ModuleList(nn.Linear(C, C) for _ in range(4)), second

    def other(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x) for layer in self.others[:3])
        if self.second == "alike":
            return self.others[3](join(F.scaled_dot_product_attention(heads(q), heads(k), heads(v))))
        q, k, v = (heads(t).transpose(0, 2) for t in (q, k, v))  # among the samples of a batch
        return self.others[3](join(F.scaled_dot_product_attention(q, k, v).transpose(0, 2)))

    def forward(self, image: Tensor) -> Tensor:
        h = self.tokens(image)
        x = self.norm(h)
        return h + self.branch(x, h) + self.other(x)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize(("second", "actions"), [("alike", ["merge", "merge"]), ("across", ["merge", "kept"])])
def test_a_second_attention_on_the_same_input_goes_its_own_way(second: str, actions: list[str], scope: str) -> None:
    torch.manual_seed(0)
    toy = Pair(second)
    rewritten, output = run(toy, bgx.LaplacianMerge(RATIO, scope=scope), IMAGE)
    assert [record.action for record in rewritten.records] == actions
    with torch.no_grad():
        h = toy.tokens(IMAGE)
        x, plan = toy.norm(h), plan_of(h)
        few = oracle.merge(x, plan)
        other = oracle.unmerge(toy.other(few), plan) if second == "alike" else toy.other(x)
        torch.testing.assert_close(output, h + oracle.unmerge(toy.branch(few, h), plan) + other, rtol=1e-4, atol=1e-5)


class SharedLayer(Toy):
    """Two attentions whose projections are one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.all = nn.Linear(C, 6 * C)

    def branch(self, x: Tensor, metric: Tensor) -> Tensor:
        q, k, v, *others = (heads(t) for t in self.all(x).chunk(6, -1))
        return self.out(self.attend(q, k, v) + self.attend(*others))


@pytest.mark.parametrize("method", [bgx.LaplacianMerge(RATIO), bgx.KVDownsample(2)])
def test_one_layer_for_two_attentions_is_a_reason(method: object) -> None:
    rewritten, _ = run(SharedLayer(), method, IMAGE)
    assert [record.action for record in rewritten.records] == ["kept", "kept"]
    assert all("projects for another attention too" in record.reason for record in rewritten.records)
    assert not merges(rewritten)


class Reordered(Toy):
    """The samples trade places between the attention and the MLP."""

    def __init__(self, reorder: bool) -> None:
        super().__init__()
        self.mlp, self.reorder = nn.Linear(C, C), reorder

    def forward(self, image: Tensor) -> Tensor:
        h = self.tokens(image)
        h = h + self.branch(self.norm(h), h)
        if self.reorder:
            h = torch.cat(h.chunk(2)[::-1])
        return h + F.gelu(self.mlp(self.norm(h)))


@pytest.mark.parametrize("reorder", [False, True])
def test_a_branch_of_other_samples_has_no_plan(reorder: bool) -> None:
    rewritten, _ = run(Reordered(reorder), bgx.LaplacianMerge(RATIO, scope="block"), IMAGE)
    assert merges(rewritten) == (1 if reorder else 2)


class Controlled(Toy):
    """Something that is given for every token is added to the attention's output, before the residual."""

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        h = self.tokens(image)
        return h + (self.branch(self.norm(h), h) + text)


@pytest.mark.parametrize("scope", SCOPES)
def test_what_is_given_and_added_keeps_all_its_tokens(scope: str) -> None:
    torch.manual_seed(0)
    toy, control = Controlled(), torch.randn(2, N, C)
    _, output = run(toy, bgx.LaplacianMerge(RATIO, scope=scope), IMAGE, control)
    with torch.no_grad():
        h = toy.tokens(IMAGE)
        plan = plan_of(h)
        expected = h + oracle.unmerge(toy.branch(oracle.merge(toy.norm(h), plan), h), plan) + control
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)


class TokensFirst(Toy):
    """Queries and keys as (N, B, heads, d), with a value for every token: the samples' plans differ."""

    angles: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("angles", torch.randn(N, 1, 1, C // HEADS))

    def branch(self, x: Tensor, metric: Tensor, angles: Tensor | None = None) -> Tensor:
        angles = self.angles if angles is None else angles
        q, k = (p(x).view(x.shape[0], -1, HEADS, C // HEADS).transpose(0, 1) * angles for p in (self.q, self.k))
        return self.out(self.attend(q.permute(1, 2, 0, 3), k.permute(1, 2, 0, 3), heads(self.v(x))))


def test_tokens_before_samples() -> None:
    torch.manual_seed(0)
    toy = TokensFirst()
    rewritten, output = run(toy, bgx.LaplacianMerge(RATIO), IMAGE)
    assert [record.action for record in rewritten.records] == ["merge"]
    with torch.no_grad():
        h = toy.tokens(IMAGE)
        plan = plan_of(h)
        angles = torch.stack([toy.angles[rep, 0] for rep in plan.rep], 1)  # (M, B, 1, d)
        expected = h + oracle.unmerge(toy.branch(oracle.merge(toy.norm(h), plan), h, angles), plan)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)


class Views(Toy):
    """Two views of a scene, each with a class token in front, in one sequence."""

    def forward(self, image: Tensor) -> Tensor:
        tokens = F.pad(self.tokens(image), (0, 0, 1, 0))
        h = tokens.view(-1, 2 * tokens.shape[1], C)
        return h + self.branch(self.norm(h), h)


class MixedTokens(Toy):
    """A layer over the tokens leaves eight, which lie nowhere."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(N, 8)

    def tokens(self, image: Tensor) -> Tensor:
        return self.mix(super().tokens(image).transpose(1, 2)).transpose(1, 2)


@pytest.mark.parametrize(("toy_class", "reason"), [(Views, "grid"), (MixedTokens, "no grid")])
def test_what_lies_on_no_grid_is_kept(toy_class: type[Toy], reason: str) -> None:
    rewritten, _ = run(toy_class(), bgx.LaplacianMerge(RATIO), IMAGE)
    (record,) = rewritten.records
    assert record.action == "kept"
    assert reason in record.reason
    assert not merges(rewritten)


FORMS = {
    "rsqrt": lambda u: u * torch.rsqrt(u.pow(2).mean(-1, keepdim=True) + 1e-6),
    "product": lambda u: u * torch.rsqrt(1e-6 + (u * u).mean(-1, keepdim=True)),
    "square": lambda u: (u.square().mean(2, keepdim=True) + 1e-6).rsqrt() * u,
    "root": lambda u: u / torch.sqrt(u.square().mean(-1, keepdim=True) + 1e-6),
    "cube": lambda u: u * torch.rsqrt(u.pow(3).mean(-1, keepdim=True).abs() + 1e-6),
    "quartic": lambda u: u * torch.rsqrt(u.pow(4).mean(-1, keepdim=True) + 1e-6),
    "over tokens": lambda u: u * torch.rsqrt(u.pow(2).mean(1, keepdim=True) + 1e-6),
}


def by_the_stream(rewritten: Rewritten) -> bool:
    """Whether the plan is made from what the attention's result is added to."""
    *_, output = rewritten.module.graph.nodes
    (plan,) = (node for node in rewritten.module.graph.nodes if "_plan" in str(node.target))
    return plan.args[0] is output.args[0][0].args[0]


@pytest.mark.parametrize("form", FORMS)
def test_an_rms_norm_that_is_spelled_out_has_the_stream_as_metric(form: str) -> None:
    class Spelled(Toy):
        def forward(self, image: Tensor) -> Tensor:
            h = self.tokens(image)
            return h + self.branch(FORMS[form](h), h)

    rewritten, _ = run(Spelled(), bgx.LaplacianMerge(RATIO), IMAGE)
    assert merges(rewritten) == 1
    assert by_the_stream(rewritten) == (form in ("rsqrt", "product", "square", "root"))


def test_the_metric_does_not_depend_on_the_batch() -> None:
    class Moved(Toy):
        def __init__(self) -> None:
            super().__init__()
            self.position = nn.Parameter(torch.randn(1, N, C))

        def forward(self, image: Tensor) -> Tensor:
            h = self.tokens(image)
            return h + self.branch(self.norm(h) + self.position, h)

    for batch in (1, 2):
        rewritten, _ = run(Moved(), bgx.LaplacianMerge(RATIO), IMAGE[:batch])
        assert merges(rewritten) == 1
        assert not by_the_stream(rewritten)
