"""Pictures of plans: which tokens of an image merge, and into which (``docs/operators.md``, "Plan")."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch
from matplotlib.collections import LineCollection
from matplotlib.colors import hsv_to_rgb
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.fx import GraphModule, Interpreter, Node
from torch.utils import _pytree as pytree

from bigain_fx.calls import CallBinder, flat_tensors
from bigain_fx.denoiser import OptimizedDenoiser, optimize
from bigain_fx.families import GridHint
from bigain_fx.passes.errors import InputError
from bigain_fx.passes.images import Grid
from bigain_fx.passes.methods import MergeMethod
from bigain_fx.passes.ops import PLANS, complete_cells, laplacian_score
from bigain_fx.passes.sites import module_name

bigain = torch.ops.bigain


@dataclass(frozen=True, eq=False)
class Call:
    """One call of an operator in a graph; its arguments are copies, since later nodes may write into them."""

    operator: object
    args: tuple[Any, ...]
    result: Any


class _Observer(Interpreter):
    def __init__(self, graph: GraphModule, operators: Set[OpOverload]) -> None:
        super().__init__(graph)
        self.operators = operators
        self.first: dict[str, Call] = {}

    def run_node(self, n: Node) -> Any:
        if n.target not in self.operators or (site := module_name(n)) in self.first:
            return super().run_node(n)
        args = pytree.tree_map_only(Tensor, Tensor.clone, self.fetch_args_kwargs_from_env(n)[0])
        result = super().run_node(n)
        self.first[site] = Call(n.target, args, result)
        return result


def observe(denoiser: OptimizedDenoiser, inputs: Mapping[str, Any], operators: Set[OpOverload]) -> dict[str, Call]:
    """Run the rewritten graph of ``denoiser``; return the first call of ``operators`` in each module, by its path.

    Args:
        denoiser: made with ``backend="eager"``, so that nothing is compiled for it.
        inputs: keyword arguments of one call.
        operators: such as ``torch.ops.bigain.merge.default``.

    Raises:
        BigainError: as for calling ``denoiser``.
    """
    arguments, _ = CallBinder(denoiser.original).bind((), inputs)
    observer = _Observer(denoiser.prepare(**arguments).graph, operators)
    with torch.no_grad():
        observer.run(*flat_tensors(arguments))
    return observer.first


@dataclass(frozen=True, eq=False)
class Plan:
    """What one attention merges.

    Attributes:
        site: module path of the attention, or any other title.
        metric: ``(B, N, C)``, what the plan was made from; ``B`` is 1 where the samples of a batch share one plan.
        grid: ``(h, w)`` of the tokens.
        assign: ``(B, N)`` int64, each token's group.
        rep: ``(B, M)`` int64, a token of each group.
        elected: how many of ``rep``, from the first on, are destinations.
    """

    site: str
    metric: Tensor
    grid: Grid
    assign: Tensor
    rep: Tensor
    elected: int

    @classmethod
    def of(
        cls, site: str, metric: Tensor, grid: Grid, cell: Sequence[int], merged: int, position: Tensor | None = None
    ) -> Plan:
        """The plan that ``torch.ops.bigain.merge_plan`` makes of these arguments."""
        assign, rep = bigain.merge_plan(metric, list(grid), list(cell), merged, position)
        return cls(site, metric, grid, assign, rep, math.prod(complete_cells(grid, cell)))

    @property
    def destinations(self) -> Tensor:
        """Tokens that others may merge into, ``(B, elected)`` int64; some may have stayed alone."""
        return self.rep[:, : self.elected]

    @property
    def merged(self) -> Tensor:
        """Tokens that share their group with others, ``(B, N)`` bool."""
        sizes = torch.zeros_like(self.rep).scatter_add(1, self.assign, torch.ones_like(self.assign))
        return sizes.gather(1, self.assign) > 1


def plans_of(
    model: nn.Module, inputs: Mapping[str, Any], *, method: MergeMethod, grid: GridHint = None
) -> tuple[Plan, ...]:
    """The plans that ``model`` makes under ``method`` in one call, in graph order, the first of each attention.

    Args:
        model, grid: as for :func:`bigain_fx.optimize`.
        inputs: keyword arguments of the call, its timestep and latents among them.
        method: a merge.

    Raises:
        InputError: nothing is merged.
        BigainError: as for :func:`bigain_fx.optimize`.
    """
    calls = observe(optimize(model, method=method, backend="eager", grid=grid), inputs, PLANS)
    if not calls:
        raise InputError(f"method={method} merges nothing in {type(model).__name__}; bigain_fx.inspect() tells why")
    return tuple(_plan(site, call) for site, call in calls.items())


def _plan(site: str, call: Call) -> Plan:
    (metric, (h, w), cell, count), (assign, rep) = call.args[:4], call.result
    pooled = call.operator is bigain.pool_plan.default
    return Plan(site, metric, (h, w), assign, rep, count if pooled else math.prod(complete_cells((h, w), cell)))


def plan_figure(image: Tensor, plan: Plan, sample: int = 0) -> Figure:
    """Four panels: the image, its score, the destinations, and the groups.

    A group has one colour wherever its tokens lie, and a line around it; tokens that stand alone are left as the image.

    Args:
        image: ``(1 or 3, H, W)`` floating, in [-1, 1].
        plan: of the batch that the image is in.
        sample: which of the plan's samples it is.

    Raises:
        InputError: ``image`` has another shape, or ``plan`` has no such sample.
    """
    if image.ndim != 3 or image.shape[0] not in (1, 3):
        raise InputError(f"image has shape {tuple(image.shape)}; it must be (1 or 3, H, W)")
    if not 0 <= sample < len(plan.assign):
        raise InputError(f"sample={sample} must be from 0 to {len(plan.assign) - 1}, the samples of the plan")
    h, w = plan.grid
    assign, merged = (tensor[sample].view(h, w).cpu() for tensor in (plan.assign, plan.merged))
    score = laplacian_score(plan.metric[sample : sample + 1], plan.grid).view(h, w).cpu()
    drawn = Figure(figsize=(13, 0.9 + 3 * h / w), layout="constrained")
    drawn.suptitle(f"{plan.site}: {h * w} tokens, {plan.rep.shape[1]} after merging")
    picture, scores, elected, groups = panels = drawn.subplots(1, 4)
    pixels = ((image.detach().float().cpu() + 1) / 2).clamp(0, 1).permute(1, 2, 0).expand(-1, -1, 3)
    for axis in (picture, elected, groups):
        axis.imshow(pixels.numpy(), extent=(0, w, h, 0))
    drawn.colorbar(scores.imshow(score.numpy(), extent=(0, w, h, 0), cmap="magma"), ax=scores, shrink=0.8)
    chosen, points = plan.destinations[sample].cpu().numpy(), 200 / w
    elected.scatter(chosen % w + 0.5, chosen // w + 0.5, s=(0.45 * points) ** 2, c="tab:red", edgecolors="white",
                    linewidths=0.06 * points)  # fmt: skip
    groups.imshow(_colours(assign, merged).numpy(), extent=(0, w, h, 0), interpolation="nearest")
    groups.add_collection(LineCollection(borders(assign, merged), colors="black", linewidths=0.8))
    counts = f"{len(assign[merged].unique())} groups, {int((~merged).sum())} tokens alone"
    titles = ("image", "Laplacian score", f"{plan.elected} destinations", counts)
    for axis, title in zip(panels, titles, strict=True):
        axis.set(title=title, xlim=(0, w), ylim=(h, 0), xticks=[], yticks=[])
    return drawn


def _colours(assign: Tensor, merged: Tensor) -> Tensor:
    """A colour for each token, ``(h, w, 4)``, clear where it stands alone."""
    count = int(assign.max()) + 1
    # Groups are numbered row by row: shuffled, two that touch are seldom alike.
    hue = torch.randperm(count, generator=torch.Generator().manual_seed(0)) / count
    strength, brightness = 0.55 + 0.45 * (torch.arange(count) % 2), torch.full((count,), 0.95)
    rgb = torch.from_numpy(hsv_to_rgb(torch.stack([hue, strength, brightness], 1).numpy()))
    return torch.cat([rgb[assign], 0.8 * merged[..., None]], -1)


def borders(assign: Tensor, merged: Tensor) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Edges ``((x, y), (x, y))``, in tokens, between neighbours of different groups that do not both stand alone.

    Args:
        assign, merged: ``(h, w)``, of one sample, int64 and bool.
    """
    beside = (assign[:, 1:] != assign[:, :-1]) & (merged[:, 1:] | merged[:, :-1])
    below = (assign[1:] != assign[:-1]) & (merged[1:] | merged[:-1])
    upright = [((x + 1, y), (x + 1, y + 1)) for y, x in beside.nonzero().tolist()]
    level = [((x, y + 1), (x + 1, y + 1)) for y, x in below.nonzero().tolist()]
    return upright + level
