"""The table's part on TensorRT Edge-LLM 0.11.0. Its files are named as they lie in the wheel, under tensorrt_edgellm/.

Its exporter has classes of its own for a few architectures (model.py: _MODEL_REGISTRY, filled by _export_api.py), and
gives every other model its `CausalLM` (models/default/modeling_default.py), which is a Llama with biases, norms of each
head (Qwen3) and split matrices (Phi-3). Tensors that this has no name for are passed over (checkpoint/loader.py).
"""

from __future__ import annotations

from functools import partial

from builders.readers.devices import ANY, ANY_CPU, gpus
from builders.readers.statement import Outcome, Statement

_edge_llm = partial(Statement, "edge-llm", "modelopt")
AS_A_LLAMA = "it takes the model for a Llama, without a word"
EDGE_LLM = (
    _edge_llm(
        ANY,
        Outcome.REFUSED,
        "Edge-LLM has no INT8 linear for its experts",
        "models/qwen3_moe: experts are packed as INT4",
        model_types=("qwen3_moe",),
        do="export w8a8 for vLLM",
        said="'INT8SQLinear' object has no attribute 'qweight'",
    ),
    _edge_llm(
        ANY,
        Outcome.REFUSED,
        "Edge-LLM has no Mixtral",
        "model.py: AutoModel.from_pretrained",
        model_types=("mixtral",),
        do="export w8a8 for vLLM",
        said="float() argument must be a string or a real number, not 'NoneType'",
    ),
    _edge_llm(
        ANY,
        Outcome.REFUSED,
        "Edge-LLM has no BLOOM",
        "config.py: ModelConfig.from_pretrained",
        model_types=("bloom",),
        do="export w8a8 for vLLM",
        said="'num_attention_heads'",
    ),
    _edge_llm(
        ANY,
        Outcome.WRONG,
        f"{AS_A_LLAMA}, finds none of its tensors, and exports zeros",
        "model.py: AutoModel.from_pretrained; checkpoint/loader.py: load_weights",
        model_types=("falcon", "opt"),
        do="export w8a8 for vLLM",
    ),
    _edge_llm(
        ANY,
        Outcome.WRONG,
        f"{AS_A_LLAMA}: norms, caps or multipliers are left out",
        "model.py: AutoModel.from_pretrained; models/default/modeling_default.py",
        model_types=("gemma2", "gemma3_text", "granite", "olmo2"),
        do="export w8a8 for vLLM",
    ),
    _edge_llm(
        ANY,
        Outcome.WRONG,
        "it leaves the sliding window out, or puts it into every layer, so longer sequences come out otherwise",
        "config.py: ModelConfig.from_pretrained (sliding_window_size)",
        window=True,
        do="export w8a8 for vLLM; for sequences within the window, write sliding_window: null into config.json",
    ),
    _edge_llm(
        gpus(0, 79),
        Outcome.REFUSED,
        "Edge-LLM's plugins want compute capability 8.0",
        "_native/payloads",
        do="export w8a8 for vLLM, which takes 7.5",
    ),
    _edge_llm(
        gpus(89, 90),
        Outcome.UNKNOWN,
        "Edge-LLM's wheel has plugins for compute capability 8.0, 8.6, 10.0 and 12.0 alone",
        "_native/payloads",
        do="build its plugins from source, or export w8a8 for vLLM",
    ),
    _edge_llm(
        gpus(80),
        Outcome.AS_WRITTEN,
        "its graph holds our int8 matrices and scales, with Q/DQ around every product, which TensorRT compiles",
        "models/linear.py: INT8SQLinear",
        kernel="TensorRT's INT8 GEMM",
        do="tensorrt-edgellm-export FOLDER OUT; the tokenizer must have a chat template",
    ),
    _edge_llm(
        ANY_CPU,
        Outcome.AS_WRITTEN,
        "its exporter runs here: the graph holds our int8 matrices and scales; its engines need a GPU",
        "models/linear.py: INT8SQLinear",
        kernel="none: a graph for TensorRT",
        do="tensorrt-edgellm-export FOLDER OUT; the tokenizer must have a chat template",
    ),
)
