"""The four models of the repository, as messages of Triton's `ModelConfig`.

    ensemble          text_input, max_tokens, sampling  ->  text_output; it only connects the other three
    preprocessing     text -> tokens             Python backend, `preprocessing.py`
    tensorrt_llm      tokens -> tokens           NVIDIA's C++ backend, in-flight batching, the engine
    postprocessing    tokens -> text             Python backend, `postprocessing.py`

Names, types and shapes of `tensorrt_llm` are those of NVIDIA's template (TensorRT-LLM 0.20 to 1.2,
triton_backend/all_models/inflight_batcher_llm/tensorrt_llm/config.pbtxt). The backend needs three of its parameters,
though they may be empty (model_instance_state.cc, getGuidedDecodingConfigFromParams). Absent parameters have a default.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from builders.serving.pbtxt import Message, Name, entries, parameters

INT32, FP32, BOOL, UINT64, STRING = (Name(f"TYPE_{kind}") for kind in ("INT32", "FP32", "BOOL", "UINT64", "STRING"))

# input of the ensemble -> (input of tensorrt_llm, type): one number each; only max_tokens is required
REQUEST: Mapping[str, tuple[str, Name]] = {
    "max_tokens": ("request_output_len", INT32),
    "temperature": ("temperature", FP32),
    "top_k": ("runtime_top_k", INT32),
    "top_p": ("runtime_top_p", FP32),
    "repetition_penalty": ("repetition_penalty", FP32),
    "presence_penalty": ("presence_penalty", FP32),
    "frequency_penalty": ("frequency_penalty", FP32),
    "min_tokens": ("min_tokens", INT32),
    "seed": ("seed", UINT64),
}
REQUIRED = "max_tokens"
TOKENS: Mapping[str, tuple[str, list[int]]] = {  # output of preprocessing -> (input of tensorrt_llm, shape); int32
    "INPUT_IDS": ("input_ids", [-1]),
    "INPUT_LENGTHS": ("input_lengths", [1]),
    "END_ID": ("end_id", [1]),
    "PAD_ID": ("pad_id", [1]),
    "STOP_WORDS": ("stop_words_list", [2, -1]),
}


@dataclass(frozen=True)
class Serving:
    """The settings of a server.

    engine, tokenizer: the folders' paths on the server. batch: the number of requests in one step. paged_context:
    whether prompts may be cut into pieces and reused, through the paged cache. memory: the share of the free GPU
    memory for the cache. instances: the number of instances of preprocessing and of postprocessing. window: the newest
    tokens that a token attends to; None for all.
    """

    engine: str
    tokenizer: str
    batch: int
    paged_context: bool
    memory: float = 0.9
    instances: int = 1
    window: int | None = None

    @property
    def reuses(self) -> bool:
        """Whether prompts are cut into pieces, and their cache is kept for others: not with a window, since its cache
        is a ring whose oldest places are overwritten (NVIDIA/TensorRT-LLM#2983)."""
        return self.paged_context and self.window is None


def ensemble(serving: Serving) -> Message:
    inputs = [_tensor("text_input", STRING, [1])]
    inputs += [_tensor(name, kind, [1], optional=name != REQUIRED) for name, (_, kind) in REQUEST.items()]
    steps = [
        _step("preprocessing", {"QUERY": "text_input"}, {name: f"_{name}" for name in TOKENS}),
        _step(
            "tensorrt_llm",
            {theirs: f"_{name}" for name, (theirs, _) in TOKENS.items()}
            | {theirs: name for name, (theirs, _) in REQUEST.items()},
            {"output_ids": "_TOKENS", "sequence_length": "_SEQUENCE_LENGTH"},
        ),
        _step(
            "postprocessing",
            {"TOKENS": "_TOKENS", "SEQUENCE_LENGTH": "_SEQUENCE_LENGTH"},
            {"OUTPUT": "text_output"},
        ),
    ]
    return {
        "name": "ensemble",
        "platform": "ensemble",
        "max_batch_size": serving.batch,
        "input": inputs,
        "output": [_tensor("text_output", STRING, [-1])],
        "ensemble_scheduling": {"step": steps},
    }


def preprocessing(serving: Serving) -> Message:
    outputs = [_tensor(name, INT32, shape) for name, (_, shape) in TOKENS.items()]
    return _python("preprocessing", serving, [_tensor("QUERY", STRING, [1])], outputs)


def tensorrt_llm(serving: Serving) -> Message:
    inputs = [_tensor("input_ids", INT32, [-1], ragged=True), _scalar("input_lengths", INT32, optional=False)]
    inputs += [_scalar(theirs, kind, optional=name != REQUIRED) for name, (theirs, kind) in REQUEST.items()]
    inputs += [_scalar("end_id", INT32), _scalar("pad_id", INT32)]
    inputs += [
        _tensor("stop_words_list", INT32, [2, -1], optional=True, ragged=True),
        _scalar("streaming", BOOL),
        _scalar("stop", BOOL),
        _scalar("return_log_probs", BOOL),
    ]
    outputs = [
        _tensor("output_ids", INT32, [-1, -1]),
        _tensor("sequence_length", INT32, [-1]),
        _tensor("cum_log_probs", FP32, [-1]),
        _tensor("output_log_probs", FP32, [-1, -1]),
        _tensor("context_logits", FP32, [-1, -1]),
        _tensor("generation_logits", FP32, [-1, -1, -1]),
    ]
    reuse = "true" if serving.reuses else "false"
    window = {} if serving.window is None else {"max_attention_window_size": str(serving.window)}
    return {
        "name": "tensorrt_llm",
        "backend": "tensorrtllm",
        "max_batch_size": serving.batch,
        "model_transaction_policy": {"decoupled": False},
        "dynamic_batching": _queue(serving),
        "input": inputs,
        "output": outputs,
        "instance_group": {"count": 1, "kind": Name("KIND_CPU")},  # the backend finds its GPUs itself
        "parameters": parameters(
            {
                "gpt_model_type": "inflight_fused_batching",
                "gpt_model_path": serving.engine,
                "batch_scheduler_policy": "guaranteed_no_evict",
                "max_beam_width": "1",
                "kv_cache_free_gpu_mem_fraction": f"{serving.memory:g}",
                "enable_kv_cache_reuse": reuse,
                "enable_chunked_context": reuse,
                **window,
                "exclude_input_in_output": "true",
                "tokenizer_dir": serving.tokenizer,
                "guided_decoding_backend": "",
                "xgrammar_tokenizer_info_path": "",
            }
        ),
    }


def postprocessing(serving: Serving) -> Message:
    inputs = [_tensor("TOKENS", INT32, [-1, -1]), _tensor("SEQUENCE_LENGTH", INT32, [-1])]
    return _python("postprocessing", serving, inputs, [_tensor("OUTPUT", STRING, [-1])])


def _python(name: str, serving: Serving, inputs: list[Message], outputs: list[Message]) -> Message:
    return {
        "name": name,
        "backend": "python",
        "max_batch_size": serving.batch,
        "dynamic_batching": _queue(serving),
        "input": inputs,
        "output": outputs,
        "instance_group": {"count": serving.instances, "kind": Name("KIND_CPU")},
        "parameters": parameters({"tokenizer_dir": serving.tokenizer}),
    }


def _queue(serving: Serving) -> Message:
    return {
        "preferred_batch_size": serving.batch,
        "max_queue_delay_microseconds": 0,
        "default_queue_policy": {"max_queue_size": 0},
    }


def _tensor(name: str, kind: Name, dims: list[int], *, optional: bool = False, ragged: bool = False) -> Message:
    found: Message = {"name": name, "data_type": kind, "dims": dims}
    found |= {"allow_ragged_batch": True} if ragged else {}
    return found | ({"optional": True} if optional else {})


def _scalar(name: str, kind: Name, *, optional: bool = True) -> Message:
    """A tensor with one number for each request; the backend sees the shape (batch,)."""
    return _tensor(name, kind, [1], optional=optional) | {"reshape": {}}


def _step(model: str, inputs: Mapping[str, str], outputs: Mapping[str, str]) -> Message:
    maps = {"input_map": entries(inputs), "output_map": entries(outputs)}
    return {"model_name": model, "model_version": -1, **maps}
