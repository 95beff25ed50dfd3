"""The table: who reads what, and as what. The first statement that holds decides.

A statement says where it is known from: a file of the reader, or a test of ours that runs it. Which statements a
server has confirmed is in runs.json, that `python -m tests.servers` writes.
"""

from __future__ import annotations

from functools import partial

from builders.readers.devices import ANY, ANY_CPU, ANY_GPU, NO_AMX, WITH_AMX, gpus
from builders.readers.edge_llm import EDGE_LLM
from builders.readers.statement import Outcome, Statement

PER_TOKEN = ("per-token",)
PER_TENSOR = ("per-tensor",)
INT8 = PER_TOKEN + PER_TENSOR
FP8_CARD = "serve the float model in FP8 on this GPU"


_vllm = partial(Statement, "vllm")
_w8a8 = partial(_vllm, "compressed-tensors")
VLLM = (
    _w8a8(
        ANY,
        Outcome.REFUSED,
        "vLLM computes experts in INT8 with one scale per token only",
        "model_executor/layers/quantization/compressed_tensors/compressed_tensors_moe/compressed_tensors_moe.py",
        activations=PER_TENSOR,
        experts=True,
        do="export with --act per-token",
        said="Unsupported FusedMoe scheme",
    ),
    _w8a8(
        ANY,
        Outcome.REFUSED,
        "vLLM's loader of BLOOM cuts query_key_value into heads, its one input_scale too, and fails",
        "model_executor/models/bloom.py: load_weights",
        activations=PER_TENSOR,
        model_types=("bloom",),
        do="export with --act per-token",
        said="is invalid for input of size 1",
    ),
    *(
        _vllm(
            form,
            ANY,
            Outcome.REFUSED,
            "vLLM's Qwen2 has windows in every layer or in none",
            "model_executor/models/qwen2.py",
            model_types=("qwen2",),
            window=True,
            do="for sequences within the window, write use_sliding_window: false into config.json",
            said="Sliding window for some but all layers is not supported",
        )
        for form in ("compressed-tensors", "float")
    ),
    _w8a8(
        gpus(0, 74),
        Outcome.REFUSED,
        "vLLM's INT8 needs compute capability 7.5",
        "model_executor/layers/quantization/compressed_tensors/schemes/compressed_tensors_w8a8_int8.py",
        do="serve it on a T4 or anything later up to H200",
    ),
    _w8a8(
        gpus(100),
        Outcome.REFUSED,
        "vLLM chooses CUTLASS, which has no INT8 kernel for Blackwell",
        "model_executor/kernels/linear/scaled_mm/cutlass.py; github.com/vllm-project/vllm/issues/54311",
        do=FP8_CARD,
        said="Int8 not supported on SM",
    ),
    _w8a8(
        gpus(75, 99),
        Outcome.AS_WRITTEN,
        "vLLM multiplies integers with the scales of the folder",
        "model_executor/layers/fused_moe/oracle/int8.py",
        experts=True,
        kernel="CutlassInt8ScaledMMLinearKernel, experts: TritonExperts",
    ),
    _w8a8(
        gpus(75, 99),
        Outcome.AS_WRITTEN,
        "vLLM multiplies integers with the scales of the folder",
        "model_executor/kernels/linear/scaled_mm/cutlass.py",
        kernel="CutlassInt8ScaledMMLinearKernel",
    ),
    _w8a8(
        NO_AMX,
        Outcome.REFUSED,
        "vLLM has no INT8 experts for a processor without AMX",
        "model_executor/layers/fused_moe/oracle/int8.py",
        experts=True,
        do="serve it on a GPU, or on a processor with AMX",
        said="No Int8 MoE backend supports",
    ),
    _w8a8(
        WITH_AMX,
        Outcome.OTHERWISE,
        "vLLM ignores input_scale and takes one scale per token, without a word",
        "model_executor/kernels/linear/scaled_mm/cpu.py: process_weights_for_sgl",
        activations=PER_TENSOR,
        kernel="CPUInt8ScaledMMLinearKernel",
        do="export with --act per-token, which is what is computed",
    ),
    _w8a8(
        ANY_CPU,
        Outcome.AS_WRITTEN,
        "vLLM multiplies integers with the scales of the folder",
        "model_executor/kernels/linear/scaled_mm/cpu.py",
        kernel="CPUInt8ScaledMMLinearKernel",
    ),
    _vllm(
        "modelopt",
        ANY,
        Outcome.REFUSED,
        "vLLM knows W8A8_SQ_PER_CHANNEL of no ModelOpt folder",
        "model_executor/layers/quantization/modelopt.py: QUANT_ALGOS",
        do="smoothquant convert FOLDER --to compressed-tensors",
        said="ModelOpt currently only supports",
    ),
    _vllm("float", ANY, Outcome.AS_WRITTEN, "vLLM serves it in float: an ordinary model", "", kernel="float"),
)

_sglang = partial(Statement, "sglang", "compressed-tensors")
SGLANG = (
    _sglang(
        ANY,
        Outcome.REFUSED,
        "SGLang has INT8 experts for NPUs only",
        "srt/layers/quantization/compressed_tensors/compressed_tensors.py",
        experts=True,
        do="vLLM serves it on GPUs of 7.5 to 9.0",
        said="The W8A8Int8 Fused MoE scheme is implemented only for NPU for now.",
    ),
    _sglang(
        ANY,
        Outcome.REFUSED,
        "SGLang has room for one input_scale where q, k and v bring three, and fails",
        "srt/layers/parameter.py: PerTensorScaleParameter",
        activations=PER_TENSOR,
        do="export with --act per-token",
        said="index 1 is out of bounds for dimension 0 with size 1",
    ),
    _sglang(
        ANY_CPU,
        Outcome.REFUSED,
        "SGLang multiplies int8 by a kernel of its CUDA package alone",
        "srt/layers/quantization/compressed_tensors/schemes/compressed_tensors_w8a8_int8.py",
        do="vLLM serves it on a CPU",
    ),
    _sglang(
        gpus(0, 79),
        Outcome.REFUSED,
        "SGLang's INT8 needs compute capability 8.0",
        "srt/layers/quantization/compressed_tensors/schemes/compressed_tensors_w8a8_int8.py",
        do="vLLM takes 7.5",
    ),
    _sglang(
        gpus(91),
        Outcome.REFUSED,
        "SGLang has no INT8 kernel for Blackwell",
        "sgl-kernel/csrc/gemm/int8_gemm_kernel.cu",
        do=FP8_CARD,
        said="No implemented int8_scaled_mm for current compute capability",
    ),
    _sglang(
        gpus(80, 90),
        Outcome.AS_WRITTEN,
        "SGLang multiplies integers with the weight scales of the folder, one scale per token",
        "srt/layers/quantization/compressed_tensors/schemes/compressed_tensors_w8a8_int8.py: apply_weights",
        kernel="sgl_kernel.int8_scaled_mm",
    ),
    Statement(
        "sglang",
        "float",
        ANY_GPU,
        Outcome.AS_WRITTEN,
        "SGLang serves it in float: an ordinary model",
        "srt/models/",
        kernel="float",
    ),
)

_engines = partial(Statement, "engines", "TensorRT-LLM checkpoint")
_pytorch = partial(Statement, "pytorch")
TENSORRT_LLM = (
    _engines(
        gpus(80, 90),
        Outcome.AS_WRITTEN,
        "trtllm-build makes an engine of it, with the SmoothQuant plugins; 1.3 and later build none",
        "tensorrt_llm/quantization/layers.py, up to 1.2.1",
        kernel="SmoothQuantGemm plugin",
        do="smoothquant build tensorrt-llm, in its container",
    ),
    _pytorch(
        "TensorRT-LLM checkpoint",
        ANY,
        Outcome.REFUSED,
        "the engine backend is gone from TensorRT-LLM 1.3",
        "github.com/NVIDIA/TensorRT-LLM/pull/15763, 15767, 15907, 15918, 16369",
        do="use TensorRT-LLM 1.2.1",
    ),
    _pytorch(
        "compressed-tensors",
        ANY,
        Outcome.WRONG,
        "it takes int8 for FP8, since it never looks at the type, and rounds every weight to e4m3",
        "tensorrt_llm/models/quant_config_utils.py: _quant_config_from_config_group",
        activations=PER_TOKEN,
        kernel="FP8",
        do="never serve this folder with it; vLLM reads it as written",
    ),
    _pytorch(
        "compressed-tensors",
        ANY,
        Outcome.REFUSED,
        "it wants one scale per token of 8-bit channels",
        "tensorrt_llm/models/quant_config_utils.py: _quant_config_from_config_group",
        activations=PER_TENSOR,
        do="serve it with vLLM",
        said="Unsupported inputs_quant_strategy: tensor",
    ),
    _pytorch(
        "modelopt",
        ANY,
        Outcome.REFUSED,
        "it knows the name W8A8_SQ_PER_CHANNEL, and has no linear for it",
        "tensorrt_llm/_torch/modules/linear.py: get_quant_method",
        do="serve the folder of smoothquant export w8a8 with vLLM",
        said="unsupported quant mode",
    ),
)

_transformers = partial(Statement, "transformers")
TRANSFORMERS = (
    _transformers(
        "compressed-tensors",
        ANY,
        Outcome.OTHERWISE,
        "transformers multiplies the rounded numbers in float, with token_scale = token_amax / 127.5 (ours: / 127)",
        "tests/families",
        activations=PER_TOKEN,
        kernel="float",
        do="good for accuracy, of no use for speed",
    ),
    _transformers(
        "compressed-tensors",
        ANY,
        Outcome.AS_WRITTEN,
        "transformers multiplies the rounded numbers in float",
        "tests/families",
        activations=PER_TENSOR,
        kernel="float",
        do="good for accuracy, of no use for speed",
    ),
    _transformers("float", ANY, Outcome.AS_WRITTEN, "it is an ordinary model", "tests/families", kernel="float"),
)

_onnxruntime = partial(Statement, "onnxruntime", "ONNX")
ONNX = (
    _onnxruntime(
        ANY_CPU,
        Outcome.AS_WRITTEN,
        "ONNX Runtime makes one integer kernel of every quantized product",
        "tests/exporters/onnx",
        activations=INT8,
        kernel="MatMulIntegerToFloat",
    ),
    _onnxruntime(
        gpus(75),
        Outcome.OTHERWISE,
        "its CUDA provider multiplies the rounded numbers in float; its TensorRT provider has INT8 kernels",
        "onnxruntime/core/providers/cuda",
        activations=INT8,
        kernel="float",
        do="smoothquant build tensorrt, or build onnxruntime --provider tensorrt",
    ),
    _onnxruntime(
        ANY, Outcome.AS_WRITTEN, "it is a float graph", "tests/exporters/onnx", activations=("float",), kernel="float"
    ),
    Statement(
        "genai",
        "ONNX",
        ANY_CPU,
        Outcome.AS_WRITTEN,
        "onnxruntime-genai runs the engine folder in ONNX Runtime",
        "tests/builders/onnxruntime/test_generate.py",
        kernel="MatMulIntegerToFloat",
    ),
    Statement(
        "openvino",
        "ONNX",
        ANY_CPU,
        Outcome.AS_WRITTEN,
        "OpenVINO makes one integer kernel of every quantized product (exact with VNNI or AMX; the build finds out)",
        "tests/builders/openvino",
        activations=INT8,
        kernel="FullyConnected, i8",
        do="smoothquant build openvino",
    ),
    Statement(
        "openvino",
        "ONNX",
        ANY_CPU,
        Outcome.AS_WRITTEN,
        "it is a float graph",
        "tests/builders/openvino",
        activations=("float",),
        kernel="float",
        do="smoothquant build openvino",
    ),
)

STATEMENTS: tuple[Statement, ...] = VLLM + SGLANG + TENSORRT_LLM + EDGE_LLM + TRANSFORMERS + ONNX
