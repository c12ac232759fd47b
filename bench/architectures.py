"""What can be rewritten in each family of denoisers, and what it can save: ``python -m bigain_fx.bench.architectures``.

Every family is captured at its published size on the meta device, which takes no memory, and rewritten by each method.
The numbers go to ``bench/results/architectures.json``, family by family, and what a user reads of them to
``docs/architectures.md``.
"""

from __future__ import annotations

import gc
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from bigain_fx import command_line
from bigain_fx.bench import BenchError, result
from bigain_fx.calls import CallBinder
from bigain_fx.capture import capture
from bigain_fx.passes.errors import CaptureError
from bigain_fx.passes.flops import plan_flops
from bigain_fx.passes.methods import KVDownsample, LaplacianMerge, Methods
from bigain_fx.passes.pipeline import SiteRecord, rewrite
from bigain_fx.report import Report, general

if TYPE_CHECKING:
    from bigain_fx.bench.published import Family

RATIO, FACTOR = 0.7, 2
CEILINGS: dict[str, Methods] = {
    "merge": (LaplacianMerge(RATIO, levels=None, window=None),),
    "block": (LaplacianMerge(RATIO, levels=None, scope="block", window=None),),
    "kv": (KVDownsample(FACTOR, levels=None),),
}
VERSIONS = ("torch", "diffusers", "bigain_fx")
EXAMPLE = "SDXL"


def measure(family: Family) -> dict[str, Any]:
    """What the passes find and leave in one family, as plain data; ``error`` is why there is no graph of it."""
    model, kwargs = family.make()
    arguments, _ = CallBinder(model).bind((), kwargs)
    row: dict[str, Any] = {
        "family": family.name, "size": family.size, "model": type(model).__name__,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }  # fmt: skip
    try:
        module = capture(model, arguments).module
    except CaptureError as error:
        return row | {"error": str(error)}
    finest = (LaplacianMerge(RATIO),)
    first = rewrite(module, finest, family.grid)
    found = {name: rewrite(module, methods, family.grid) for name, methods in CEILINGS.items()}
    grids = Counter(record.grid for record in first.records if record.grid)
    return row | {
        "attentions": len(first.records),
        "grids": [[*grid, count] for grid, count in sorted(grids.items(), reverse=True)],
        "rewritten_at_levels_1": _rewritten(first.records),
        "flops": first.flops,
        "ceilings": {
            name: {
                "rewritten": _rewritten(rewritten.records), "flops": rewritten.flops_after,
                "plan_flops": plan_flops(rewritten.module.graph.nodes),
            }
            for name, rewritten in found.items()
        },
        "kept": _kept({name: rewritten.records for name, rewritten in found.items()}),
        "report": _excerpt(Report.of(type(model).__name__, finest, first)),
    }  # fmt: skip


def _rewritten(records: Iterable[SiteRecord]) -> int:
    return sum(record.action != "kept" for record in records)


def _kept(records_of: dict[str, tuple[SiteRecord, ...]]) -> list[dict[str, Any]]:
    """Attentions by the reason for which they are kept with every grid allowed, and the methods that it holds for."""
    groups: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for method, records in records_of.items():
        for record in records:
            if record.action == "kept":
                groups[general(record.reason)][method].append(record.name)
    return [
        {
            "reason": reason, "methods": [*names_of], "attentions": max(map(len, names_of.values())),
            "where": sorted({re.sub(r"\b\d+\b", "*", name) for names in names_of.values() for name in names}),
        }
        for reason, names_of in groups.items()
    ]  # fmt: skip


def _excerpt(report: Report) -> list[str]:
    """The headline of ``report``, and its first line of each kind."""
    lines = str(report).splitlines()
    seen: set[tuple[object, ...]] = set()
    for site, line in zip(report.sites, list(lines[1:]), strict=True):
        kind = (site.action, site.grid, general(site.reason))
        if kind in seen:
            lines.remove(line)
        seen.add(kind)
    return lines


# ------------------------------------------------------------------------------------- the document

HEAD = f"""# Architectures

bigain-fx reads the graph of a denoiser, finds every self-attention among image tokens, and rewrites it; what it cannot
rewrite it keeps as it was, and says why. The table gives, for stock diffusers models at their published size, how many
attentions that is, and how many times fewer floating-point operations are left.

| denoiser | attentions | on an image grid | rewritten | merge {RATIO} | in block scope | KV by {FACTOR} |
| --- | ---: | --- | --- | ---: | ---: | ---: |
"""

LEGEND = f"""
- *On an image grid*: self-attentions whose tokens are the rows x columns of one image.
- *Rewritten*: with `levels=1`, on the finest grid alone, the default and the paper's setting / with `levels=None`.
- *Merge, block scope, KV*: `LaplacianMerge({RATIO}, window=None)`, the same with `scope="block"`, and
  `KVDownsample({FACTOR})`, all with `levels=None`. Each is a ceiling: FLOPs of the dense model over those of the
  rewritten one, had the tokens been chosen for nothing. In brackets is the ratio with the similarities that choosing
  takes; downsampling chooses nothing.
- Text beside the image is never merged: the longer it is, the lower the ceiling. In Flux.1 it is 512 of 4,608 rows, in
  every attention and every linear layer, which is what keeps block scope from the ceiling of the image alone. In
  attention scope there is a second reason: its 38 single blocks project attention and MLP out together, and so for
  all tokens.
- Block scope carries linear layers; the convolutions of U-Nets stay as they are.
- Time follows FLOPs only where matrix products fill the device; [the benchmarks](../bench/README.md) measure time.
"""

KEPT = """
## What is kept, and why

What the reports say, with every grid allowed, how often, and where.

"""

WHY = """
- *Cross-attention*: its keys are text, which is left alone. In block scope its queries are merged tokens all the same.
- *Video*: where a self-attention sees several frames at once, the neighbours of a token are also those in the frames
  before and after, which neither the score nor the cells of [the operators](operators.md) know. It is refused. Where
  a model attends within frames and over time in turns, as Latte does, each frame is an image, and is merged as one.
  LTX-Video takes its frames as one line of tokens: `grid=` is for one image, and does not fit either.
- *Several images* in one sequence of tokens, as the references of Flux Kontext, Flux.2 and Qwen-Image-Edit, are
  rewritten, each on its own grid: [the operators](operators.md), "Several images".
- *Linear attention* costs as much for each token as the linear layers around it, and has no keys to downsample.
- *No graph*: Lumina 2 reads lengths from the values of its mask. A graph has fixed shapes.
- Attention that is spelled out (sliced attention, processors of old), that runs in a kernel of its own (some attention
  backends), or that sees windows of the image is kept as well, and reported by its module's name like all others. The
  backend `flex` is the exception: `torch.export` makes no graph of it, and the whole model is refused.
"""

REFUSED = {
    "GlmImageTransformer2DModel": ("a mask of tokens to drop: depends on the values", "rewritten, with `grid=`"),
    "HiDreamImageTransformer2DModel": ("lengths in tensors: depends on the values", "captured; need `grid=`"),
    "QwenImage21Transformer2DModel": ("lengths of texts: data-dependent", "captured; need `grid=`"),
    "OmniGenTransformer2DModel": ("the largest position: data-dependent", "not run"),
    "HunyuanVideo15Transformer3DModel": ("lengths of texts: data-dependent", "captured; video, nothing to rewrite"),
    "HunyuanVideoFramepackTransformer3DModel": (
        "lengths of texts: data-dependent",
        "captured; video, nothing to rewrite",
    ),
    "MochiTransformer3DModel": ("texts are cut in the attention: depends on the values", "no graph either"),
    "NucleusMoEImageTransformer2DModel": ("experts choose tokens: depends on the values", "no graph either"),
    "HiDreamImageTransformer2DModel, with experts": ("experts are called by way of numpy", "no graph either"),
    "Kandinsky6SRTransformer3DModel": ("flex attention: left a call", "no graph either"),
    "AnyFlowFARTransformer3DModel": ("flex attention: left a call", "no graph either"),
    "WanAnimate2Transformer3DModel": ("a cache as an argument: Unsupported input type", "no graph either"),
    "MultiControlNetModel": ("returns names", "optimize each of its `nets`"),
    "FluxMultiControlNetModel": ("returns names", "optimize each of its `nets`"),
}
"""Class of diffusers -> why there is no graph of it, a part of the error behind the colon, and what its blocks give."""

WITHOUT = """
## What has no graph

Classes of diffusers that `torch.export` cannot capture as a whole; tried with tiny random models. Where the blocks can
be captured, they are optimized [one by one](compatibility.md#step-caches), and without a method the output is exactly
that of the original.

| class | reason | its blocks one by one |
| --- | --- | --- |
"""

READING = """
## How to read a report

`bigain-fx inspect sdxl`, `bigain_fx.inspect(...)` and `fast.report` give one line for each attention, none left out.
Of SDXL, the headline and one line of each kind:

```text
{lines}
```

- The name is the module's path in the original model.
- The action is `merge`, `kv`, `merge+kv` or `kept`.
- Tokens are those of the image; after the arrow, those that the attention works on, or for `kv` alone its keys.
- GFLOPs are of the module, projections and the plan included, for the batch that it was captured with.
- The reason says why an attention, or a part of the method, was left out. `level 2 of the grids` is a matter of
  `levels=`; `pass grid=` asks for `grid=(rows, columns)`, or such a pair for each image; the others are those above.
  The node after `at` is where the matcher stopped.

## What was counted

Stock classes of diffusers {diffusers}, captured by torch {torch} on the meta device: one image or video, one call,
without guidance's second half. 2 FLOPs for each multiply-add of matrix products, convolutions, attention and the plan;
embeddings of text and of time are part of the model, text encoders and VAE are not. `python -m
bigain_fx.bench.architectures` makes this page.

| denoiser | class | input | parameters | TFLOPs |
| --- | --- | --- | ---: | ---: |
"""


def to_markdown(found: dict[str, Any]) -> str:
    """The document."""
    rows: list[dict[str, Any]] = found["rows"]
    (example,) = (row["report"] for row in rows if row["family"] == EXAMPLE)
    reading = READING.format(lines="\n".join(example), **found["versions"])
    counted = "".join(
        f"| {row['family']} | `{row['model']}` | {row['size']} | {row['parameters'] / 1e6:,.0f} M "
        f"| {row['flops'] / 1e12:.2f} |\n"
        for row in rows if "error" not in row
    )  # fmt: skip
    without = WITHOUT + "".join(f"| `{name}` | {why} | {blocks} |\n" for name, (why, blocks) in REFUSED.items())
    return HEAD + "".join(map(_summary, rows)) + LEGEND + KEPT + _reasons(rows) + WHY + without + reading + counted


def _summary(row: dict[str, Any]) -> str:
    if "error" in row:
        return f"| {row['family']} | no graph | - | - | - | - | - |\n"
    ceilings = row["ceilings"]
    cells = [
        row["family"], str(row["attentions"]),
        ", ".join(f"{count} of {rows}x{columns}" for rows, columns, count in row["grids"]) or "none",
        f"{row['rewritten_at_levels_1']} / {max(ceiling['rewritten'] for ceiling in ceilings.values())}",
        *(_ratio(row["flops"], ceiling) for ceiling in ceilings.values()),
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |\n"


def _ratio(dense: int, ceiling: dict[str, int]) -> str:
    if not ceiling["rewritten"]:
        return "-"
    free = f"{dense / (ceiling['flops'] - ceiling['plan_flops']):.2f}x"
    return free + (f" ({dense / ceiling['flops']:.2f}x)" if ceiling["plan_flops"] else "")


def _reasons(rows: list[dict[str, Any]]) -> str:
    """Every reason, and the families that it is given in."""
    places: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        for group in row.get("kept", ()):
            alone = "" if len(group["methods"]) == len(CEILINGS) else f"by {' and '.join(group['methods'])} alone, "
            where = ", ".join(f"`{name}`" for name in _shorter(group["where"]))
            places[group["reason"]].append(f"{row['family']} {group['attentions']} ({alone}{where})")
        if "error" in row:
            places[row["error"]].append(f"{row['family']} (all of it)")
    lines = [f"| {reason} | {', '.join(families)} |\n" for reason, families in places.items()]
    return "| reason | attentions |\n| --- | --- |\n" + "".join(lines)


def _shorter(names: list[str]) -> list[str]:
    """``names``, those that end alike as one: ``"*.attn2"``."""
    ends = Counter(name.rpartition(".")[2] for name in names)
    return sorted({f"*.{end}" if ends[end := name.rpartition(".")[2]] > 1 else name for name in names})


def load(path: Path) -> dict[str, Any]:
    """The rows of ``path``; none where they are of other versions, or the file is not there."""
    versions = {name: version for name, version in result.versions().items() if name in VERSIONS}
    found = result.rows(path, ("family",))
    return found if found.get("versions") == versions else {"versions": versions, "rows": []}


def main(
    names: Annotated[
        list[str] | None, typer.Argument(help="families to look at again; those not done by default")
    ] = None,
    results: Annotated[Path, typer.Option(help="where the numbers are kept")] = Path(
        "bench/results/architectures.json"
    ),
    document: Annotated[Path, typer.Option(help="what is written of them")] = Path("docs/architectures.md"),
) -> None:
    """Capture every family at full size, without memory, and say what is rewritten, kept and saved."""
    from bigain_fx.bench.published import FAMILIES

    order = [family.name for family in FAMILIES]
    if unknown := set(names or ()) - set(order):
        raise BenchError(f"{sorted(unknown)[0]!r} is not one of {', '.join(order)}")
    result.prepare(results.parent)
    found = load(results)
    console = Console()
    for family in FAMILIES:
        done = any(row["family"] == family.name for row in found["rows"])
        if family.name not in (names or order) or (done and not names):
            continue
        console.print(f"{family.name} ...", markup=False)
        rows = [row for row in found["rows"] if row["family"] != family.name] + [measure(family)]
        found["rows"] = sorted(rows, key=lambda row: order.index(row["family"]))
        result.write(results, json.dumps(found, indent=1) + "\n")
        gc.collect()
    if len(found["rows"]) == len(order):
        result.write(document, to_markdown(found))
        console.print(f"{document} is written", markup=False)


if __name__ == "__main__":
    command_line.run(main)
