"""What is left where there is no graph of a whole denoiser: its blocks may be captured one by one."""

from __future__ import annotations

import re
from types import TracebackType

from torch import nn
from torch.fx import Node


def advice(model: nn.Module, at: Node | BaseException) -> str:
    """Return what to add to the reason why ``model`` has no graph, or nothing.

    Args:
        at: the node that no graph can hold, or the error of the capture: inside a block, the block has no graph either.
    """
    blocks = {path: module for path, module in model.named_modules() if _is_block(path, model)}
    if not blocks:
        return ""
    if isinstance(at, Node):
        inside = any(path in blocks for path, _ in at.meta.get("nn_module_stack", {}).values())
    else:
        inside = not _calling(at.__traceback__).isdisjoint(map(id, blocks.values()))
    names = ", ".join(dict.fromkeys(path.rpartition(".")[0] for path in blocks))
    return "" if inside else f'; its blocks ({names}) may be optimized one by one: docs/compatibility.md, "Step caches"'


def _is_block(path: str, model: nn.Module) -> bool:
    """Whether the module at ``path`` is an item of one of the model's own lists, and has attention."""
    owner, _, _ = path.rpartition(".")
    if not owner or "." in owner or not isinstance(model.get_submodule(owner), nn.ModuleList):
        return False
    return any(re.search("attn|attention", name) for name, _ in model.get_submodule(path).named_modules())


def _calling(traceback: TracebackType | None) -> set[int]:
    """Identities of the modules whose methods ``traceback`` runs through."""
    found = set()
    while traceback is not None:
        found.add(id(traceback.tb_frame.f_locals.get("self")))
        traceback = traceback.tb_next
    return found
