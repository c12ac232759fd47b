"""The check of the fuzz test: rewriting a random denoiser is refused, or equal to an oracle.

The oracle is put in by hand at each attention that was rewritten, and works at full length (``docs/operators.md``): the
rows of representatives are replaced by what their groups become, keys are restricted to representatives and text, and
every token's row of the output is that of its representative, or a blend of three.
``python -m tests.fuzz SEED`` prints one case, ``python -m tests.fuzz FIRST-LAST`` those that fail, and a count.
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

import bigain_fx as bgx
from bigain_fx.calls import flat_tensors
from bigain_fx.capture import capture
from bigain_fx.passes.errors import GridError
from bigain_fx.passes.methods import KV, MERGE, Methods
from bigain_fx.passes.pipeline import SiteRecord, rewrite
from tests import oracle
from tests.fuzz_attention import Attention
from tests.fuzz_cases import MUST, NEVER, Case, build, draw, inputs
from tests.fuzz_model import Denoiser
from tests.fuzz_parts import Pair

TIE = 1e-5
TOLERANCE = 1e-4


@dataclass
class Naive:
    """The operators in loops, at full length, at one attention; ``start`` rows of its input precede the image."""

    record: SiteRecord
    methods: Methods
    start: int
    timestep: Tensor | None
    plan: oracle.Plan | None = None
    merge: Any = None  # the method that made the plan
    back: Tensor | None = None  # (B, N, M), what each token takes of the groups
    nearest: list[int] | None = None
    margin: float = math.inf

    def swap(self, x: Tensor, metric: Tensor) -> tuple[Tensor, Tensor]:
        assert self.record.grid is not None
        grid, queries, keys = self.record.grid, x, x
        rows = slice(self.start, self.start + math.prod(grid))
        for method in self.methods:
            if method.kind == MERGE and MERGE in self.record.action:
                metric = metric[:, rows]
                if method.align == "batch":
                    metric = metric.transpose(0, 1).reshape(1, math.prod(grid), -1)
                plan, self.margin = planned(metric, grid, method)
                self.plan = oracle.Plan(plan.assign.expand(len(x), -1), plan.rep.expand(len(x), -1))
                groups = torch.eye(self.plan.rep.shape[1]).expand(len(x), -1, -1)
                self.merge, self.back = method, oracle.unmerge(groups, self.plan)
                if method.unmerge == "blend":
                    self.back = oracle.blend(groups, metric.expand(len(x), -1, -1), self.plan)
                    self.margin = min(self.margin, blend_margin(metric, plan))
                queries = self.squeeze(x)
            elif method.kind == KV and KV in self.record.action:
                alpha: Any = method.alpha
                if isinstance(alpha, bgx.LinearAlpha):
                    ends = (alpha.noisy, alpha.clean, 999.0, 0.0)
                    alpha = oracle.linear_alpha(self.timestep, len(x), *ends)  # type: ignore[arg-type]
                s = method.factor
                self.nearest = oracle.nearest_tokens(grid, s)
                index = (torch.tensor(self.nearest) + self.start).expand(len(x), -1)
                keys = replaced(x, index, oracle.kv_downsample(x[:, rows], alpha, grid, s))
        return queries, keys if self.nearest is not None else queries

    @property
    def block(self) -> bool:
        return self.plan is not None and self.merge.scope == "block"

    def squeeze(self, x: Tensor) -> Tensor:
        assert self.plan is not None
        image = x[:, self.start : self.start + self.plan.assign.shape[1]]
        return replaced(x, self.plan.rep + self.start, oracle.merge(image, self.plan))

    def spread(self, y: Tensor) -> Tensor:
        assert self.plan is not None
        at = self.start + torch.arange(self.plan.assign.shape[1])
        return torch.stack([self.given_back(rows, at, sample) for sample, rows in enumerate(y)])

    def given_back(self, rows: Tensor, at: Tensor, sample: int) -> Tensor:
        """``rows`` (..., S, C) where those of the image, ``at``, are made from those of the representatives."""
        assert self.plan is not None
        assert self.back is not None
        result = rows.clone()
        result[..., at, :] = self.back[sample].to(rows.dtype) @ rows[..., at[self.plan.rep[sample]], :]
        return result

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, at: tuple[Tensor, Tensor, Tensor],
        attn_mask: Tensor | None = None,
        is_causal: bool = False, enable_gqa: bool = False, scale: float | None = None,
    ) -> Tensor:  # fmt: skip
        if enable_gqa:
            k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
        scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
        if is_causal:
            attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        if attn_mask is not None:
            hidden = torch.zeros_like(scores).masked_fill(~attn_mask, -math.inf) if attn_mask.dtype == torch.bool else 0
            scores = scores + (attn_mask if isinstance(hidden, int) else hidden)
        at_q, at_k, samples = at
        result = torch.empty(*q.shape[:-1], v.shape[-1], dtype=q.dtype)
        for lead, sample in enumerate(samples.tolist()):
            kept = self.nearest if self.nearest is not None else self.plan.rep[sample].tolist()  # type: ignore[union-attr]
            dropped = sorted(set(range(len(at_k))) - set(kept))
            scores[lead][..., at_k[dropped]] = -math.inf
            if self.plan is not None and self.nearest is None and self.merge.proportional:
                scores[lead][..., at_k[kept]] += oracle.group_sizes(self.plan)[sample].log().to(scores.dtype)
            result[lead] = scores[lead].softmax(-1).nan_to_num(0) @ v.expand(*k.shape[:-1], -1)[lead]
            if self.plan is not None and not self.block:
                result[lead] = self.given_back(result[lead], at_q, sample)
        return result


def replaced(x: Tensor, index: Tensor, rows: Tensor) -> Tensor:
    """``x`` (B, S, C) with its rows ``index`` (B, M) replaced."""
    return x.scatter(1, index[..., None].expand(-1, -1, x.shape[-1]), rows)


def planned(metric: Tensor, grid: Pair, method: Any) -> tuple[oracle.Plan, float]:
    """The plan of ``method``, and how far it is from another one."""
    cells = oracle.cell_tokens(grid, method.cell)
    if isinstance(method, bgx.BlockPool):
        pooled = folded(method, grid) // (math.prod(method.cell) - 1)
        worst = [sorted(float(row[tokens].max()) for tokens in cells) for row in oracle.laplacian_score(metric, grid)]
        gaps = [(row[pooled] - row[pooled - 1]) / max(row[pooled], 1e-9) for row in worst if pooled < len(row)]
        return oracle.pool_plan(metric, grid, method.cell, pooled), min(gaps, default=math.inf)
    merged, window = folded(method, grid), oracle.window_sides(grid, method.cell, method.window)
    positions = oracle.random_positions(grid, method.cell, method.seed) if isinstance(method, bgx.ToMe) else None
    plan = oracle.merge_plan(metric, grid, method.cell, merged, positions, window)
    return plan, margin(metric, grid, method.cell, merged, positions, window)


def folded(method: Any, grid: Pair) -> int:
    """How many tokens merge away."""
    if not isinstance(method, bgx.BlockPool):
        return oracle.merged_count(grid, method.cell, method.ratio)
    each = math.prod(method.cell) - 1
    return min(int(math.prod(grid) * method.ratio) // each, len(oracle.cell_tokens(grid, method.cell))) * each


def blend_margin(metric: Tensor, plan: oracle.Plan) -> float:
    """The least gap, over all tokens, between the third group that is most similar and the fourth."""
    unit, means = (torch.nn.functional.normalize(t.double(), dim=-1) for t in (metric, oracle.merge(metric, plan)))
    best = (unit @ means.mT).sort(-1, descending=True).values
    return float((best[..., 2] - best[..., 3]).min()) if best.shape[-1] > 3 else math.inf


def margin(metric: Tensor, grid: Pair, cell: Pair, merged: int, positions: Sequence[int] | None, window: Pair) -> float:
    """How far the plan is from another one: the least gap between what was chosen and what was next."""
    gaps = [math.inf]
    score = oracle.laplacian_score(metric, grid)
    chosen = oracle.destinations(score, grid, cell, positions)
    unit = torch.nn.functional.normalize(metric.double(), dim=-1)
    for b, row in enumerate(score.double()):
        if positions is None:
            for tokens in oracle.cell_tokens(grid, cell):
                low, high = row[tokens].sort().values[:2].tolist()
                gaps.append((high - low) / max(high, 1e-9))
        found: list[tuple[float, float]] = []  # of each source: its best similarity, and how far the next one is
        for tokens in oracle.cell_tokens(grid, window):
            sources, leaders = sorted(set(tokens) - set(chosen[b])), sorted(set(tokens) & set(chosen[b]))
            for similar in (unit[b, sources] @ unit[b, leaders].T).sort(1, descending=True).values.tolist():
                found.append((similar[0], similar[0] - similar[1] if len(similar) > 1 else math.inf))
        found.sort(reverse=True)
        gaps += [gap for _, gap in found[:merged]]
        if merged < len(found):
            gaps.append(found[merged - 1][0] - found[merged][0])
    return min(gaps)


# ------------------------------------------------------------------------------------------------ the check


@dataclass
class Outcome:
    """What became of one case: ``problems`` if it failed, ``tied`` if no draw of its inputs had a clear plan."""

    case: Case
    records: tuple[SiteRecord, ...] = ()
    problems: list[str] = field(default_factory=list)
    tied: bool = False
    error: float = 0.0
    change: float = 0.0
    margin: float = math.inf

    @property
    def rewritten(self) -> int:
        """How many attentions were rewritten."""
        return sum(record.action != "kept" for record in self.records)

    @property
    def word(self) -> str:
        """The outcome in one word."""
        return "failed" if self.problems else "skipped" if self.tied else "rewritten" if self.rewritten else "refused"

    def __str__(self) -> str:
        lines = [str(self.case)]
        for r in self.records:
            lines.append(f"  {r.name}: {self.case.verdict(r.name)} -> {r.action} grid={r.grid} {r.reason}")
        numbers = f"error {self.error:.1e}, change {self.change:.1e}, margin of the plans {self.margin:.1e}"
        return "\n".join([*lines, f"  {self.word}: {numbers}", *(f"  PROBLEM: {text}" for text in self.problems)])


def check(seed: int) -> Outcome:
    """Draw the case of ``seed``, rewrite it, and compare it with the oracle at the attentions that were rewritten."""
    case = draw(seed)
    outcome, model, arguments = Outcome(case), build(case), inputs(case, 0)
    captured = capture(model, arguments).module
    try:
        rewritten = rewrite(captured, case.methods, case.hint)
        outcome.records = rewritten.records
        outcome.problems += judge(case, rewritten.records)
        runs = rewritten.module
    except GridError as error:
        runs = captured
        if any(case.verdict(f"blocks.{index}.attn") == MUST for index in range(len(case.design.blocks))):
            outcome.problems.append(f"GridError: {error}")
    except Exception as error:
        outcome.problems.append(f"{type(error).__name__}: {error}")
    if outcome.problems:
        return outcome
    for attempt in range(6):
        arguments = inputs(case, attempt)
        expected, outcome.margin = run_oracle(model, case, outcome.records, arguments)
        if outcome.margin > TIE:
            break
    else:
        outcome.tied = True
        return outcome
    with torch.no_grad():
        try:
            got = runs(*(tensor.clone() for tensor in flat_tensors(arguments)))
        except Exception as error:
            outcome.problems.append(f"it does not run: {type(error).__name__}: {error}")
            return outcome
        dense = model(**{name: tensor.clone() for name, tensor in arguments.items()})
    outcome.error = distance(got, expected)
    outcome.change = distance(dense, expected)
    if not outcome.error < TOLERANCE and mistraced(captured, flat_tensors(arguments), dense):
        outcome.tied = True
    elif not outcome.error < TOLERANCE:
        outcome.problems.append(f"the result is {outcome.error:.1e} from the oracle's")
    return outcome


def run_oracle(
    model: Denoiser, case: Case, records: Sequence[SiteRecord], arguments: dict[str, Tensor]
) -> tuple[Sequence[Tensor], float]:
    """The model's outputs with the oracle at every attention rewritten, and the least margin of its plans."""
    attentions = {name: module for name, module in model.named_modules() if isinstance(module, Attention)}
    used = []
    for record in records:
        if record.name in attentions:
            attention, naive = attentions[record.name], None
            if record.action != "kept":
                start = attention.sizes.start if attention.c["kind"] == "shared" else 0
                naive = Naive(record, case.methods, start, arguments.get("timestep"))
                used.append(naive)
            attention.oracles.append(naive)
    try:
        with torch.no_grad():
            expected = model(**{name: tensor.clone() for name, tensor in arguments.items()})
    finally:
        for attention in attentions.values():
            attention.oracles.clear()
    return expected, min((naive.margin for naive in used), default=math.inf)


def distance(first: Sequence[Tensor], second: Sequence[Tensor]) -> float:
    """The largest difference of all, relative to the largest value of its tensor."""
    if len(first) != len(second):
        return math.inf
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(first, second, strict=True))


def mistraced(captured: GraphModule, inputs: Sequence[Tensor], dense: Sequence[Tensor]) -> bool:
    """Whether the capture itself is wrong, for torch took a tensor to lie in memory otherwise than it does.

    Behind a convolution or group norm of one sample torch 2.13 takes ``contiguous`` for a view where it copies.
    """
    elsewhere: list[Node] = []

    class Run(Interpreter):
        def run_node(self, n: Node) -> Any:
            result, traced = super().run_node(n), n.meta.get("val")
            if isinstance(result, Tensor) and isinstance(traced, Tensor):
                sides = zip(result.shape, result.stride(), traced.stride(), strict=True)
                elsewhere.extend([n] * any(size > 1 and real != fake for size, real, fake in sides))
            return result

    with torch.no_grad():
        found = Run(captured).run(*(tensor.clone() for tensor in inputs))
    return bool(elsewhere) and not distance(found, dense) < TOLERANCE


def judge(case: Case, records: Sequence[SiteRecord]) -> list[str]:
    """What the records alone show to be wrong."""
    problems = []
    names = [record.name for record in records]
    for index in range(len(case.design.blocks)):
        if names.count(f"blocks.{index}.attn") != case.design.repeat:
            problems.append(f"blocks.{index}.attn has {names.count(f'blocks.{index}.attn')} records")
    finest = max((math.prod(r.grid) for r in records if r.grid), default=0)
    for record in records:
        verdict, action = case.verdict(record.name), record.action
        if verdict == NEVER:
            if action != "kept":
                problems.append(f"{record.name} must never be rewritten, but {action}")
            continue
        grid = case.grid(record.name)
        if action != "kept" and record.grid != grid:
            problems.append(f"{record.name}: grid {record.grid}, not {grid}")
        chosen = [m for m in case.methods if m.where is None or m.where(record)]
        fitting = {m.kind for m in chosen if fits(m, grid, math.prod(grid) == finest)}
        sure = {m.kind for m in case.methods if case.sure(m, record.name)}
        done = set(action.split("+")) - {"kept"}
        if verdict == MUST and not done >= fitting & sure:
            problems.append(f"{record.name} must have {sorted(fitting & sure)}, but is {action!r}: {record.reason}")
        if not done <= fitting:
            problems.append(f"{record.name}: {action!r} where only {sorted(fitting)} applies")
    return problems


def fits(method: Any, grid: Pair, finest: bool) -> bool:
    """Whether ``method`` applies to an attention on ``grid``."""
    if method.levels == 1 and not finest:
        return False
    if method.kind == KV:
        return True
    return bool(oracle.cell_tokens(grid, method.cell)) and folded(method, grid) > 0


def main(arguments: Sequence[str], say: Callable[[str], object] = print) -> int:
    """Print the cases of the given seeds, ``SEED`` or ``FIRST-LAST``, and a count; the number of those that fail."""
    failed, words = 0, Counter[str]()
    for argument in arguments:
        first, _, last = argument.partition("-")
        for seed in range(int(first), int(last or first) + 1):
            outcome = check(seed)
            failed += bool(outcome.problems)
            words[outcome.word] += 1
            if not last or outcome.problems:
                say(str(outcome))
            if last and (seed % 100 == 99 or seed == int(last)):
                say(f"up to seed {seed}: {', '.join(f'{count} {word}' for word, count in sorted(words.items()))}")
    return failed


if __name__ == "__main__":
    sys.exit(bool(main(sys.argv[1:])))
