"""The placement lint: it names each node that would leave the GPU, and only those, with the reason."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, defs, helper, numpy_helper, parser

from bigain_fx.export.lint import Finding, lint
from bigain_fx.export.placement import CLAIMED_BY_CPU, CUDA, KERNELS, OPSETS, misfit
from bigain_fx.passes.errors import ExportError, InputError

Check = Callable[..., dict[str, tuple[str, str]]]
DOMAINS = ', "com.microsoft": 1, "bigain": 1'
PLAN = """<domain: "bigain", opset_import: ["": 20, "bigain": 1]> Plan <groups> (tokens, index) => (assign, picked) {
    score = Cast <to = 1> (tokens)
    axes = Constant <value_ints = [2]> ()
    flat = ReduceMean <keepdims = 0> (score, axes)
    count = Constant <value_int: int = @groups> ()
    one = Constant <value_ints = [1]> ()
    k = Reshape (count, one)
    top, best = TopK <axis = 1> (flat, k)
    zero = Constant <value_int = 0> ()
    step = Constant <value_int = 1> ()
    ids = Range (zero, count, step)
    like = Shape (best)
    spread = Expand (ids, like)
    assign = ScatterElements <axis = 1> (index, best, spread)
    rows = bigain.Rows (tokens, best)
    picked = CastLike (rows, tokens)
}
<domain: "bigain", opset_import: ["": 20]> Rows (tokens, index) => (rows) {
    last = Constant <value_ints = [2]> ()
    column = Unsqueeze (index, last)
    rows = GatherElements <axis = 1> (tokens, column)
}
<domain: "bigain", opset_import: ["": 20]> Bad <to> (x) => (y) {
    a = Sin (x)
    [turn] b = Acos (a)
    y = Cast <to: int = @to> (b)
}
<domain: "bigain", opset_import: ["": 20, "bigain": 1]> Outer (x) => (y, least) {
    [first] a = bigain.Bad <to = 7> (x)
    [second] least = ArgMin <axis = 1> (a)
    y = Relu (x)
}"""
GOOD = """good (float16[2, 64, 8] tokens, int64[2, 64] index)
    => (float16[2, 32, 1] y, float16[2, 64, 8] z, int64[2] best, float16[2, 3, 8] row) {
    assign, y = bigain.Plan <groups = 32> (tokens, index)
    a = com.microsoft.MultiHeadAttention <num_heads = 2> (tokens, tokens, tokens)
    flip = Transpose <perm = [0, 2, 1]> (tokens)
    square = MatMul (a, flip)
    z = MatMul (square, tokens)
    group = Cast <to = 1> (assign)
    best = ArgMax <axis = 1, keepdims = 0> (group)
    three = Constant <value_ints = [0, 5, 3]> ()
    row = Gather <axis = 1> (tokens, three)
}"""
BAD = """bad (bfloat16[2, 16] tokens, float16[2, 16] half, float[2, 16] x, int64[2, 16] index, float[1, 4, 8] image,
    float[4, 2, 3] kernel, float[N, 16] loose, int32[4] ints, bool flag) => (float[2, 16] y) {
    k = Constant <value_ints = [4]> ()
    [kept_topk] top, where = TopK (x, k)
    [bf16_topk] top2, where2 = TopK (tokens, k)
    [bf16_sin] sin = Sin (tokens)
    [half_scatter] s = ScatterElements <axis = 1, reduction = "add"> (half, index, half)
    [int_scatter] t = ScatterND <reduction = "add"> (index, index, index)
    [kept_scatter] u = ScatterElements <axis = 1, reduction = "add"> (x, index, x)
    [plain_scatter] v = ScatterElements <axis = 1> (half, index, half)
    [no_kernel] turned = Acos (x)
    [cpu_has_it_whole] celu = Celu (x)
    [unknown_contrib] mixed = com.microsoft.FlashMix (tokens)
    [after_unknown] sin2 = Sin (mixed)
    [unknown_domain] other = bigain.Missing (half)
    [last_index] last = ArgMax <axis = 1, select_last_index = 1> (x)
    [kept_argmax] first = ArgMax <axis = 1> (x)
    [uneven] grown = ConvTranspose <pads = [0, 1]> (image, kernel)
    [auto] same = ConvTranspose <auto_pad = "SAME_UPPER"> (image, kernel)
    [int_argmin] least = ArgMin <axis = 1> (index)
    [int_clip] clipped = Clip (ints)
    [loose_shape] shape = Shape (loose)
    [shape_arithmetic] bits = BitwiseAnd (shape, shape)
    [too_new] normed = InstanceNormalization (image, ones, ones)
    [choice] y = If (flag) <then_branch = one () => (float[2, 16] a) { [in_branch] a = Tan (x) },
                            else_branch = two () => (float[2, 16] b) { [kept_branch] b = Relu (x) }>
}"""
REASONS = {
    "bf16_topk": ("ai.onnx::TopK", "no kernel with bfloat16 as T (it may be float16, float32, float64,"),
    "half_scatter": ("ai.onnx::ScatterElements", "reduction=add in float16"),
    "int_scatter": ("ai.onnx::ScatterND", "reduction=add in int64"),
    "no_kernel": ("ai.onnx::Acos", "no kernel in the table (CUDAExecutionProvider"),
    "cpu_has_it_whole": ("ai.onnx::Celu", "no kernel in the table (CUDAExecutionProvider"),
    "unknown_contrib": ("com.microsoft::FlashMix", "unknown to the table"),
    "unknown_domain": ("bigain::Missing", "unknown to the table"),
    "last_index": ("ai.onnx::ArgMax", "select_last_index"),
    "uneven": ("ai.onnx::ConvTranspose", "pads=[0, 1]"),
    "auto": ("ai.onnx::ConvTranspose", "auto_pad=SAME_UPPER"),
    "int_argmin": ("ai.onnx::ArgMin", "no kernel with int64 as T (it may be float16, float32, float64)"),
    "int_clip": ("ai.onnx::Clip", "no kernel with int32 as T"),
    "shape_arithmetic": ("ai.onnx::BitwiseAnd", "no kernel"),
    "in_branch": ("ai.onnx::Tan", "no kernel"),
}
AT_20 = {"bf16_sin": ("ai.onnx::Sin", "bfloat16 as T"), "after_unknown": ("ai.onnx::Sin", "bfloat16 as T")}
AT_23 = {"too_new": ("ai.onnx::InstanceNormalization", "no kernel for version 22 of the operator, only up to 6")}


def serialized(graph: str, opset: int = 20, functions: str = PLAN) -> bytes:
    """A model in ONNX's text form, as bytes; its graph has an initializer ``ones``."""
    model = parser.parse_model(f'<ir_version: 10, opset_import: ["": {opset}{DOMAINS}]> {graph} {functions}')
    model.graph.initializer.append(helper.make_tensor("ones", TensorProto.FLOAT, [4], [1.0] * 4))
    return model.SerializeToString()


@pytest.fixture
def check(tmp_path: Path) -> Check:
    """Lint a graph in ONNX's text form: operators and reasons by node name, in order."""

    def run(graph: str, opset: int = 20, functions: str = PLAN) -> dict[str, tuple[str, str]]:
        (tmp_path / "model.onnx").write_bytes(serialized(graph, opset, functions))
        findings = lint(tmp_path / "model.onnx")
        assert all(isinstance(finding, Finding) and "\n" not in finding.reason for finding in findings)
        return {finding.node: (finding.op, finding.reason) for finding in findings}

    return run


@pytest.mark.parametrize(("opset", "own"), [(20, AT_20), (23, AT_23)])
def test_bad_graph(check: Check, opset: int, own: dict[str, tuple[str, str]]) -> None:
    found = check(BAD, opset)
    assert list(found) == sorted(REASONS | own, key=lambda name: BAD.index(f"[{name}]"))
    for name, (op, reason) in (REASONS | own).items():
        assert found[name][0] == op
        assert reason in found[name][1]


@pytest.mark.parametrize("opset", [18, 20, 21, 22, 23])
def test_good_graph(check: Check, opset: int) -> None:
    assert check(GOOD, opset) == {}


def test_nested_functions(check: Check) -> None:
    found = check("g (float[2, 16] x) => (float[2, 16] y, int64[2, 1] z) { [call] y, z = bigain.Outer (x) }")
    assert list(found) == ["call/first/turn", "call/second"]
    assert "int64 as T" in found["call/second"][1]  # the dtype is the attribute of the call inside


@pytest.mark.parametrize(
    ("body", "kept"),
    [
        ("c = Constant <value_floats = [0.5, 0.5]> () [bad] a = Acos (c) y = Add (x, a)", True),
        ("[bad] a = Acos (x) y = Identity (a)", False),
        ("[bad] a = Acos (ones) b = Reshape (a, s) y = Mul (x, b) s = Constant <value_ints = [2, 2]> ()", True),
        ("s = Shape (x) [bad] t = BitwiseAnd (s, s) y = Expand (x, t)", True),
        ("r = RandomNormalLike (ones) [bad] a = Acos (r) y = Add (x, a)", False),
        ("c = Constant <value_floats = [0.5, 0.5]> () [bad] a = bigain.Missing (c) y = Add (x, a)", False),
    ],
)
def test_constants_are_folded(check: Check, body: str, kept: bool) -> None:
    assert list(check(f"g (float[2, 2] x) => (float[2, 2] y) {{ {body} }}")) == ([] if kept else ["bad"])


def test_constants_pass_through_functions(check: Check) -> None:
    graph = "c = Constant <value_floats = [0.5]> () i = bigain.Bad <to = 1> (c) [bad] a = Acos (i) y = Add (x, a)"
    assert check(f"g (float[1] x) => (float[1] y) {{ {graph} }}") == {}


def test_dtypes_come_out_of_functions(tmp_path: Path) -> None:
    """Even past an operator that only ONNX Runtime knows, of a domain that only the function imports."""
    path = tmp_path / "m.onnx"
    text = """<ir_version: 10, opset_import: ["": 20, "bigain": 1]> g (float[2, 4] x) => (bfloat16[2, 4] z) {
        y = bigain.Mix (x)
        [bad] z = Cos (y)
    }
    <domain: "bigain", opset_import: ["": 20, "com.microsoft": 1]> Mix (x) => (y) {
        narrow = Cast <to = 16> (x)
        mixed = com.microsoft.Gelu (narrow)
        [inner] turned = Cos (mixed)
        y = Identity (turned)
    }"""
    path.write_bytes(parser.parse_model(text).SerializeToString())
    assert [(each.node, "bfloat16" in each.reason) for each in lint(path)] == [("y/inner", True), ("bad", True)]


def test_the_opset_of_the_file_counts(check: Check) -> None:
    """Also in a function that was written for an older one, as ONNX Runtime was seen to do."""
    norm = (
        """<domain: "bigain", opset_import: ["": 20]> Norm (x, s) => (y) { [in] y = InstanceNormalization (x, s, s) }"""
    )
    graph = "g (float[2, 4, 8] x, float[4] s) => (float[2, 4, 8] y) { [call] y = bigain.Norm (x, s) }"
    assert check(graph, 21, norm) == {}
    assert list(check(graph, 23, norm)) == ["call/in"]


@pytest.mark.parametrize(
    ("opset", "dtype", "node", "reason"),
    [
        (20, "float16", "GroupNormalization <num_groups = 2> (x, s, s)", None),
        (23, "float16", "GroupNormalization <num_groups = 2> (x, s, s)", None),
        (20, "float", "Mish (x)", None),
        (24, "float16", "Swish (x)", None),
        (22, "float", "Elu (x)", "version 22"),  # the CPU provider has it whole
        (22, "float16", "Elu (x)", None),  # nobody has it: its body is kept
        (20, "bfloat16", "LogSoftmax (x)", "in its function body"),
        (20, "bfloat16", "Cos (x)", "bfloat16"),
        (22, "bfloat16", "Cos (x)", None),
        (20, "bfloat16", "ReduceMax (x)", "bfloat16"),
        (20, "bfloat16", "Resize <mode = \"nearest\"> (x, , scales)", "bfloat16 as T1"),
        (20, "float16", "Resize <mode = \"nearest\"> (x, , scales)", None),
        (23, "float16", "Attention (x, x, x)", None),
        (20, "bfloat16", "com.microsoft.MultiHeadAttention <num_heads = 1> (x)", None),
        (20, "double", "com.microsoft.MultiHeadAttention <num_heads = 1> (x)", "float64 as T"),
    ],
)  # fmt: skip
def test_versions_dtypes_and_bodies(check: Check, opset: int, dtype: str, node: str, reason: str | None) -> None:
    inputs = f"{dtype}[2, 4, 8, 8] x, {dtype}[4] s, float[4] scales"
    found = check(f"g ({inputs}) => ({dtype}[2, 4, A, B] y) {{ y = {node} }}", opset)
    assert len(found) == (reason is not None)
    assert all(reason in said for _, said in found.values())


def test_weights_need_not_be_there(tmp_path: Path) -> None:
    weight = numpy_helper.from_array(np.ones((64, 64), np.float32), "w")
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    x, y = (helper.make_tensor_value_info(name, 1, [2, 64]) for name in "xy")
    graph = helper.make_graph([node], "g", [x], [y], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])
    onnx.save(model, tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    (tmp_path / "m.data").unlink()
    assert lint(tmp_path / "m.onnx") == ()


@pytest.mark.parametrize("length", [0, 1, 100, -1])
def test_cut_short(tmp_path: Path, length: int) -> None:
    path = tmp_path / "cut.onnx"
    path.write_bytes(serialized(GOOD)[:length])
    with pytest.raises(ExportError, match=r"cut\.onnx.*cut short"):
        lint(path)


@pytest.mark.parametrize("name", ["missing.onnx", ""])
def test_unreadable(tmp_path: Path, name: str) -> None:
    with pytest.raises(ExportError, match="cannot be read") as caught:
        lint(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_malformed(check: Check) -> None:
    endless = '<domain: "bigain", opset_import: ["": 20, "bigain": 1]> Endless (x) => (y) { y = bigain.Endless (x) }'
    with pytest.raises(ExportError, match="the graph is malformed: Cycle"):
        check("g (float[1] x) => (float[1] y) { y = bigain.Endless (x) }", functions=endless)


def test_wrong_calls(check: Check) -> None:
    with pytest.raises(ExportError, match="opset 17, the table of kernels holds 18 to"):
        check("g (float[1] x) => (float[1] y) { y = Relu (x) }", 17)
    with pytest.raises(InputError, match="provider='TensorrtExecutionProvider'"):
        lint(Path("any.onnx"), "TensorrtExecutionProvider")


def versions(operator: str) -> set[int]:
    """The versions that an operator has at the opsets of the table."""
    opsets = [opset for opset in OPSETS if defs.has(operator, opset, "")]
    return {defs.get_schema(operator, opset, "").since_version for opset in opsets}


@pytest.mark.parametrize("table", [KERNELS[CUDA], CLAIMED_BY_CPU], ids=["cuda", "cpu"])
def test_rows_name_what_there_is(table: dict[str, tuple[object, ...]]) -> None:
    """A row whose version or constraint does not exist would never be looked at."""
    for name, kernels in table.items():
        domain, operator = name.split("::")
        for kernel in kernels if domain == "ai.onnx" else ():
            if kernel.first > defs.onnx_opset_version():
                continue
            used = [version for version in versions(operator) if kernel.first <= version <= kernel.last]
            assert used, name
            schema = defs.get_schema(operator, max(used), "")
            known = {part for each in (*schema.inputs, *schema.outputs) for part in (each.type_str, each.name)}
            assert set(kernel.types) <= known, name


@pytest.mark.skipif(CUDA in onnxruntime.get_available_providers(), reason="lists the CPU build's kernels only")
def test_cpu_rows_match_the_installed_runtime() -> None:
    """An operator is replaced by its function body only where neither provider has it whole."""
    schemas = [schema for schema in defs.get_all_schemas() if not schema.domain]
    bodies = {each.name for each in schemas if each.has_function or each.has_context_dependent_function}
    for kernel in onnxruntime.capi.onnxruntime_pybind11_state.get_all_opkernel_def():
        if kernel.domain or kernel.op_name not in bodies:
            continue
        first, last = kernel.version_range
        last = first if last == 2**31 - 1 else last
        rows = [table.get(f"ai.onnx::{kernel.op_name}", ()) for table in (KERNELS[CUDA], CLAIMED_BY_CPU)]
        for version in versions(kernel.op_name).intersection(range(first, last + 1)):
            for dtype in kernel.type_constraints.get("T", []):
                name = {"float": "float32", "double": "float64"}.get(dtype[7:-1], dtype[7:-1])
                assert any(misfit(row, version, {"T": name}) is None for row in rows), (kernel.op_name, version, name)
