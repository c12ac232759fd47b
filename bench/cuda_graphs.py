"""Whether outputs of CUDA graphs outlive the next call: ``python -m bigain_fx.bench.cuda_graphs``, on a GPU.

A CUDA graph writes its outputs to the same memory at every call, and a step of guidance may make two.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch._dynamo.utils import counters

from bigain_fx import command_line, optimize
from bigain_fx.bench import BenchError
from bigain_fx.models import load
from bigain_fx.passes.grammar import parse


def check_outputs(
    fast: Callable[[Tensor], Tensor], eager: Callable[[Tensor], Tensor], inputs: Sequence[Tensor]
) -> None:
    """Keep what ``fast`` gives for each of ``inputs`` until all were called, and compare it with ``eager``.

    Raises:
        BenchError: an output is not nearer to ``eager``'s of its own input than to those of the others.
    """
    kept = [fast(each) for each in inputs]
    expected = [eager(each) for each in inputs]
    for index, output in enumerate(kept):
        off = [float((output - other).norm()) for other in expected]
        if not all(off[index] < 0.1 * distance for other, distance in enumerate(off) if other != index):
            raise BenchError(f"output {index} is {off[index]:.2e} from eager's after {len(kept)} calls, {off} from all")


def main() -> None:
    """Check two inputs, in turns, as often as it takes to record graphs and to replay them."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    workload = load("mnist-dit", device=device)
    fast, eager = (
        optimize(workload.model, method=parse("bigain-tm:0.5"), grid=workload.grid, backend=backend, mode=mode)
        for backend, mode in (("inductor", "reduce-overhead"), ("eager", None))
    )
    name, first = next(iter(workload.kwargs.items()))
    inputs = [first, torch.randn_like(first)]
    with torch.no_grad():
        for _ in range(4):
            check_outputs(
                lambda each: fast(**workload.kwargs | {name: each})[0],
                lambda each: eager(**workload.kwargs | {name: each})[0],
                inputs,
            )
    skipped = counters["inductor"]["cudagraph_skips"]
    if device == "cuda" and skipped:
        raise BenchError(f"torch made no CUDA graph, {skipped} times: nothing was checked")
    print(f"outputs of mode='reduce-overhead' outlive the next call on {device}")


if __name__ == "__main__":
    command_line.run(main)
