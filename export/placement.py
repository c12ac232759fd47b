"""The operators that ONNX Runtime's CUDA provider keeps on the GPU: a table of its kernels, and its rules beside them.

The table is the kernel registry of the onnxruntime-gpu 1.31.1 wheel of PyPI (CUDA 13), as its own
``get_all_opkernel_def`` lists it (over stand-ins of the CUDA libraries: the list needs no GPU), reduced to the versions
that operators have at opsets 18 to 27, without recurrent cells. ``docs/OperatorKernels.md`` of microsoft/onnxruntime
is printed from the same list; that of commit 001d12d2623f, of early 2026, agrees but for kernels added since: among
others ConstantOfShape, ConvTranspose, Cos, Equal, Flatten, Pad, RoiAlign, Round, Sin, Softplus and TopK for the newer
opsets, and ReduceMean in bfloat16. An older release keeps less than this table says.

Of a kernel without a last version ONNX Runtime takes the exact version only (``VerifyVersion`` in its
``kernel_registry.cc``): "6+" in its documentation does not cover version 22 of InstanceNormalization. So each row here
is a closed range of versions.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

CUDA = "CUDAExecutionProvider"
RELEASE = "1.31.1"
OPSETS = range(18, 28)  # the opsets of ai.onnx that the table covers

HALF = "float16 float32"
FLOAT = "float16 float32 float64"
REAL = "bfloat16 float16 float32 float64"
BIG = "int32 int64 uint32 uint64"
NUMERIC = f"{REAL} {BIG} int8 int16 uint8 uint16"
FIXED = f"{NUMERIC} bool"
FLOAT8 = "float8e4m3fn float8e5m2"
INDEX = "int32 int64"
BYTES = f"{FLOAT8} int8 uint8"
QUANTIZED = f"{BYTES} int4 uint4"


@dataclass(frozen=True)
class Kernel:
    """One kernel: the operator versions ``first`` to ``last``, and the dtypes that it takes.

    ``types`` maps a type variable of the operator ("T") or the name of one of its tensors ("shape") to dtype names.
    """

    first: int
    last: int
    types: Mapping[str, frozenset[str]]


Row = tuple[str, int, int, Mapping[str, str]]  # operators, first and last version, dtypes by constraint


def _table(domain: str, rows: Iterable[Row]) -> dict[str, tuple[Kernel, ...]]:
    """Return the kernels of each operator, by its full name ("ai.onnx::TopK")."""
    table: dict[str, tuple[Kernel, ...]] = {}
    for operators, first, last, types in rows:
        kernel = Kernel(first, last, {name: frozenset(dtypes.split()) for name, dtypes in types.items()})
        for operator in operators.split():
            table[f"{domain}::{operator}"] = (*table.get(f"{domain}::{operator}", ()), kernel)
    return table


_ONNX: tuple[Row, ...] = (
    # arithmetic
    ("Add Div Mul Sub", 14, 14, {"T": NUMERIC}),
    ("Abs Sign", 13, 13, {"T": NUMERIC}),
    ("Neg", 13, 13, {"T": f"{REAL} int8 int16 int32 int64"}),
    ("Max Min Mod", 13, 13, {"T": f"{REAL} {BIG}"}),
    ("Pow", 15, 15, {"T": f"{REAL} {INDEX}", "T1": f"{REAL} {INDEX}"}),
    ("Ceil Floor Log Reciprocal", 13, 13, {"T": FLOAT}),
    ("Erf Exp Sqrt Sum Tanh", 13, 13, {"T": REAL}),
    ("Round", 11, 22, {"T": FLOAT}),
    ("Cos Sin", 7, 7, {"T": FLOAT}),
    ("Cos Sin", 22, 22, {"T": REAL}),
    ("Clip", 13, 13, {"T": f"{FLOAT} int8 int64 uint8 uint64"}),
    ("CumSum", 14, 14, {"T": f"{FLOAT} {BIG}", "T2": INDEX}),
    ("Not", 1, 1, {"T": "bool"}),
    ("And Or Xor", 7, 7, {"T": "bool"}),
    ("Greater Less", 13, 13, {"T": f"{FLOAT} {BIG}"}),
    ("GreaterOrEqual LessOrEqual", 16, 16, {"T": f"{FLOAT} {BIG}"}),
    ("Equal", 13, 19, {"T": f"{FLOAT} {BIG} bool"}),
    ("Where", 16, 16, {"B": "bool", "T": f"{REAL} {INDEX} uint8"}),
    ("IsInf", 10, 10, {"T1": "float32 float64"}),
    ("IsNaN", 13, 13, {"T1": REAL}),
    ("IsInf IsNaN", 20, 20, {"T1": f"{REAL} {FLOAT8} float8e4m3fnuz float8e5m2fnuz"}),
    # activations
    ("Sigmoid Softmax", 13, 13, {"T": REAL}),
    ("Relu", 14, 14, {"T": REAL}),
    ("Gelu", 20, 20, {"T": REAL}),
    ("Elu Selu", 6, 6, {"T": FLOAT}),
    ("ThresholdedRelu", 10, 10, {"T": FLOAT}),
    ("LogSoftmax", 13, 13, {"T": FLOAT}),
    ("LeakyRelu PRelu", 16, 16, {"T": FLOAT}),
    ("Softplus Softsign", 1, 1, {"T": FLOAT}),
    ("HardSigmoid", 6, 6, {"T": FLOAT}),
    ("HardSwish", 14, 14, {"T": FLOAT}),
    ("HardSigmoid HardSwish Softplus Softsign", 22, 22, {"T": REAL}),
    ("Shrink", 9, 9, {"T": f"{FLOAT} {BIG} int8 int16 uint8 uint16"}),
    # products, convolutions, pools
    ("Gemm MatMul", 13, 13, {"T": REAL}),
    ("Einsum", 12, 12, {"T": FLOAT}),
    ("Attention", 23, 24, {"T1": "bfloat16 float16 float32", "T2": "bfloat16 float16 float32"}),
    ("RotaryEmbedding", 23, 23, {"T": "bfloat16 float16 float32", "M": "int64"}),
    ("Conv", 11, 11, {"T": FLOAT}),
    ("ConvTranspose", 11, 22, {"T": FLOAT}),
    ("DeformConv", 19, 19, {"T": FLOAT}),
    ("AveragePool", 11, 19, {"T": FLOAT}),
    ("AveragePool Conv DeformConv", 22, 22, {"T": REAL}),
    ("MaxPool", 12, 12, {"T": f"{FLOAT} int8 uint8"}),
    ("GlobalAveragePool GlobalMaxPool", 1, 22, {"T": FLOAT}),
    ("RoiAlign", 16, 16, {"T1": FLOAT}),
    ("RoiAlign", 22, 22, {"T1": REAL}),
    ("GridSample", 16, 22, {"T1": "float32", "T2": "float32"}),
    ("Resize", 18, 19, {"T1": f"{FLOAT} int32 uint8"}),
    ("DepthToSpace SpaceToDepth", 13, 13, {"T": FLOAT}),
    # norms
    ("LayerNormalization", 17, 17, {"T": REAL, "U": "float32"}),
    ("RMSNormalization", 23, 23, {"T": REAL, "V": REAL}),
    ("InstanceNormalization", 6, 6, {"T": FLOAT}),
    ("BatchNormalization", 15, 15, {"T": FLOAT, "T1": FLOAT, "T2": FLOAT}),
    ("LRN", 13, 13, {"T": FLOAT}),
    ("LpNormalization", 1, 1, {"T": HALF}),
    ("LpNormalization", 22, 22, {"T": f"{HALF} bfloat16"}),
    # reductions, and what picks or counts
    ("ReduceLogSum ReduceLogSumExp ReduceSumSquare", 18, 18, {"T": FLOAT}),
    ("ReduceL1 ReduceL2 ReduceProd", 18, 18, {"T": f"{FLOAT} int32"}),
    ("ReduceMax ReduceMin", 18, 20, {"T": f"{FLOAT} {INDEX} int8 uint8"}),
    ("ReduceMean", 18, 18, {"T": f"{REAL} int32"}),
    ("ReduceSum", 13, 13, {"T": f"{REAL} {INDEX}"}),
    ("ArgMax ArgMin", 13, 13, {"T": FLOAT}),
    ("TopK", 11, 11, {"T": f"{FLOAT} {INDEX} int8 int16 uint8"}),
    ("TopK", 24, 24, {"T": f"{REAL} {INDEX} int8 int16 uint8"}),
    ("NonZero", 13, 13, {"T": f"{HALF} {INDEX} bool uint8"}),
    ("NonMaxSuppression", 11, 11, {}),
    # what moves tokens
    ("Gather GatherElements Slice", 13, 13, {"T": FIXED, "Tind": INDEX}),
    ("GatherND", 13, 13, {"T": f"{REAL} bool int64"}),
    ("ScatterElements", 18, 18, {"T": FIXED, "Tind": INDEX}),
    ("ScatterND Split", 18, 18, {"T": FIXED}),
    ("TensorScatter", 24, 24, {"T": FIXED}),
    ("Concat Expand", 13, 13, {"T": FIXED}),
    ("Compress", 11, 11, {"T": FIXED}),
    ("Flatten Squeeze Transpose Unsqueeze", 13, 25, {"T": FIXED}),
    ("Reshape", 14, 14, {"T": FIXED}),
    ("Reshape", 19, 25, {"T": f"{FIXED} {FLOAT8} float8e4m3fnuz float8e5m2fnuz"}),
    ("ReverseSequence", 10, 10, {"T": FIXED}),
    ("Tile", 13, 13, {"T": f"{REAL} {INDEX}"}),
    ("Trilu", 14, 14, {"T": FIXED}),
    ("Pad", 18, 25, {"T": f"{FLOAT} bool"}),
    # what makes tensors
    ("Cast", 13, 13, {"T1": FIXED, "T2": f"{FIXED} {FLOAT8} float4e2m1"}),
    ("Cast", 19, 25, {"T1": f"{FIXED} {FLOAT8}", "T2": f"{FIXED} {FLOAT8} float4e2m1"}),
    ("Cast", 23, 25, {"T1": "float4e2m1", "T2": "float32"}),
    ("Range", 11, 27, {"T": "float32 float64 int16 int32 int64"}),
    ("ConstantOfShape", 9, 25, {"T2": FIXED}),
    ("EyeLike", 9, 9, {"T1": f"float32 float64 {INDEX} uint64", "T2": f"float32 float64 {INDEX} uint64"}),
    ("OneHot", 11, 11, {"T1": "int32", "T2": "int32", "T3": HALF}),
    ("OneHot", 11, 11, {"T1": "int64", "T2": "int64", "T3": f"{HALF} int64"}),
    ("Dropout", 13, 13, {"T": REAL}),
    ("RandomNormal RandomUniform", 1, 1, {"T": FLOAT}),
    ("RandomNormal RandomUniform", 22, 22, {"T": REAL}),
    ("RandomNormalLike RandomUniformLike", 1, 1, {"T2": FLOAT}),
    ("RandomNormalLike RandomUniformLike", 22, 22, {"T2": REAL}),
    ("Shape", 15, 15, {"T": FIXED}),
    ("Shape", 19, 25, {"T": f"{FIXED} {FLOAT8} float8e4m3fnuz float8e5m2fnuz"}),
    ("Size", 13, 25, {"T": f"{FIXED} string"}),
    # control flow, sequences, quantization
    ("Identity If Loop Scan", 13, 25, {}),
    ("ConcatFromSequence SequenceAt SequenceConstruct SequenceEmpty SequenceErase", 11, 11, {}),
    ("SequenceInsert SequenceLength", 11, 11, {}),
    ("MatMulInteger", 10, 10, {"T1": "int8", "T2": "int8"}),
    ("DequantizeLinear", 13, 13, {"T": "int8 uint8"}),
    ("DequantizeLinear", 19, 19, {"T1": BYTES, "T2": HALF}),
    ("DequantizeLinear", 21, 25, {"T1": QUANTIZED, "T2": HALF}),
    ("QuantizeLinear", 13, 13, {"T1": "float32", "T2": "int8 uint8"}),
    ("QuantizeLinear", 19, 19, {"T1": HALF, "T2": BYTES}),
    ("QuantizeLinear", 21, 21, {"T1": HALF, "T2": QUANTIZED}),
    ("QuantizeLinear", 23, 25, {"T1": HALF, "T2": HALF, "T3": QUANTIZED}),
)

_CONTRIB: tuple[Row, ...] = (  # of com.microsoft, those that a denoiser can hold; T is the dtype of the first input
    ("Attention MultiHeadAttention RotaryEmbedding", 1, 1, {"T": f"{HALF} bfloat16"}),
    ("SkipLayerNormalization SkipSimplifiedLayerNormalization", 1, 1, {"T": f"{HALF} bfloat16"}),
    ("GroupQueryAttention", 1, 1, {"T": "bfloat16 float16"}),
    ("BiasAdd BiasSplitGelu GroupNorm NhwcConv PackedMultiHeadAttention SkipGroupNorm", 1, 1, {"T": HALF}),
    ("BiasGelu FastGelu FusedMatMul Gelu QuickGelu", 1, 1, {"T": REAL}),
    ("BiasSoftmax", 1, 1, {"T": FLOAT}),
    ("FusedConv GridSample", 1, 1, {"T": "float32"}),
)

_CPU: tuple[Row, ...] = (  # operators with a function body that the CPU provider takes whole, so nobody expands them
    ("AffineGrid", 20, 20, {"T1": "float32 float64"}),
    ("BlackmanWindow HammingWindow HannWindow", 17, 17, {}),
    ("Celu", 12, 12, {"T": "float32"}),
    ("Clip", 13, 13, {"T": f"{FLOAT} {BIG} int8 uint8"}),
    ("DepthToSpace SpaceToDepth", 13, 13, {"T": "float32 float64 int8 uint8"}),
    ("DynamicQuantizeLinear", 11, 11, {}),
    ("Elu Selu", 6, 22, {"T": "float32"}),
    ("GreaterOrEqual LessOrEqual", 16, 16, {"T": f"float32 float64 {BIG} int8 int16 uint8 uint16"}),
    ("MeanVarianceNormalization", 13, 13, {"T": "float32"}),
    ("ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceSumSquare", 18, 18, {"T": f"float32 float64 {INDEX}"}),
    ("Relu", 14, 14, {"T": "float32 float64 int8 int32"}),
    ("Shrink", 9, 9, {"T": NUMERIC}),
    ("ThresholdedRelu", 10, 22, {"T": "float32"}),
)

KERNELS: Mapping[str, Mapping[str, tuple[Kernel, ...]]] = {
    CUDA: {**_table("ai.onnx", _ONNX), **_table("com.microsoft", _CONTRIB)}
}
CLAIMED_BY_CPU: Mapping[str, tuple[Kernel, ...]] = _table("ai.onnx", _CPU)


def misfit(kernels: Iterable[Kernel], version: int, dtypes: Mapping[str, str]) -> str | None:
    """Return why none of ``kernels`` takes an operator of ``version`` with ``dtypes``, or None where one does.

    ``dtypes`` maps type variables and tensor names to dtype names; one that is missing is not checked.
    """
    kernels = tuple(kernels)
    if not kernels:
        return "no kernel in the table"
    fitting = [kernel for kernel in kernels if kernel.first <= version <= kernel.last]
    if not fitting:
        return f"no kernel for version {version} of the operator, only up to {max(kernel.last for kernel in kernels)}"
    misfits = []
    for kernel in fitting:
        wrong = [name for name, allowed in kernel.types.items() if dtypes.get(name, next(iter(allowed))) not in allowed]
        if not wrong:
            return None
        misfits.append(f"{dtypes[wrong[0]]} as {wrong[0]} (it may be {', '.join(sorted(kernel.types[wrong[0]]))})")
    return f"no kernel with {' or '.join(misfits)}"


def refusal(operator: str, dtypes: Mapping[str, str], attributes: Mapping[str, object]) -> str | None:
    """Return why a node with a kernel of the CUDA provider is not kept, or not to be relied on; None where it is.

    The provider drops ArgMax, ArgMin and ConvTranspose with these attributes (``GetCapability``, seen in 1.31.1).

    A scatter with a reduction got its CUDA kernels in 2024 (microsoft/onnxruntime#19198). That of ScatterElements took
    bfloat16 for float16 and integers for floats until #29879 in 2026, that of ScatterND throws at both; sums and
    products in float16 have no CPU kernel to fall back on. So float32 and float64 pass, and nothing else.
    """
    if operator in ("ai.onnx::ArgMax", "ai.onnx::ArgMin") and attributes.get("select_last_index", 0) != 0:
        return "the kernel has no select_last_index"
    if operator == "ai.onnx::ConvTranspose":
        pads = attributes.get("pads", [])
        if isinstance(pads, list) and pads[: len(pads) // 2] != pads[len(pads) // 2 :]:
            return f"the kernel pads both sides alike, not by pads={pads}"
        if attributes.get("auto_pad") in ("SAME_UPPER", "SAME_LOWER"):
            return f"the kernel has no auto_pad={attributes['auto_pad']}"
    if operator in ("ai.onnx::ScatterElements", "ai.onnx::ScatterND"):
        reduction, dtype = attributes.get("reduction", "none"), dtypes.get("T", "an unknown dtype")
        if reduction != "none" and dtype not in ("float32", "float64"):
            return f"reduction={reduction} in {dtype} is kept by some releases only; in float32 it is by all"
    return None
