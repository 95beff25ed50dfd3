"""The `trtllm-build` command for a checkpoint, and the container that has the tool.

gemm_plugin auto                cuBLASLt computes the one product that is not INT8, lm_head
context_fmha, paged cache       in-flight batching needs both
use_paged_context_fmha          computes prompts out of the cache: in pieces, or reused. None of its kernels reads an
                                INT8 cache. The cache of a sliding window was a ring (NVIDIA/TensorRT-LLM#2983, #6768):
                                what a later piece needs may be overwritten. Both compute prompts in one piece
reduce_fusion, use_fused_mlp,   no SmoothQuant layer has these fusions, so they are off in every version
norm_quant_fusion
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from builders.tensorrt_llm.format.architectures import LEARNED, ROPE
from builders.tensorrt_llm.format.config import CheckpointConfig
from smoothquant.errors import UserError

TOOL = "trtllm-build"
CONTAINER = "smoothquant-tensorrt-llm"  # docker/tensorrt-llm
INT8 = "INT8"  # kv_cache_quant_algo
MOST_TOKENS = 8192  # the default number of tokens in one step, over all prompts


@dataclass(frozen=True)
class BuildLimits:
    """The largest sizes that an engine takes. None stands for a number that follows from the model.

    max_batch_size: the sequences in one step. max_input_len: the tokens of a prompt. max_seq_len: the tokens of prompt
    and answer. max_num_tokens: the tokens of all sequences in one step. workers: the ranks that are built at the same
    time, each on a GPU.
    """

    max_batch_size: int = 32
    max_input_len: int | None = None
    max_seq_len: int | None = None
    max_num_tokens: int | None = None
    workers: int = 1

    def resolved(self, config: CheckpointConfig) -> BuildLimits:
        """The same limits with every number known. Raises UserError if they contradict each other or the model."""
        for name, value in asdict(self).items():
            if value is not None and value < 1:
                raise UserError(f"{_option(name)} {value}", expected="a positive number")
        longest = self.max_seq_len or config.max_positions
        if longest is None:
            raise UserError("the checkpoint does not say how long its context is", do="give --max-seq-len")
        if config.positions == LEARNED and config.max_positions and longest > config.max_positions:
            raise UserError(
                f"--max-seq-len {longest}", expected=f"at most {config.max_positions}, the model's learned positions"
            )
        prompt = self.max_input_len or longest
        if prompt > longest:
            raise UserError(f"--max-input-len {prompt}", expected=f"at most --max-seq-len, {longest}")
        whole = 0 if paged_context(config, longest) else prompt  # the tokens that must be computed in one piece
        tokens = self.max_num_tokens or max(MOST_TOKENS, self.max_batch_size, whole)
        if tokens < self.max_batch_size:
            raise UserError(
                f"--max-num-tokens {tokens}",
                expected=f"at least --max-batch-size, {self.max_batch_size}: each sequence's next token",
            )
        if tokens < whole:
            raise UserError(
                f"--max-num-tokens {tokens}",
                expected=f"at least --max-input-len, {prompt}: {_in_one_piece(config)}",
            )
        return replace(self, max_input_len=prompt, max_seq_len=longest, max_num_tokens=tokens)


def doubts(limits: BuildLimits, config: CheckpointConfig) -> list[str]:
    """Doubts about limits, one sentence each. limits: resolved ones."""
    found, longest, tokens = [], limits.max_seq_len or 0, limits.max_num_tokens or 0
    if config.positions == ROPE and config.max_positions and longest > config.max_positions:
        found.append(f"--max-seq-len {longest} is beyond the {config.max_positions} positions that the model knows")
    if not paged_context(config, longest) and tokens > MOST_TOKENS:
        found.append(
            f"--max-num-tokens {tokens}: {_in_one_piece(config)}, and the engine keeps memory for the activations of "
            "so many tokens; a smaller --max-input-len needs less"
        )
    return found


def paged_context(config: CheckpointConfig, longest: int) -> bool:
    """Whether the engine may compute prompts out of the paged cache: not with an INT8 cache, nor with a window that is
    shorter than a sequence. longest: the tokens of a sequence."""
    return config.kv_cache != INT8 and (config.window is None or config.window >= longest)


def _in_one_piece(config: CheckpointConfig) -> str:
    cause = "an INT8 KV cache" if config.kv_cache == INT8 else f"a window of {config.window} tokens"
    return f"with {cause} prompts are computed in one piece"


def options(config: CheckpointConfig, limits: BuildLimits) -> dict[str, str]:
    """The options of `trtllm-build` that follow from the checkpoint. limits: resolved ones."""
    longest = limits.max_seq_len
    assert longest is not None  # of resolved limits
    return {
        "max_beam_width": "1",
        "gemm_plugin": "auto",
        "gpt_attention_plugin": "auto",
        "kv_cache_type": "paged",
        "remove_input_padding": "enable",
        "context_fmha": "enable",
        "use_paged_context_fmha": "enable" if paged_context(config, longest) else "disable",
        "reduce_fusion": "disable",
        "use_fused_mlp": "disable",
        "norm_quant_fusion": "disable",
    }


def build_command(checkpoint: Path, out: Path, limits: BuildLimits, config: CheckpointConfig) -> list[str]:
    """The whole command, word by word. limits: resolved ones."""
    numbers = {name: str(value) for name, value in asdict(limits).items()}
    given = {
        "checkpoint_dir": str(checkpoint),
        "output_dir": str(out),
        **numbers,
        **options(config, limits),
    }
    return [TOOL, *(word for name, value in given.items() for word in (f"--{name}", value))]


def container_command(checkpoint: Path, out: Path, limits: BuildLimits) -> str:
    """The same build in a container of docker/tensorrt-llm. The folders have the same paths inside it as here."""
    checkpoint, out = checkpoint.absolute(), out.absolute()
    common = os.path.commonpath([checkpoint.parent, out.parent])
    mounts = [common] if common != "/" else sorted({str(checkpoint.parent), str(out.parent)})
    numbers: list[str] = []
    for name, value in asdict(limits).items():
        if value != getattr(BuildLimits(), name):
            numbers += [_option(name), str(value)]
    inner = ["build", "tensorrt-llm", str(checkpoint), "--out", str(out), *numbers]
    volumes = [word for mount in mounts for word in ("-v", f"{mount}:{mount}")]
    return _joined("docker run --rm --gpus all --user $(id -u):$(id -g)", [*volumes, CONTAINER, *inner])


def _joined(start: str, words: Sequence[str]) -> str:
    return f"{start} {shlex.join(words)}"


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")
