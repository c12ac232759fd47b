"""Every argument of everything public, given what it must not be: one line of our own, at once, that names it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import bigain_fx as bgx
from bigain_fx import embedded
from bigain_fx.classify import wilson
from bigain_fx.evidence.evaluate import Settings
from bigain_fx.export.ports import Port
from bigain_fx.sample import predict, sample
from tests import toys
from tests.test_optimize import SAMPLE, TEXT, unet
from tests.test_sample import tiny

NAN, INF = float("nan"), float("inf")
MERGE, KV = bgx.LaplacianMerge(0.5), bgx.KVDownsample(2)


class Odd:
    """Nothing that anything takes, with a word of its own that takes three lines and fails at the second try."""

    def __init__(self) -> None:
        self.said = 0

    def __repr__(self) -> str:
        self.said += 1
        if self.said > 1:
            raise ValueError("no more")
        return "an\nodd\nthing"


def of(*values: Any) -> list[Any]:
    """Those, and what is never right."""
    return [*values, Odd(), 1j, b"1", {1, 2}]


INTEGER = of("4", 1.5, True, NAN, INF, 2**70, -(2**70), [4], torch.tensor(4), torch.zeros(2), np.zeros(2),
             np.float32(1.5), Fraction(3, 2))  # fmt: skip
COUNT = [*INTEGER, 0, -1, np.int64(0)]
NUMBER = of("1", True, NAN, INF, -INF, 10**400, 1e300, [1.0], torch.tensor(1.0), np.zeros(2), np.float32(NAN))
CHOICE = of(True, 0, 1.5, "no such", "", ["all"], np.array(["all", "auto"]), torch.zeros(2))
FLAG = of(None, 0, 1, 1.0, "yes", "", torch.tensor(True), np.zeros(2))
PATH = of(None, 5, 1.5, True, NAN, "", torch.zeros(2))
MAPPING = of(5, True, "x", [1], [("a", 1)], torch.zeros(2), {1: 2})
POSITIONAL = of(5, True, "x", torch.zeros(2, 3, 4, 6), np.zeros(2), {"image": torch.zeros(2)})
FUNCTION = of(5, "x", [1], torch.zeros(2))
MODEL = of(None, 5, "unet", torch.zeros(2), nn.Linear, toys.Separate)
METHOD = of(5, 0.7, "bigain-tm:0.7", "", True, bgx.LaplacianMerge, [MERGE, 5], [MERGE, MERGE], {}, {"method": MERGE},
            torch.zeros(0), torch.tensor(0.5), np.zeros(0))  # fmt: skip
GRID = of(5, True, "8x8", (8,), (8, 8, 8), (0, 8), (8, -1), (8.0, 8), (True, 8), (8, None), (2**70, 2), [[8], [8]],
          torch.tensor([8, 8]), np.array([8, 8]), {"rows": 8}, (NAN, 8))  # fmt: skip
WHERE = of(5, True, "", " ", ("a", ""), (), ["*"], [], "a:b", "a/b", ("*", None), torch.zeros(2), np.array(["*"]))
INPUTS = of(5, True, "x", {"image": 1}, torch.zeros(2, 3), [], [5], [("a", 1)], [((), {1: 2})])

Make = Callable[[Any], Any]


def model() -> nn.Module:
    return toys.Separate().eval()


def optimized(**changed: Any) -> Any:
    given: dict[str, Any] = {"model": model(), "method": MERGE, "backend": "eager"}
    return bgx.optimize(**(given | changed))


def method_of(kind: Any, **given: Any) -> Any:
    return kind(**given)


def exported(name: str, value: Any, *, suffix: str = ".onnx") -> Any:
    export = bgx.export_onnx if suffix == ".onnx" else bgx.export_package
    given = {"model": model(), "args": (toys.image(),), "path": f"nowhere{suffix}", "method": MERGE}
    return export(**(given | {name: value}))


def classifier(**changed: Any) -> Any:
    torch.manual_seed(0)
    bundle = tiny()
    given: dict[str, Any] = {
        "denoiser": bundle.model, "scheduler": bundle.scheduler, "conditions": bundle.condition(torch.arange(3)),
        "n_samples": (2,), "to_keep": (1,), "batch": 2,
    }  # fmt: skip
    return bgx.DiffusionClassifier(**(given | changed))


def sampled(**changed: Any) -> Any:
    bundle, noise = tiny(), torch.zeros(1, 1, 8, 8)
    given = {"labels": torch.tensor([0]), "steps": 2, "guidance": None, "noise": noise, "batch": 2}
    return sample(bundle.model, bundle, **(given | changed))


def predicted(batch: Any) -> Any:
    bundle, x, labels = tiny(), torch.zeros(1, 1, 8, 8), torch.tensor([0])
    return predict(bundle.model, bundle.condition, x, torch.tensor([1]), labels, batch=batch)


CALLS = [{"sample": torch.zeros(1, 1, 8, 8), "timestep": t} for t in (1, 900)]


def calibrated(**changed: Any) -> Any:
    given: dict[str, Any] = {"model": model(), "calls": CALLS, "method": KV}
    return bgx.calibrate(**(given | changed))


def step(value: Any) -> Any:
    return calibrated(calls=[{"image": toys.image(), "timestep": value}])


BAD: dict[str, tuple[Make, list[Any]]] = {}
"""Makes a call with a value, and the values; by what is called and the argument that is to be named."""


def bad(call: str, values: list[Any], make: Make) -> None:
    assert call not in BAD
    BAD[call] = make, values


for kind in (bgx.LaplacianMerge, bgx.ToMe, bgx.BlockPool):
    own = kind.__name__
    bad(f"{own} ratio", [*NUMBER, None, -0.1, 0.8, 2, 2**70, (), (NAN,), ("1",), (0.5, None)],
        lambda value, kind=kind: kind(ratio=value))  # fmt: skip
    bad(f"{own} cell", [*GRID, None, (1, 1), [2, 2]], lambda value, kind=kind: kind(cell=value))
    bad(f"{own} levels", COUNT, lambda value, kind=kind: kind(levels=value))
    bad(f"{own} where", WHERE, lambda value, kind=kind: kind(where=value))
    for name in ("scope", "align", "unmerge"):
        bad(f"{own} {name}", [*CHOICE, None], lambda value, kind=kind, name=name: kind(**{name: value}))
    bad(f"{own} proportional", FLAG, lambda value, kind=kind: kind(proportional=value))
for kind in (bgx.LaplacianMerge, bgx.ToMe):
    bad(f"{kind.__name__} window", COUNT, lambda value, kind=kind: kind(window=value))
bad("LaplacianMerge cell_layout", [*CHOICE, None], lambda value: bgx.LaplacianMerge(cell_layout=value))
bad("ToMe seed", [*INTEGER, None], lambda value: bgx.ToMe(seed=value))
for kind in (bgx.KVDownsample, bgx.ToDo):
    bad(f"{kind.__name__} factor", [*COUNT, None, 1], lambda value, kind=kind: kind(factor=value))
    bad(f"{kind.__name__} levels", COUNT, lambda value, kind=kind: kind(levels=value))
    bad(f"{kind.__name__} where", WHERE, lambda value, kind=kind: kind(where=value))
bad("KVDownsample alpha", [*NUMBER, None, bgx.LinearAlpha], lambda value: bgx.KVDownsample(alpha=value))
for name in ("noisy", "clean"):
    bad(f"LinearAlpha {name}", [*NUMBER, None], lambda value, name=name: bgx.LinearAlpha(**{name: value}))
bad("LinearAlpha t_noisy", [*NUMBER, None, 0], lambda value: bgx.LinearAlpha(t_noisy=value, t_clean=0))
bad("LinearAlpha t_clean", [*NUMBER, None, 999], lambda value: bgx.LinearAlpha(t_noisy=999, t_clean=value))

for name, values in {
    "model": MODEL, "method": METHOD, "grid": GRID, "max_graphs": [*COUNT, None], "select": [*CHOICE, None],
    "on_new_signature": [*CHOICE, None], "backend": of(None, 5, True, "inductorr", "", "bigain", ["inductor"]),
    "args": POSITIONAL, "kwargs": MAPPING,
}.items():  # fmt: skip
    bad(f"optimize {name}", values, lambda value, name=name: optimized(**{name: value}))
bad("preset kind", [*CHOICE, None], lambda value: bgx.preset(model(), value))
bad("enable pipe", of(None, 5, "sd", nn.Linear, {"unet": model()}), lambda value: bgx.enable(value, method=MERGE))
bad("optimize mode", of(5, True, "fast", ["max-autotune"]), lambda value: optimized(backend="inductor", mode=value))
bad("optimize mode of eager", ["max-autotune", "reduce-overhead"], lambda value: optimized(mode=value))
bad("optimize mode of a function", ["max-autotune"], lambda value: optimized(backend=lambda g, _: g, mode=value))
bad("optimize mode beside options", ["max-autotune"],
    lambda value: optimized(backend="inductor", mode=value, options={"max_autotune": True}))  # fmt: skip
bad("optimize options", [*MAPPING, {"no_such": 1}, {"max_autotune": "yes"}, {"max-autotune": None}],
    lambda value: optimized(backend="inductor", options=value))  # fmt: skip
bad("optimize options of eager", [{"max_autotune": True}], lambda value: optimized(options=value))
bad("inspect model", MODEL, lambda value: bgx.inspect(value, (toys.image(),)))
bad("inspect args", POSITIONAL, lambda value: bgx.inspect(model(), value))
bad("inspect kwargs", MAPPING, lambda value: bgx.inspect(model(), kwargs=value))
bad("inspect method", METHOD, lambda value: bgx.inspect(model(), (toys.image(),), method=value))
bad("inspect grid", GRID, lambda value: bgx.inspect(model(), (toys.image(),), grid=value))
bad("inspect grid of a function", [lambda: 1, lambda _: {}["height"], lambda _: 5, lambda _: (0, 5)],
    lambda value: bgx.inspect(model(), (toys.image(),), method=MERGE, grid=value))  # fmt: skip
bad("prepare example_inputs", [*INPUTS[:4], *INPUTS[5:6]], lambda value: optimized().prepare(example_inputs=value))
for suffix, function in ((".onnx", "export_onnx"), (".pt2", "export_package")):
    for name, values in {
        "model": MODEL, "args": POSITIONAL, "path": [*PATH, f"no/such{suffix}", "file.txt", f"a\0/b{suffix}"],
        "kwargs": MAPPING, "method": METHOD, "dtype": of("float16", 16, torch.int8, torch.float32.__class__),
        "grid": GRID,
    }.items():  # fmt: skip
        bad(f"{function} {name}", values, lambda value, name=name, suffix=suffix: exported(name, value, suffix=suffix))
bad("export_onnx opset", [*COUNT, None, 17, 24], lambda value: exported("opset", value))
bad("export_onnx attention", [*CHOICE, None], lambda value: exported("attention", value))
bad("export_onnx verify", FLAG, lambda value: exported("verify", value))
bad("export_onnx example_inputs", [*INPUTS[:4], *INPUTS[5:6]],
    lambda value: bgx.export_onnx(model(), None, "file.onnx", method=MERGE, example_inputs=value))  # fmt: skip
bad("OrtDenoiser path", [*PATH, [], [None], ["a.onnx", 5]], bgx.OrtDenoiser)
bad("OrtDenoiser provider", of(5, True, torch.zeros(2), [5], [None], [("CPUExecutionProvider",)], "", [], "NoSuch",
                                [("CPUExecutionProvider", 5)]),
    lambda value: bgx.OrtDenoiser("file.onnx", providers=value))  # fmt: skip
bad("OrtDenoiser strict", FLAG, lambda value: bgx.OrtDenoiser("file.onnx", strict=value))
bad("OrtDenoiser session_options", of(5, True, "x", {"threads": 1}),
    lambda value: bgx.OrtDenoiser("file.onnx", session_options=value))  # fmt: skip
bad("load_package path", PATH, bgx.load_package)

for name, values in {
    "denoiser": of(None, 5, "unet", torch.zeros(2)), "scheduler": of(None, 5, "ddim", torch.zeros(2)),
    "conditions": [*MAPPING, None, {}], "inputs": MAPPING, "batch": [*COUNT, None], "seed": [*INTEGER, None, 2**50],
    "n_samples": of(None, 5, 2.5, "2", (), (0,), (-1,), (1.5,), ("2",), (True,), (NAN,), (2**70,), (None,),
                    torch.tensor([2])),
    "to_keep": of(None, 5, "1", (), (0,), (2,), (1.0,), (True,), (2**70,)),
    "units": of(5, "x", True, (), (1,), (1, 2, 3), (NAN, 0), (INF, 0), ("a", 0), (True, 0), (0, 0), (None, 0),
                (10**400, 0), torch.zeros(2)),
}.items():  # fmt: skip
    bad(f"DiffusionClassifier {name}", values, lambda value, name=name: classifier(**{name: value}))
LATENTS = torch.zeros(2, 1, 8, 8)
bad("DiffusionClassifier() latents",
    of(None, 5, "x", np.zeros((2, 1, 8, 8)), [LATENTS], torch.zeros(2), torch.zeros(0, 1, 8, 8), LATENTS.long(),
       LATENTS + NAN, LATENTS.index_fill(0, torch.tensor(1), INF)), lambda value: classifier()(value))  # fmt: skip
bad("DiffusionClassifier() first", [*INTEGER, None, -1], lambda value: classifier()(LATENTS, first=value))
bad("DiffusionClassifier() progress", FUNCTION, lambda value: classifier()(LATENTS, progress=value))
bad("wilson total", [*COUNT, None], lambda value: wilson(0, value))
bad("wilson correct", [*INTEGER, None, -1, 5], lambda value: wilson(value, 4))

for name, values in {
    "steps": [*COUNT, None, 1001], "batch": [*COUNT, None], "guidance": NUMBER,
    "labels": of(None, 5, [0], np.zeros(1), torch.zeros(1), torch.tensor(0), torch.tensor([3]), torch.tensor([-1])),
    "noise": of(None, 5, [0], np.zeros((1, 1, 8, 8)), torch.zeros(2, 1, 8, 8)),
}.items():  # fmt: skip
    bad(f"sample {name}", values, lambda value, name=name: sampled(**{name: value}))
bad("predict batch", [*COUNT, None], predicted)
bad("embedded.load name", of(None, 5, "no such", ["mnist-dit"]), embedded.load)
for name, values in {
    "n_samples": of(None, 5, "2", (), (0,), (1.5,)), "batch": [*COUNT, None], "steps": [*COUNT, None],
    "guidance": [*NUMBER, None], "seed": [*INTEGER, None],
}.items():  # fmt: skip
    bad(f"Settings {name}", values, lambda value, name=name: replace(Settings(), **{name: value}))

for name, values in {
    "model": MODEL, "calls": of(None, 5, "x", [], [5], [None], torch.zeros(2), {"image": 1}, [{1: 2}]),
    "method": of(None, 5, "bigain-td:2", bgx.ToDo(2), (KV,)), "schedule": FLAG, "grid": GRID,
}.items():  # fmt: skip
    bad(f"calibrate {name}", values, lambda value, name=name: calibrated(**{name: value}))
bad("calibrate cells", [None, 5, True, "4x4", b"1", Odd()], lambda value: calibrated(method=MERGE, cells=value))
bad("calibrate cell", [5, [5], [(1, 1)], [(0, 4)], [None], [("4", 4)]],
    lambda value: calibrated(method=MERGE, cells=value))  # fmt: skip
bad("calibrate timestep", of("1", NAN, INF, None, [1, 2], torch.zeros(2, 2) + NAN, torch.tensor([1, 2])), step)
bad("deployed timestep", of("1", None, 2**64, -(2**70), 1e300, INF, [1], np.zeros(2), torch.zeros(3)),
    lambda value: Port("timestep", ("timestep",), (2,), "float32").bring(value, torch.device("cpu")))  # fmt: skip


@pytest.mark.parametrize("call", BAD)
def test_a_wrong_value_is_named_in_one_line(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make, values = BAD[call]
    argument = call.split()[1]
    for value in values:
        told = f"{call}: {type(value).__name__} {str(value)[:60]!r}" if not isinstance(value, Odd) else f"{call}: Odd"
        try:
            with torch.no_grad():
                make(value)
        except bgx.BigainError as error:
            message = str(error)
        except Exception as error:
            pytest.fail(f"{told}: {type(error).__name__}: {error}")
        else:
            pytest.fail(f"{told}: nothing")
        assert "\n" not in message, told
        assert len(message) < 600, told
        assert argument in message, f"{told}: {message}"
    assert list(tmp_path.iterdir()) == []


STEPS = [7, np.int64(7), np.int32(7), np.uint8(7), np.array(7), 7.0, np.float64(7), np.float32(7), np.float16(7)]


@torch.no_grad()
def test_timesteps_of_any_kind_of_number() -> None:
    dense = unet()
    fast, exported_port = bgx.optimize(dense, method=(), backend="eager"), Port("timestep", ("timestep",), (), "int64")
    expected = dense(SAMPLE, 7, TEXT).sample
    for value in STEPS:
        torch.testing.assert_close(fast(SAMPLE, value, TEXT).sample, expected, atol=1e-5, rtol=1e-5)
        assert exported_port.bring(value, torch.device("cpu")).tolist() == 7
    assert len(fast._graphs) == 2, "one of integers, one of floats"
    scale = {"timestep_cond": None, "cross_attention_kwargs": None, "return_dict": np.bool_(False)}
    assert isinstance(fast(SAMPLE, np.int64(7), TEXT, **scale), tuple)


@pytest.mark.parametrize("value", [2**63, -(2**63) - 1, 2**70, np.uint64(2**63), 10**400], ids=type)
def test_a_timestep_beyond_int64(value: Any) -> None:
    fast = bgx.optimize(unet(), method=(), backend="eager")
    with pytest.raises(bgx.InputError, match=r"timestep=\S+ must be a number that int64 can hold"):
        fast(SAMPLE, value, TEXT)


def test_numbers_of_numpys_are_numbers() -> None:
    eight, half = np.int64(8), np.float32(0.5)
    made = bgx.ToMe(half, cell=(np.int32(2), 2), levels=eight, window=eight, seed=eight)
    assert made == bgx.ToMe(0.5, cell=(2, 2), levels=8, window=8, seed=8)
    assert repr(made) == repr(bgx.ToMe(0.5, cell=(2, 2), levels=8, window=8, seed=8))
    assert repr(bgx.KVDownsample(np.int64(2), half)) == repr(bgx.KVDownsample(2, 0.5))
    report = optimized(args=(toys.image(),), grid=(np.int64(4), np.int64(6)), max_graphs=eight).report
    assert report.sites[0].grid == (4, 6)
    fast = classifier(n_samples=(np.int64(2),), to_keep=[1], batch=eight, seed=np.int64(3), units=(np.float32(999), 0))
    assert torch.equal(fast(LATENTS).errors, classifier(batch=8, seed=3)(LATENTS).errors)


def test_a_grid_function_that_raises_is_chained() -> None:
    with pytest.raises(bgx.GridError, match=r"grid=<function.*raises KeyError: 'height'") as caught:
        bgx.inspect(model(), (toys.image(),), method=MERGE, grid=lambda arguments: arguments["height"])
    assert isinstance(caught.value.__cause__, KeyError)

    def interrupted(arguments: Any) -> Any:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bgx.inspect(model(), (toys.image(),), method=MERGE, grid=interrupted)


@pytest.mark.parametrize("wrong", [NAN, INF])
def test_errors_that_are_not_finite_are_no_class(wrong: float) -> None:
    """As where float16 overflows for one class of one image."""

    def denoiser(x: Tensor, timestep: Tensor, class_labels: Tensor, return_dict: bool) -> tuple[Tensor]:
        return (x + torch.where((class_labels == 2) & (x.mean((1, 2, 3)) > 50), wrong, 0.0)[:, None, None, None],)

    found = classifier(denoiser=denoiser, units=(999, 0))
    assert found(LATENTS).predicted.shape == (2,)
    with pytest.raises(bgx.InputError, match=r"latents\[1\]: what the denoiser answers for class 2 is not finite"):
        found(torch.stack([LATENTS[0], LATENTS[1] + 1e4]))
