"""The cases of the fuzz test: from a seed to a small denoiser, the methods and the inputs.

What each choice means for its attention, and so what the matcher promises, is `OPTIONS`.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

import bigain_fx as bgx
from bigain_fx.passes.methods import KV, MERGE, Methods, normalize
from tests.fuzz_model import CHANNELS, PATCH, Denoiser, Design
from tests.fuzz_parts import Choices, Pair

MUST, MAY, NEVER = "must", "may", "never"
OPTIONS: dict[str, dict[str, str]] = {
    # What each choice of a block means for its self-attention: it must, may or must never be rewritten; the worst
    # verdict holds. The first of each is the plain one.
    "kind": {"image": MUST, "joint": MUST, "shared": MUST, "added": MUST},
    "order": {"image_first": MUST, "text_first": MUST},
    "norm": {"layer": MUST, "layer_plain": MUST, "rms": MUST, "rms_spelled": MUST, "rms_weight": MUST, "group": MUST,
             "group_rows": MUST, "layer_grid": MUST, "none": MUST},
    "norm_cast": {"no": MUST, "yes": MUST},
    "modulation": {"none": MUST, "scale_shift": MUST, "table": MUST},
    "projection": {"separate": MUST, "lora": MUST, "kv_fused": MUST, "qk_fused": MUST, "chunk": MUST, "split": MUST,
                   "slices": MUST, "unbind": MUST, "per_head": MUST, "mlp": MUST, "gated": MUST,
                   "tied_qk": MUST, "tied_kv": MUST},
    "bias": {"yes": MUST, "no": MUST},
    "qk_norm": {"none": MUST, "rms": MUST, "layer": MUST, "spelled": MUST, "across": MUST, "unit": MUST},
    "layout": {"early": MUST, "late": MUST, "flat": MUST, "unflatten": MUST, "head_major": MAY},
    "gqa": {"none": MUST, "expand": MUST, "interleave": MUST, "flag": MUST, "broadcast": MUST},
    "rotary": {"none": MUST, "half": MUST, "interleaved": MUST, "complex": MUST, "partial": MUST},
    "table": {"buffer": MUST, "ids": MUST, "arange": MUST, "input": MUST, "split": MUST},
    "rotary_at": {"own": MUST, "joined": MUST, "slice": MUST},
    "mask": {"none": MUST, "text_bool": MUST, "text_add": MUST, "keys": MUST, "full": MUST, "full_heads": MUST,
             "full_bool": MUST, "outer": MUST, "relative": MUST, "causal": MAY},
    "scale": {"default": MUST, "given": MUST},
    "gate": {"none": MUST, "modulation": MUST, "param": MUST, "head": MUST, "token": MUST, "head_token": MUST},
    "dropout": {"no": MUST, "yes": MUST},
    "out": {"linear": MUST, "sandwich": MUST, "scaled": MUST},
    "reads": {"none": MUST, "x": MUST, "x_direct": MUST, "o": MUST, "q": MAY, "k": MAY, "v": MAY, "v_direct": MAY},
    "pooled": {"no": MUST, "yes": MUST},
    "cross": {"none": MUST, "separate": MUST, "added": MUST, "same_query": MAY},
    "mlp": {"no": MUST, "yes": MUST},
    "residual": {"stream": MUST, "input": MUST},
    "post": {"none": MUST, "norm": MUST},
    "dual": {"no": MUST, "yes": MUST},
    "odd": {"none": MUST, "x_cast": MUST, "inplace_residual": MAY, "inplace_x": MAY, "inplace_x_view": MAY,
            "inplace_h": MAY, "inplace_h_view": MAY, "inplace_above": MAY, "inplace_q": MAY, "inplace_o": MAY,
            "inplace_out": MAY, "inplace_row": MAY, "positions": MUST, "conv_v": MAY, "lepe": MAY, "flip": MAY,
            "transposed": MAY, "flip_kv": MAY, "keys_other_way": MAY, "misaligned": NEVER, "flip_k": NEVER,
            "roll_q": NEVER, "roll": NEVER, "windows": NEVER, "windows_rows": NEVER, "across_batch": NEVER,
            "joined_batch": NEVER, "drop": NEVER, "append": MAY,
            # A write through one name of a memory that is read under another: before, between and after the
            # projections of x, or into what is read for the metric, the mask, the rotary angles and the like.
            "base_first": MAY, "base_before": MAY, "base_between": NEVER, "base_clones": NEVER, "base_after": MAY,
            "base_above": MAY, "base_mask": MAY, "base_table": MAY, "base_q": MAY, "base_o": MAY, "base_out": MAY,
            "base_h": MAY},
    "alias": dict.fromkeys(("view", "slice", "detach", "item", "unbind", "squeeze", "transpose", "expand", "type_as",
                            "contiguous", "reshape"), MUST),
    "write": dict.fromkeys(("mul", "tanh", "copy", "rows", "channels", "out"), MUST),
}  # fmt: skip
BASES = [odd for odd in OPTIONS["odd"] if odd.startswith("base_")]
NAMES = {"refiner": NEVER, "cross": NEVER, "attn2": MUST}  # among text tokens, from image to text, beside the first
LOCAL = ("windows", "windows_rows", "across_batch", "joined_batch", "drop", "append")
# An attention after one of the former, up to one of the latter, may be refused: its grid is lost.
GRID_LOST = {"down_pool", "pad", "reference", "inplace_residual", "replaced", *LOCAL}
GRID_FOUND = {"conv", "down_conv"}
COMMON = {
    "norm": 0.7, "projection": 0.6, "qk_norm": 0.5, "layout": 0.6, "modulation": 0.4, "bias": 0.3, "order": 0.5,
    "table": 0.8, "rotary_at": 0.7, "pooled": 0.5, "norm_cast": 0.3, "mlp": 0.5, "rotary": 0.35, "mask": 0.2,
    "gate": 0.3, "alias": 0.9, "write": 0.6,
}  # fmt: skip
"""How often a choice is not the plain one; choices that are not here follow the model's own spice."""
RARE = {"unit", "tied_qk", "tied_kv", "head_major"}
GRIDS: list[Pair] = [(4, 4), (6, 4), (4, 6), (8, 6), (5, 7), (7, 4), (3, 6), (2, 8), (8, 8), (5, 5), (10, 4)]


@dataclass(frozen=True)
class Case:
    """One model, the methods, and the hint for its grid."""

    seed: int
    design: Design
    methods: Methods
    hint: Pair | None

    def __str__(self) -> str:
        """All choices that are not the plain ones."""
        design = [f"{f.name}={getattr(self.design, f.name)}" for f in fields(Design) if f.name != "blocks"]
        lines = [f"seed {self.seed}: {' '.join(map(repr, self.methods))} hint={self.hint}", "  " + " ".join(design)]
        for index, c in enumerate(self.design.blocks):
            odd = [f"{name}={value}" for name, value in c.items() if value != next(iter(OPTIONS[name]))]
            lines.append(f"  blocks.{index}: {' '.join(odd) or 'plain'}")
        return "\n".join(lines)

    def verdict(self, name: str) -> str:
        """Whether the attention of module ``name`` must, may or must never be rewritten."""
        *path, last = name.split(".")
        if NAMES.get(last) == NEVER:
            return NEVER
        index = int(path[1])
        c = self.design.blocks[index]
        verdicts = {NAMES[last]} if last in NAMES else {OPTIONS[key][value] for key, value in c.items()}
        if last not in NAMES and c["layout"] == "flat" and c["mask"] != "none":
            verdicts.add(MAY)  # one mask for samples and heads in one dimension
        steps: list[str] = []
        before = self.design.blocks[: index + 1] if self.design.repeat == 1 else self.design.blocks
        for block, between in zip(before, self.design.between, strict=False):
            replaced = block["odd"] in BASES and block["write"] in ("copy", "out")
            # A norm that cuts columns x rows into as many rows and columns loses which is which.
            replaced |= block["odd"] == "transposed" and block["norm"] in ("group", "layer_grid")
            steps += [between, self.design.text_source if block["kind"] == "shared" else "", block["odd"]]
            steps += ["replaced"] * replaced
        known = [step in GRID_FOUND for step in steps if step in GRID_LOST | GRID_FOUND]
        if self.design.text_source == "reference" and c["kind"] != "image":
            verdicts.add(MAY)
        if not all(known[-1:] if self.design.repeat == 1 else known):
            verdicts.add(MAY)
        return next(verdict for verdict in (NEVER, MAY, MUST) if verdict in verdicts)

    def sure(self, method: Any, name: str) -> bool:
        """Whether nothing that ``method`` needs could be missing at the attention of module ``name``."""
        c = self.design.blocks[int(name.split(".")[1])]
        weighed = c["mask"] == "none" and c["layout"] not in ("flat", "head_major")
        return not (getattr(method, "proportional", False) and not weighed and name.endswith(".attn"))

    def grid(self, name: str) -> Pair:
        """The grid of the attention of module ``name``."""
        index = int(name.split(".")[1])
        rows, columns = self.design.grids()[index]
        return (columns, rows) if self.design.blocks[index]["odd"] == "transposed" else (rows, columns)


def draw(seed: int) -> Case:
    """The case of one seed."""
    rng = random.Random(seed)
    spice = rng.choice([0.0, 0.1, 0.2, 0.3])
    grid = rng.choice(GRIDS)
    tokens = math.prod(grid)
    text = rng.choice([0, 0, 2, 3, 5, tokens, tokens // 4])
    blocks = rng.choice([1, 1, 2, 3])
    between: list[str] = []
    size = grid
    for index in range(blocks):
        even = size[0] % 2 == size[1] % 2 == 0 and min(size) > 2 and index
        steps = ["conv", "conv", "skip"] + ["down_conv", "down_pool", "down_merge"] * bool(even)
        between.append(rng.choice(steps) if rng.random() < (0.4 if index else 0.1) else "none")
        size = (size[0] // 2, size[1] // 2) if between[-1].startswith("down") else size
    source = rng.choice(["conv", "conv", "unshuffle", "tokens", *["frames"] * (text == 0)])
    design = Design(
        source=source, grid=grid, batch=rng.choice([1, 2, 2, 3, 4]), text=text,
        width=rng.choice([12, 16, 24]), heads=rng.choice([1, 2, 2, 4]), dim=rng.choice([4, 8]),
        text_source=rng.choice(["input"] * 4 + ["param"] * 2 + ["reference" if text == tokens else "pad"]),
        shared_order=rng.choice(["first", "last", "around"]), split=rng.choice(["slice", "split", "narrow"]),
        embed=rng.choice(["plain", "norm", "positions"]), doubled="yes" if rng.random() < 0.1 else "no",
        refiner="no", between=tuple(between), blocks=(),
        timestep=rng.choice(["none", "sample", "one"]) if source != "frames" else "none",
        repeat=2 if rng.random() < 0.08 and not any(step.startswith("down") for step in between) else 1,
        dtype=rng.choice(["float32", "float32", "float64"]),
    )  # fmt: skip
    chosen = [draw_block(rng, design, index, spice) for index in range(blocks)]
    refiner = text > 1 and design.text_source in ("input", "param") and rng.random() < 0.2
    design = replace(design, blocks=tuple(chosen), refiner="yes" if refiner else "no")
    hint = grid if source == "tokens" or rng.random() < 0.1 else None
    return Case(seed, design, draw_methods(rng, design), hint)


def draw_block(rng: random.Random, design: Design, index: int, spice: float) -> Choices:
    """The choices of one block; what does not fit together falls back to the plain choice."""
    c = {}
    for name, (plain, *others) in ((name, list(values)) for name, values in OPTIONS.items()):
        common = [value for value in others if value not in RARE or rng.random() < 0.3] or others
        c[name] = rng.choice(common) if rng.random() < COMMON.get(name, spice) else plain
    if design.text:
        c["kind"] = rng.choice(["image", "joint", "shared", "added"])
    if c["odd"] == "none" and rng.random() < 0.15:
        c["odd"] = rng.choice(BASES)
    if c["kind"] == "joint" and c["odd"] == "none" and rng.random() < 0.15:
        c["odd"] = rng.choice(["keys_other_way", "keys_other_way", "misaligned"])
    if design.text and c["kind"] != "image" and rng.random() < 0.3:
        c["mask"] = rng.choice(["text_bool", "text_add", "outer"])
    if design.text_source == "pad" and c["kind"] not in ("image", "shared"):
        c["kind"] = "shared"
    plain = {name: next(iter(values)) for name, values in OPTIONS.items()}

    def drop(*names: str) -> None:
        c.update({name: plain[name] for name in names})

    if not design.text:
        drop("kind", "order")
    if design.text_source == "pad" or not design.text:
        drop("cross")
    if c["odd"] in LOCAL:
        drop("kind", "order", "rotary", "mask", "modulation", "gqa", "cross", "dual", "residual")
        c["gate"] = c["gate"] if c["gate"] != "modulation" else "none"
        c["norm"] = "layer" if c["norm"].startswith(("group", "layer_grid")) else c["norm"]
    rows, columns = design.grids()[index]
    if (c["odd"] == "windows" and (rows % 2 or columns % 2)) or (c["odd"] == "windows_rows" and rows * columns % 2):
        drop("odd")
    if c["odd"] in ("keys_other_way", "misaligned") and (c["kind"] != "joint" or design.text == 0):
        drop("odd")
    if c["odd"] in ("across_batch", "joined_batch") and design.batch * (1 + (design.doubled == "yes")) < 2:
        drop("odd")
    if c["odd"] == "transposed" and c["kind"] == "shared":
        drop("odd")
    if c["odd"] in ("inplace_above", "base_above"):
        c["norm"] = "layer" if c["norm"] == "none" else c["norm"]
        c["modulation"] = rng.choice(["scale_shift", "table"]) if design.timestep != "none" else "none"
    if c["odd"] in ("inplace_q", "base_q") and c["projection"].startswith("tied"):
        drop("projection")
    if c["odd"] in ("base_between", "base_clones"):
        c["projection"] = "lora" if c["projection"] == "lora" else "separate"
    if c["odd"] == "base_table":
        c["rotary"] = "half" if c["rotary"] == "none" else c["rotary"]
    if c["odd"] == "base_mask":
        c["mask"] = "full" if c["mask"] in ("none", "causal") else c["mask"]
    if c["kind"] == "shared":
        drop("cross")
        c["norm"] = "rms" if c["norm"].startswith(("group", "layer_grid")) else c["norm"]
        if c["odd"] in ("roll", "flip"):
            drop("odd")
        drop("dual")
    if c["odd"] != "none":
        drop("dual")
    if c["odd"] in ("roll", "flip", "transposed"):
        drop("residual")
    if design.heads == 1:
        drop("gqa")
    if c["gqa"] == "broadcast" and c["layout"] in ("flat", "head_major"):
        drop("layout")
    if c["gqa"] != "none" and c["reads"] == "v_direct":
        drop("reads")
    if c["gqa"] != "none" and c["projection"] == "tied_qk":
        c["projection"] = "kv_fused"
    if c["layout"] == "head_major" and c["mask"] not in ("none", "full", "full_bool", "causal"):
        drop("layout")
    if c["layout"] == "head_major" and c["gqa"] == "flag":
        drop("layout")
    if design.timestep == "none":
        drop("modulation")
        c["gate"] = "param" if c["gate"] == "modulation" else c["gate"]
    if c["norm"] not in ("layer_plain", "rms_spelled", "rms_weight"):
        drop("norm_cast")
    if c["gqa"] != "none" and c["projection"] in ("chunk", "unbind", "per_head"):
        c["projection"] = "split"
    if c["projection"] in ("unbind", "per_head") and (c["qk_norm"] == "across" or c["odd"] == "conv_v"):
        c["projection"] = "chunk"
    if c["odd"] in ("conv_v", "lepe"):
        drop("gqa")
    if c["mask"] == "outer" and c["kind"] == "added":
        drop("mask")
    if c["mask"] in ("text_bool", "text_add", "outer") and (c["kind"] == "image" or design.text_source != "input"):
        drop("mask")
    if c["layout"] == "flat" and c["mask"] not in ("none", "full", "full_bool", "causal"):
        drop("layout")
    if c["layout"] == "flat" and c["gqa"] == "flag":
        drop("layout")
    if c["rotary"] == "none":
        drop("table", "rotary_at")
    if c["rotary_at"] != "own" and (c["kind"] != "joint" or c["odd"] in ("keys_other_way", "misaligned")):
        drop("rotary_at")
    if c["reads"] == "none":
        drop("pooled")
    if c["kind"] not in ("joint", "added"):
        drop("order")
    if c["odd"] == "base_mask" and c["mask"] == "none":
        drop("odd")
    if c["odd"] not in BASES:
        drop("alias", "write")
    return c


def draw_methods(rng: random.Random, design: Design) -> Methods:
    """A merge, a downsampling, or both."""
    chosen: list[Any] = []
    kinds = rng.choice([(MERGE,), (MERGE,), (KV,), (MERGE, KV)])
    levels = rng.choice([None, None, 1])
    if MERGE in kinds:
        cell = rng.choice([(2, 2), (2, 2), (2, 2), (1, 2), (2, 4), (3, 3)])
        ratio = rng.uniform(0.15, 1 - 1 / math.prod(cell))
        align = "batch" if rng.random() < 0.15 else "sample"
        scope = "block" if rng.random() < 0.2 and all(map(branches, design.blocks)) else "attention"
        options: dict[str, Any] = {"levels": levels, "scope": scope, "align": align}
        options["proportional"] = rng.random() < 0.2
        # A blend goes through a norm behind the attention only where all of the block is merged.
        through = scope == "block" or all(c["out"] != "sandwich" for c in design.blocks)
        options["unmerge"] = "blend" if through and rng.random() < 0.2 else "copy"
        window = {"window": rng.choice([2, 3, 4, 6])} if rng.random() < 0.2 else {}
        kind = rng.choice(["laplacian"] * 5 + ["tome"] * 3 + ["pool"] * 2)
        if kind == "tome":
            chosen.append(bgx.ToMe(ratio, cell, seed=rng.randrange(3), **options, **window))
        elif kind == "pool":
            chosen.append(bgx.BlockPool(ratio, cell, **options))
        else:
            chosen.append(bgx.LaplacianMerge(ratio, cell, **options, **window))
    if KV in kinds:
        schedule = design.timestep != "none" and design.doubled == "no" and rng.random() < 0.3
        alpha = bgx.LinearAlpha(0.8, 1.2, 999, 0) if schedule else rng.choice([0.9, 0.0, 1.2])
        chosen.append(bgx.KVDownsample(rng.choice([2, 2, 3, 4]), alpha, levels=levels))
    some = rng.random() < 0.15
    return normalize([replace(method, where=by_name) if some else method for method in chosen])


def by_name(site: Any) -> bool:
    """Whether an attention is one of about half of them."""
    return sum(map(ord, site.name)) % 2 == 1


def branches(c: Choices) -> bool:
    """Whether a block is a row of branches of the residual stream, so that there is no doubt what it spans."""
    plain = all(c[name] == next(iter(OPTIONS[name])) for name in ("odd", "residual", "dual", "post", "pooled"))
    reads = c["reads"] in ("q", "k", "v", "v_direct", "x_direct") or c["cross"] == "same_query"
    return plain and not reads and c["norm"] != "none"


def inputs(case: Case, attempt: int) -> dict[str, Tensor]:
    """The model's keyword arguments."""
    design = case.design
    torch.manual_seed(case.seed + 1_000_003 * (attempt + 1))
    dtype = getattr(torch, design.dtype)
    (rows, columns), b = design.grid, design.batch
    shape = (b, rows * columns, CHANNELS) if design.source == "tokens" else (b, CHANNELS, rows * PATCH, columns * PATCH)
    if design.source == "frames":
        shape = (b, 2, *shape[1:])
    found: dict[str, Tensor] = {"image": torch.randn(shape, dtype=dtype)}
    if design.text and design.text_source == "input":
        found["text"] = torch.randn(b, design.text, design.width, dtype=dtype)
        found["mask"] = torch.rand(b, design.text) < 0.7
        found["mask"][:, 0] = True
    if design.text and design.text_source == "reference":
        found["reference"] = torch.randn(b, CHANNELS, rows * PATCH, columns * PATCH, dtype=dtype)
    if design.timestep != "none":
        found["timestep"] = torch.rand(b if design.timestep == "sample" else 1) * 999
    if any(c["table"] == "input" for c in design.blocks):
        y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
        samples = 2 * b if design.source == "frames" else b
        found["ids"] = torch.stack([y.flatten(), x.flatten()], 1).to(dtype).expand(samples, -1, -1).clone()
    return found


def build(case: Case) -> Denoiser:
    """The model, in eval mode."""
    torch.manual_seed(case.seed)
    model = Denoiser(case.design).eval().requires_grad_(False)
    return model.double() if case.design.dtype == "float64" else model
