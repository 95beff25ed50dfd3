"""Graphs that break a rule, each with what the real compiler says to it; and graphs that break none."""

from __future__ import annotations

from dataclasses import dataclass

from builders.check.lint import NEWEST, Version
from tests.builders.check.lint.graphs import INPUTS, OUTPUTS, PRODUCT, K, W, X

FLOATS = INPUTS.replace("float", "float16"), OUTPUTS.replace("float", "float16")
HEADS = "[batch, 4, tokens, 64]"
QKV = f"float16{HEADS} q, float16[batch, 4, total, 64] k, float16[batch, 4, total, 64] v"
ATTENDED = f"float16{HEADS} y"
CACHE = "float16[batch, 4, {0}, 64] {1}k, float16[batch, 4, {0}, 64] {1}v"
IN_PLACE = "float16[batch, 4, 32, 64] p, float16[batch, 4, tokens, 64] u, int64[batch] i", "float16[batch, 4, 32, 64] o"
ROWS = f"float[tokens, {K}] x"
SCATTERED = f"{ROWS}, float[n, {K}] u, int64[n, 1] i", f"float[tokens, {K}] y"
IF = """m = ReduceMax <keepdims = 0> (x)  c = Greater(m, two)
        [f__If] y = If (c) <then_branch = a () => (o) { i = Constant <value_ints = [0]> ()
                j = Constant <value_ints = [1]> ()  o = Slice(x, i, j, j) },
                else_branch = b () => (p) { p = Relu(x) }>"""


@dataclass(frozen=True)
class Fault:
    """A graph that breaks a rule. compiler: its verdict; says: part of the message; also: rules broken with it."""

    rule: str
    body: str
    compiler: str
    says: str
    io: tuple[str, str] = (INPUTS, OUTPUTS)
    opset: int = 21
    tensorrt: Version = NEWEST
    also: tuple[str, ...] = ()


def act(between: str) -> str:
    """Something between the activation's DQ, xd, and the product, which reads h."""
    return f"{X} {between} {W} [layer__linear__MatMul] y = MatMul(h, wd)"


def weight(between: str, first: str = W) -> str:
    """Something between the weight's DQ, wd, and the product, which reads h."""
    return f"{X} {first} {between} [layer__linear__MatMul] y = MatMul(xd, h)"


FAULTS = {
    "no quantization": Fault("no-quantization", "y = MatMul(x, w_float)", "lost", "no matrix product is quantized"),
    "opset of the future": Fault(
        "opset", f"{X} {W} {PRODUCT}", "fine", "opset 26 is newer than TensorRT 11.4 knows (25)", opset=26
    ),
    "opset of the next version": Fault(
        "opset", f"{X} {W} {PRODUCT}", "fine", "opset 21 is newer than TensorRT 8.6 knows (17)", tensorrt=(8, 6)
    ),
    "bfloat16 before TensorRT 9": Fault(
        "bfloat16",
        f"h = Cast <to = 16> (x)  i = Cast <to = 1> (h) {X.replace('(x,', '(i,')} {W} {PRODUCT}",
        "fine",
        "TensorRT 8.6 has no BFLOAT16",
        opset=17,
        tensorrt=(8, 6),
    ),
    "contrib operator": Fault(
        "contrib-operator",
        f"{X} {W} [layer__linear__MatMul] h = MatMul(xd, wd) [layer__act__FastGelu] y = com.microsoft.FastGelu(h)",
        "refused",
        "com.microsoft.FastGelu is not standard ONNX",
    ),
    "dynamic quantization": Fault(
        "absent-operator",
        f"xq, xs, xz = DynamicQuantizeLinear(x)  xd = DequantizeLinear(xq, xs, xz) {W} {PRODUCT}",
        "refused",
        "TensorRT has no DynamicQuantizeLinear; divide each token by its largest magnitude",
        also=("scale-constant",),
    ),
    "integer product": Fault(
        "absent-operator",
        "xq = QuantizeLinear(x, s, z)  h = MatMulInteger(xq, w)  y = Cast <to = 1> (h)",
        "refused",
        "TensorRT has no MatMulInteger; write QuantizeLinear, DequantizeLinear and MatMul",
        also=("int8-constant", "no-quantization"),
    ),
    "NonZero": Fault(
        "absent-operator",
        "y = NonZero(i)",
        "refused",
        "TensorRT has no NonZero; gather by indices",
        ("int64[tokens] i", "int64[1, n] y"),
        also=("no-quantization",),
    ),
    "Compress": Fault(
        "absent-operator",
        "y = Compress <axis = 0> (x, i)",
        "refused",
        "TensorRT has no Compress",
        (f"{ROWS}, bool[tokens] i", f"float[n, {K}] y"),
        also=("no-quantization",),
    ),
    "new operator": Fault(
        "new-operator",
        f"h = RMSNormalization(x, smooth) {X.replace('(x,', '(h,')} {W} {PRODUCT}",
        "fine",
        "TensorRT 10.14 has no RMSNormalization, which came with 10.15",
        opset=23,
        tensorrt=(10, 14),
    ),
    **{
        f"ScatterND, {reduction}": Fault(
            "scatter-reduction",
            f'y = ScatterND <reduction = "{reduction}"> (x, i, u)',
            "refused",
            f"ScatterND with reduction={reduction}",
            SCATTERED,
            also=("no-quantization",),
        )
        for reduction in ("add", "mul", "max", "min")
    },
    "ScatterElements, add": Fault(
        "scatter-reduction",
        'y = ScatterElements <axis = 0, reduction = "add"> (x, i, u)',
        "refused",
        "ScatterElements with reduction=add",
        (SCATTERED[0].replace("int64[n, 1]", f"int64[n, {K}]"), SCATTERED[1]),
        also=("no-quantization",),
    ),
    "If": Fault("if-shapes", IF, "refused", "different shapes", (ROWS, f"float[n, {K}] y"), also=("no-quantization",)),
    "attention with a cache": Fault(
        "attention-cache",
        '[a__Attention] y, ok, ov = Attention(q, k, v, "", pk, pv)',
        "refused",
        "Attention with past and present",
        (f"{QKV.replace('total', 'tokens')}, {CACHE.format('past', 'p')}", f"{ATTENDED}, {CACHE.format('all', 'o')}"),
        opset=23,
        also=("no-quantization",),
    ),
    "attention with a softcap": Fault(
        "attention-cache",
        "[a__Attention] y = Attention <softcap = 5.0> (q, k, v)",
        "refused",
        "softcap",
        (QKV, ATTENDED),
        opset=23,
        also=("no-quantization",),
    ),
    "attention without a mask": Fault(
        "attention-padding",
        '[a__Attention] y = Attention(q, k, v, "", "", "", n)',
        "lost",  # that is: it builds. That the input is ignored, only a run would show
        "nonpad_kv_seqlen is ignored",
        (f"{QKV}, int64[batch] n", ATTENDED),
        opset=24,
        also=("no-quantization",),
    ),
    "attention in float": Fault(
        "attention-dtype",
        "[a__Attention] y = Attention(q, k, v)",
        "refused",
        "Attention in FLOAT",
        (QKV.replace("float16", "float"), ATTENDED.replace("float16", "float")),
        opset=23,
        also=("no-quantization",),
    ),
    "integers in place": Fault(
        "scatter-cache",
        "[a__TensorScatter] o = TensorScatter <axis = 2> (p, u, i)",
        "refused",
        "no integers in place",
        tuple(text.replace("float16", "int8") for text in IN_PLACE),
        opset=24,
        also=("no-quantization",),
    ),
    "a capacity that varies": Fault(
        "scatter-cache",
        "[a__TensorScatter] o = TensorScatter <axis = 2> (p, u, i)",
        "refused",
        "capacity of the cache is no number",
        tuple(text.replace("32", "past") for text in IN_PLACE),
        opset=24,
        also=("no-quantization",),
    ),
    "zero point of an activation": Fault(
        "zero-point",
        f"xq = QuantizeLinear(x, s, z_one)  xd = DequantizeLinear(xq, s, z_one) {W} {PRODUCT}",
        "refused",
        "zero point of QuantizeLinear is 1, not 0",
    ),
    "zero point of a weight": Fault(
        "zero-point",
        f"{X} wd = DequantizeLinear <axis = 1> (w, w_scale, z_n_one) {PRODUCT}",
        "refused",
        "zero point of DequantizeLinear is 1, not 0",
    ),
    "uint8 activation": Fault(
        "uint8",
        f"xq = QuantizeLinear(x, s, z_uint8)  xd = DequantizeLinear(xq, s, z_uint8) {W} {PRODUCT}",
        "fine",  # and wrong: uint8 cuts what is negative, int8 does not
        "it quantizes to uint8",
    ),
    "no zero point": Fault(
        "uint8",
        f"xq = QuantizeLinear(x, s)  xd = DequantizeLinear(xq, s) {W} {PRODUCT}",
        "fine",  # the same
        "without a zero point makes uint8",
    ),
    "uint8 weight": Fault(
        "uint8",
        f"{X} wd = DequantizeLinear <axis = 1> (w_uint8, w_scale, z_n_uint8) {PRODUCT}",
        "refused",
        "its constant is uint8",
        also=("zero-point",),
    ),
    **{
        f"weight scale {value}": Fault(
            "scale-positive",
            f"{X} wd = DequantizeLinear <axis = 1> (w, w_scale_{value}) {PRODUCT}",
            "fine" if value == "inf" else "refused",
            f"the scale w_scale_{value} holds {shown}",
        )
        for value, shown in (("zero", 0), ("negative", -0.01), ("nan", "nan"), ("inf", "infinity"))
    },
    "activation scale zero": Fault(
        "scale-positive",
        f"xq = QuantizeLinear(x, s_zero, z)  xd = DequantizeLinear(xq, s_zero, z) {W} {PRODUCT}",
        "refused",
        "the scale s_zero holds 0, in 1 of 1 channels; clamp",
    ),
    "axis unwritten": Fault(
        "axis", f"{X} wd = DequantizeLinear(w, w_scale) {PRODUCT}", "fine", "no axis: TensorRT before 10.2"
    ),
    "axis unwritten, for an old version": Fault(
        "axis",
        f"{X} wd = DequantizeLinear(w, w_scale) {PRODUCT}",
        "fine",
        "write the attribute axis",
        opset=17,
        tensorrt=(8, 6),
    ),
    "block scales": Fault(
        "block-scale",
        f"{X} wd = DequantizeLinear <axis = 0, block_size = 32> (w, w_scale_block) {PRODUCT}",
        "refused",
        "a scale for every 32 values",
        also=("scale-along-k",),
    ),
    **{
        f"int8 into {kind}": Fault(
            "int8-constant",
            f"{X} h = {node} wd = DequantizeLinear <axis = 1> (h, w_scale) {PRODUCT}",
            "refused",
            f"goes into {kind}; only DequantizeLinear may read it",
        )
        for kind, node in {
            "Transpose": "Transpose <perm = [1, 0]> (w_t)",
            "Gather": "Gather <axis = 1> (w, every_n)",
            "Reshape": "Reshape(w, shape)",
            "Identity": "Identity(w)",
        }.items()
    },
    "int8 cast, not dequantized": Fault(
        "int8-constant",
        f"{X} h = Cast <to = 1> (w)  wd = Mul(h, w_scale) {PRODUCT}",
        "refused",
        "goes into Cast",
        also=("no-quantization",),
    ),
    "float weight": Fault(
        "float-weight",
        f"""{X} wq = QuantizeLinear <axis = 1> (w_float, w_scale, z_n)
            wd = DequantizeLinear <axis = 1> (wq, w_scale, z_n) {PRODUCT}""",
        "fine",
        "the weight w_float is stored as floats",
    ),
    "float activation": Fault(
        "float-activation", f"{W} [layer__linear__MatMul] y = MatMul(x, wd)", "lost", "its input is not quantized"
    ),
    "smoothing behind the quantization": Fault(
        "between",
        act("h = Mul(xd, smooth)"),
        "lost",
        "Mul stands between DequantizeLinear and the product, on its quant",
    ),
    "smoothing of a weight behind the quantization": Fault(
        "between", weight("h = Mul(wd, smooth_column)"), "lost", "on its int8 weight; apply it to the weight before"
    ),
    **{
        f"{kind} behind an activation": Fault("between", act(node), "lost", f"{kind} stands between")
        for kind, node in {"Add": "h = Add(xd, smooth)", "Relu": "h = Relu(xd)"}.items()
    },
    "Gather behind a weight": Fault(
        "between", weight("h = Gather <axis = 1> (wd, every_n)"), "lost", "Gather stands between"
    ),
    "Relu behind a weight": Fault("between", weight("h = Relu(wd)"), "lost", "Relu stands between"),
    "Concat behind a weight": Fault(
        "between",
        f"""{X} {W} h = Concat <axis = 1> (wd, wd)
            [layer__linear__MatMul] d = MatMul(xd, h)  y = Slice(d, zero, n, last)""",
        "refused",
        "Concat stands between",
        also=("shared-weight",),
    ),
    "scale along K": Fault(
        "scale-along-k",
        f"{X} wd = DequantizeLinear <axis = 0> (w, w_scale_k) {PRODUCT}",
        "lost",
        "a scale for every input channel (axis 0)",
    ),
    "scale along K of a transposed weight": Fault(
        "scale-along-k",
        weight("h = Transpose <perm = [1, 0]> (wd)", "wd = DequantizeLinear <axis = 1> (w_t, w_scale_k)"),
        "lost",
        "a scale for every input channel (axis 1), not for every output channel; quantize along axis 0",
    ),
    "activation scale per channel": Fault(
        "scale-per-channel",
        f"xq = QuantizeLinear <axis = 2> (x, s_k, z_k)  xd = DequantizeLinear <axis = 2> (xq, s_k, z_k) {W} {PRODUCT}",
        "lost",
        "its input has a scale for every channel",
    ),
    "scale at run time": Fault(
        "scale-constant",
        f"""m = ReduceMax <keepdims = 0> (x)
            xq = QuantizeLinear(x, m, z)  xd = DequantizeLinear(xq, m, z) {W} {PRODUCT}""",
        "lost",
        "the scale of its input is computed at run time; divide each token",
    ),
    "half scales": Fault(
        "scale-dtype",
        """xq = QuantizeLinear(x, s_16, z)  xd = DequantizeLinear(xq, s_16, z)
           wd = DequantizeLinear <axis = 1> (w, w_scale_16) [layer__linear__MatMul] y = MatMul(xd, wd)""",
        "fine",  # whether it overflows, only a run would show
        "the scale w_scale_16 is FLOAT16",
        FLOATS,
    ),
    "shared weight": Fault(
        "shared-weight",
        f"""{X} {W} [layer__linear__MatMul] a = MatMul(xd, wd)
            r = Relu(x)  rq = QuantizeLinear(r, s, z)  rd = DequantizeLinear(rq, s, z)
            [layer__other__MatMul] b = MatMul(rd, wd)  y = Add(a, b)""",
        "fine",
        "DequantizeLinear of its weight is read by 2 nodes",
    ),
}

FINE = {
    "plain": f"{X} {W} {PRODUCT}",
    "a scale per tensor": f"{X} wd = DequantizeLinear(w, w_scale_one) {PRODUCT}",
    "an axis from the end": f"{X} wd = DequantizeLinear <axis = -1> (w, w_scale) {PRODUCT}",
    "a bias": f"{X} {W} [layer__linear__MatMul] h = MatMul(xd, wd)  y = Add(h, bias)",
    "scales computed from constants": f"""{X} h = Mul(w_scale, two)
        wd = DequantizeLinear <axis = 1> (w, h) {PRODUCT}""",
    "a scale by a Constant node": f"""c = Constant <value_float = 0.05> ()
        xq = QuantizeLinear(x, c, z)  xd = DequantizeLinear(xq, c, z) {W} {PRODUCT}""",
    "int8 by an attribute": f"""xq = QuantizeLinear <output_dtype = 3> (x, s)  xd = DequantizeLinear(xq, s)
        {W} {PRODUCT}""",
    "a transposed weight": weight(
        "h = Transpose <perm = [1, 0]> (wd)", "wd = DequantizeLinear <axis = 0> (w_t, w_scale)"
    ),
    "Gemm": f"""h = Reshape(x, flat) {X.replace("(x,", "(h,")} wd = DequantizeLinear <axis = 0> (w_t, w_scale)
        [layer__linear__Gemm] g = Gemm <transB = 1> (xd, wd, bias)  y = Unsqueeze(g, zero)""",
    "the weight on the left": """h = Transpose <perm = [0, 2, 1]> (x)
        xq = QuantizeLinear(h, s, z)  xd = DequantizeLinear(xq, s, z)
        wd = DequantizeLinear <axis = 0> (w_t, w_scale)
        [layer__linear__MatMul] t = MatMul(wd, xd)  y = Transpose <perm = [0, 2, 1]> (t)""",
    "two products of one input": f"""{X} {W} [layer__linear__MatMul] a = MatMul(xd, wd)
        vd = DequantizeLinear <axis = 1> (w_other, w_scale)
        [layer__other__MatMul] b = MatMul(xd, vd)  y = Add(a, b)""",
    "a function of the file's own": f"h = local.twice(x) {X.replace('(x,', '(h,')} {W} {PRODUCT}",
    **{
        f"activation: {node.split('=')[1].strip()}": act(node)
        for node in (
            "h = Identity(xd)",
            "h = Mul(xd, two)",
            "h = Div(xd, two)",
            "h = Slice(xd, zero, k, last)",
            "h = Gather <axis = 2> (xd, every_k)",
            "h = Concat <axis = 1> (xd, xd)",
            "h = Expand(xd, ones)",
        )
    },
    **{
        f"weight: {node.split('=')[1].strip()}": weight(node)
        for node in (
            "h = Identity(wd)",
            "h = Reshape(wd, shape)",
            "h = Slice(wd, zero, n, one)",
            "h = Unsqueeze(wd, zero)",
            "h = Mul(wd, two)",
            "h = Mul(wd, per_output)",
        )
    },
}
