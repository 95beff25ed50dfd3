"""A Llama in llama.cpp with weights in Q8_0: its file, and its server inside this process (the package xllamacpp).

Q8_0 has a float16 scale for 32 weights of a row; activations are rounded to the same form while it runs. The cache is
in float16. Rows of q and k are stored in the order of llama.cpp's rotary embedding, pairs next to each other.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import zip_longest
from pathlib import Path
from statistics import mean

import numpy
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.benchmarks.peers.loop import PeerEngine, Rows, UnderWay

FILE = "model.gguf"
SHOWN = 32  # of so many positions one is asked for its logits: each is a request
SLOTS, LONGEST = 16, 2048
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def write_q8_0(model: Path, out: Path) -> None:
    """Write `out/model.gguf` of a Llama."""
    import gguf

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    config, tensors = loaded.config, loaded.state_dict()
    out.mkdir()
    writer = gguf.GGUFWriter(out / FILE, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    writer.add_tokenizer_model("llama")  # prompts are token ids: no text is read
    writer.add_token_list([f"<{number}>" for number in range(config.vocab_size)])
    writer.add_token_scores([0.0] * config.vocab_size)
    writer.add_token_types([gguf.TokenType.NORMAL] * config.vocab_size)
    for name, tensor in tensors.items():
        stored = gguf_name(name)
        if stored == "output.weight" and config.tie_word_embeddings:
            continue
        heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads}.get(stored[-8:-7], 0)
        if heads and ".attn_" in stored and tensor.ndim == 2:
            tensor = in_pairs(tensor, heads)
        if tensor.ndim == 1:
            writer.add_tensor(stored, tensor.numpy())
        else:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(stored, gguf.quants.quantize(tensor.contiguous().numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (out / "config.json").write_bytes((model / "config.json").read_bytes())


def gguf_name(name: str) -> str:
    """The name of a tensor in llama.cpp's files. name: in transformers."""
    if name.startswith("model.layers."):
        _, _, layer, rest = name.split(".", 3)
        return f"blk.{layer}.{NAMES[rest.removesuffix('.weight')]}.weight"
    return {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }[name]


def in_pairs(weight: Tensor, heads: int) -> Tensor:
    """Rows of each head, halves interleaved. weight: (heads * channels, in)."""
    channels = weight.shape[0] // heads
    return weight.view(heads, 2, channels // 2, -1).transpose(1, 2).reshape(weight.shape)


class LlamaCpp(PeerEngine):
    """llama.cpp's server with a slot for each sequence, without HTTP."""

    def __init__(self, folder: Path, threads: int) -> None:
        import xllamacpp

        self.vocabulary = json.loads((folder / "config.json").read_text(encoding="utf-8"))["vocab_size"]
        wanted = xllamacpp.CommonParams()
        wanted.model.path = str(folder / FILE)
        wanted.n_ctx, wanted.n_parallel = SLOTS * 1280, SLOTS
        wanted.cpuparams.n_threads = wanted.cpuparams_batch.n_threads = threads
        wanted.cpuparams.poll = wanted.cpuparams_batch.poll = 0  # threads that wait do not spin
        wanted.verbosity, wanted.warmup, wanted.cache_ram_mib = 0, False, 0
        self.server, self._pool = xllamacpp.Server(wanted), ThreadPoolExecutor(SLOTS)

    def start(self, rows: Rows) -> UnderWay:
        raise NotImplementedError("a request cannot wait: both times are taken another way")

    def prompt_seconds(self, rows: Rows) -> float:
        begin = time.perf_counter()
        self._ask(rows, 1)
        return time.perf_counter() - begin

    def step_seconds(self, rows: Rows, steps: int) -> float:
        """By the server's own timings, of requests that run side by side.

        Prompts are read first, each in a slot of its own: while the server reads one, the steps of others wait for it.
        """
        places: list[dict[str, object]] = [{"id_slot": number, "cache_prompt": True} for number in range(len(rows))]
        self._ask(rows, 1, places)
        answers = self._ask(rows, steps + 1, places)
        return mean(answer["timings"]["predicted_ms"] for answer in answers) / steps / 1e3

    def logits(self, ids: numpy.ndarray) -> numpy.ndarray:
        """One request for each position that is shown."""
        found = numpy.full((*ids.shape, self.vocabulary), numpy.nan, numpy.float32)
        for number, row in enumerate(ids.tolist()):
            for position in range(SHOWN - 1, len(row), SHOWN):
                shows = {"n_probs": self.vocabulary, "cache_prompt": True, "id_slot": 0}
                [answer] = self._ask([row[: position + 1]], 1, [shows])
                [told] = answer["choices"][0]["logprobs"]["content"]
                shown = {one["id"]: one["logprob"] for one in told["top_logprobs"]}
                lowest = min((value for value in shown.values() if math.isfinite(value)), default=0.0)
                values = [max(shown.get(token, lowest), lowest) for token in range(self.vocabulary)]
                found[number, position] = values
        return found

    def _ask(self, rows: Rows, tokens: int, options: Sequence[Mapping[str, object]] = ()) -> list[dict]:
        """The answers to requests side by side. options: of each, if any."""
        asked = {"n_predict": tokens, "ignore_eos": True, "cache_prompt": False, "temperature": 0.0}
        requests = [
            self._pool.submit(self.server.handle_completions, {"prompt": row, **asked, **(own or {})})
            for row, own in zip_longest(rows, options)
        ]
        return [request.result() for request in requests]
