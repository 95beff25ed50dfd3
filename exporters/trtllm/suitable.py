"""Whether TensorRT-LLM can run a model, quantized in a mode and divided among ranks: every refusal, with its reason.

Nothing is left to the engine to get wrong: what its SmoothQuant layers lack is refused here, before anything is
written, with what serves the model instead.

The INT8 kernels' alignment is CUTLASS's: DefaultGemmConfiguration's, of cutlass_kernels/int8_gemm/int8_gemm_template.h.
An engine of other sizes would be built, and stop at its first prompt ("No valid SQ GEMM tactic").
"""

from __future__ import annotations

from collections.abc import Iterator

from exporters.trtllm.decoders import DECODERS, REFUSED, Decoder, rope
from exporters.trtllm.modes import Mode
from exporters.trtllm.sharding import Ranks
from smoothquant.errors import UserError
from smoothquant.family import Geometry
from smoothquant.model import Model

INPUTS_AT_ONCE, OUTPUTS_AT_ONCE = 16, 8  # channels that SmoothQuant's INT8 kernels read and write: 128 bits
INSTEAD = "serve smoothquant export w8a8 with vLLM, or build smoothquant export onnx"


def decoder_of(model: Model, mode: Mode) -> Decoder:
    """The decoder that runs this model. Raises UserError, with the reason and what else serves it, if none does."""
    name = model.family.name
    decoder = DECODERS.get(name)
    if decoder is None:
        known = ", ".join(DECODERS)
        why = REFUSED.get(name, f"it has no decoder for it, only for {known}")
        raise UserError(f"{name} in TensorRT-LLM: {why}", do=INSTEAD)
    for fault in _faults(model, decoder):
        raise UserError(f"{model.checkpoint.folder} in TensorRT-LLM: {fault}", do=INSTEAD)
    if mode.plugin and not mode.static and not decoder.per_token:
        raise UserError(
            f"{name} in TensorRT-LLM: its decoder does not take per-token activations",
            expected="static ones: --act per-tensor, or --no-plugins",
            do=f"choose those; or {INSTEAD}",
        )
    return decoder


def check_model(model: Model, mode: Mode, ranks: Ranks = Ranks()) -> None:  # noqa: B008 (frozen)
    """Raise UserError unless TensorRT-LLM runs this model, in this mode and divided like this."""
    check_ranks(model, decoder_of(model, mode), mode, ranks)


def needs_float16(model: Model, mode: Mode) -> bool:
    """Whether an engine of this model has to be float16.

    SmoothQuant's attention, whose input is INT8, casts the slopes of ALiBi to float16 whatever the engine's dtype is
    (SmoothQuantAttention.forward in quantization/layers.py), and its plugin takes slopes in the engine's dtype.
    """
    return mode.plugin and model.family.alibi is not None


def check_dtype(model: Model, mode: Mode, dtype: str) -> None:
    """Raise UserError unless an engine of this model may have this dtype. dtype: "float16" or "bfloat16"."""
    if dtype != "float16" and needs_float16(model, mode):
        raise UserError(
            f"{model.family.name} in {dtype} with TensorRT-LLM's plugins: its SmoothQuant attention hands over the "
            "slopes of ALiBi in float16, whatever the engine's dtype",
            expected="float16",
            do=f"export with --dtype float16, or with --no-plugins; or {INSTEAD}",
        )


def check_ranks(model: Model, decoder: Decoder, mode: Mode, ranks: Ranks) -> None:
    """Raise UserError unless the model can be divided like this."""
    geometry, tp, pp = model.geometry, ranks.tp, ranks.pp
    for option, value in (("--tp", tp), ("--pp", pp)):
        if value < 1:
            raise UserError(f"{option} {value}", expected="at least 1")
    for what, count in (("attention heads", geometry.heads), ("channels of the MLP", geometry.intermediate_size)):
        if count % tp:
            raise _undivided(f"--tp {tp} does not divide the {count} {what}", geometry, mode)
    if geometry.kv_heads % tp and tp % geometry.kv_heads:
        heads = f"{geometry.kv_heads} kv heads"
        raise _undivided(
            f"--tp {tp}: {heads} can neither be divided among the ranks nor repeated for them", geometry, mode
        )
    if mode.plugin and not _aligned(geometry, tp):
        raise _undivided(
            f"--tp {tp}: a rank's part of a linear's input is no multiple of {INPUTS_AT_ONCE} channels, or of its "
            f"output of {OUTPUTS_AT_ONCE}, which SmoothQuant's INT8 kernels demand",
            geometry,
            mode,
        )
    if pp > 1 and not decoder.pipeline:
        raise UserError(f"--pp {pp}: TensorRT-LLM's {decoder.architecture} has no pipeline stages", expected="--pp 1")
    if geometry.layers % pp:
        possible = ", ".join(str(n) for n in range(1, geometry.layers + 1) if geometry.layers % n == 0)
        raise UserError(f"--pp {pp} does not divide the {geometry.layers} layers", expected=f"one of {possible}")
    if tp > 1 and model.family.parallel and "o" in geometry.biased:
        raise UserError(
            f"--tp {tp}: parallel branches with biases, which TensorRT-LLM adds once per rank", expected="--tp 1"
        )


def _faults(model: Model, decoder: Decoder) -> Iterator[str]:
    """What this model has and the decoder has not."""
    family, geometry = model.family, model.geometry
    strange = sorted(family.norms.keys() - {"attention", "mlp"})
    if strange or "attention" not in family.norms or family.final_norm is None:
        which = ", ".join(strange) or "attention or the head"
        yield f"its SmoothQuant layers are normed before each branch and before the head; here it is different: {which}"
    if family.project_in or family.project_out:
        yield "it has no projections of the embedding"
    if geometry.experts:
        yield "its SmoothQuant layers have no experts"
    if geometry.attention_softcap or geometry.logits_softcap:
        yield "its decoder has no soft-capping"
    if (geometry.embedding_scale, geometry.residual_scale, geometry.logits_scale) != (1, 1, 1):
        yield "its SmoothQuant decoder has no multipliers of the embedding, the branches or the logits"
    if geometry.attention_scale is not None:
        yield "its attention scale is 1 / sqrt(head_dim)"
    if (family.alibi is not None) != (decoder.position_embedding == "alibi"):
        yield f"its SmoothQuant {decoder.architecture} has {decoder.position_embedding} positions" + (
            ", and no scaled ALiBi" if family.alibi else ""
        )
    if len({kind.window for kind in geometry.attention}) > 1:
        yield "sliding windows in some layers only, for which the checkpoint has no place"
    yield from _rotary_faults(model, decoder)
    if geometry.biased not in decoder.biases:
        yield f"its {decoder.architecture} has biases {_said(decoder.biases)}, this model {_said((geometry.biased,))}"
    if geometry.activation not in decoder.activations:
        known = ", ".join(decoder.activations)
        yield f"its {decoder.architecture} has the activations {known}, this model {geometry.activation}"
    if decoder.epsilon is not None and geometry.norm_epsilon != decoder.epsilon:
        yield f"the norms of its {decoder.architecture} have epsilon {decoder.epsilon}, not {geometry.norm_epsilon}"


def _rotary_faults(model: Model, decoder: Decoder) -> Iterator[str]:
    if not decoder.position_embedding.startswith("rope"):
        return
    geometry = model.geometry
    if len({kind.inv_freq for kind in geometry.attention}) > 1:
        yield "it has one rotary embedding for all layers"
    if any(2 * len(kind.inv_freq) != geometry.head_dim for kind in geometry.attention):
        yield f"its {decoder.architecture} rotates whole heads, this model only a part"
    kind = rope(model)["rope_type"]
    if kind not in decoder.scalings:
        yield f"its {decoder.architecture} has no RoPE scaling {kind!r}, only {', '.join(decoder.scalings)}"


def _aligned(geometry: Geometry, tp: int) -> bool:
    """Whether the INT8 kernels take a rank's part of every linear."""
    inputs = (geometry.hidden_size, geometry.query_size // tp, geometry.intermediate_size // tp)
    qkv = (geometry.heads // tp + 2 * max(1, geometry.kv_heads // tp)) * geometry.head_dim
    return qkv % OUTPUTS_AT_ONCE == 0 and all(channels % INPUTS_AT_ONCE == 0 for channels in inputs)


def _undivided(what: str, geometry: Geometry, mode: Mode) -> UserError:
    """The error of a --tp, which names those that are possible: in this mode, and with --no-plugins, where nothing need
    be aligned."""
    divisors = _divisors(geometry)
    possible = [tp for tp in divisors if not mode.plugin or _aligned(geometry, tp)]
    others = [tp for tp in divisors if tp not in possible]
    without = f"export with --no-plugins, which TensorRT computes itself, to have --tp {' or '.join(map(str, others))}"
    advice = ([without] if others else []) + ([] if possible else [INSTEAD])
    return UserError(
        what,
        expected=f"one of {', '.join(map(str, possible))}" if possible else "",
        do="; or ".join(advice),
    )


def _divisors(geometry: Geometry) -> list[int]:
    """Numbers of ranks that heads and MLP can be divided among."""
    return [
        tp
        for tp in range(1, geometry.heads + 1)
        if geometry.heads % tp == 0
        and geometry.intermediate_size % tp == 0
        and (geometry.kv_heads % tp == 0 or tp % geometry.kv_heads == 0)
    ]


def _said(biases: tuple[frozenset[str], ...]) -> str:
    return " or ".join("+".join(sorted(roles)) or "none" for roles in biases)
