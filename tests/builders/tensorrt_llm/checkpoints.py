"""Write a TensorRT-LLM checkpoint of a Hugging Face model by the plainest means, straight from the format's
description: nothing of it is shared with the exporter or the interpreter.

    W8A8 of a linear     q = rint(W s / scale), per row or one scale for a matrix; x / s is what is quantized
    static scales        127 / max |x / s| of the inputs that the model saw, and any output maximum: it cancels

`Written` keeps what every linear was quantized to, so that `tests.builders.tensorrt_llm.reference` can compute with it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from tests.builders.tensorrt_llm.layouts import Names, describe, fused_rows, names_of

PER_TOKEN = "W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN"
ALGORITHMS = (
    PER_TOKEN,
    "W8A8_SQ_PER_TENSOR_PER_TOKEN_PLUGIN",
    "W8A8_SQ_PER_CHANNEL_PER_TENSOR_PLUGIN",
    "W8A8_SQ_PER_TENSOR_PLUGIN",
    "W8A8_SQ_PER_CHANNEL",
    None,
)


@dataclass
class Linear:
    """q: int8 (out, in) and scale (out,) of every part (qkv has three, with rows in their order); smoother (in,) that
    divides the input; amax of what is left, of a static one."""

    weight: list[Tensor]
    bias: list[Tensor | None]
    smoother: Tensor
    q: list[Tensor] = field(default_factory=list)
    scale: list[Tensor] = field(default_factory=list)
    amax: float = 0.0


@dataclass
class Written:
    """What was written. linears: (layer, TensorRT-LLM's name) -> it; rows: of a fused qkv, in the order q, k, v."""

    folder: Path
    algorithm: str | None
    tp: int
    linears: dict[tuple[int, str], Linear]
    rows: Tensor | None
    names: Names
    kv_scales: list[float]


def write(
    model: PreTrainedModel,
    folder: Path,
    algorithm: str | None = PER_TOKEN,
    *,
    tp: int = 1,
    pp: int = 1,
    kv_cache: str | None = None,
    dtype: str = "float32",
    ids: Tensor | None = None,
    parallel_embedding: int | None = None,
    **config_changes: object,
) -> Written:
    """Write a checkpoint folder. ids: what the static scales are calibrated on; parallel_embedding: the dimension that
    the embedding is split by; config_changes: to config.json."""
    names, config = names_of(model), describe(model)
    ids = torch.arange(64).view(2, 32) if ids is None else ids
    rows = fused_rows(model) if len(names.qkv) == 1 and not names.transposed else None
    written = Written(folder, algorithm, tp, {}, rows, names, [])
    inputs, outputs = absmax(model, names, ids)
    stages = [[{} for _ in range(tp)] for _ in range(pp)]
    layers = model.get_submodule(names.layers)
    for number, layer in enumerate(layers):
        stage, local = divmod(number, len(layers) // pp)
        for rank in range(tp):
            for norm, theirs in names.norms.items():
                for part, value in layer.get_submodule(theirs).state_dict().items():
                    stages[stage][rank][f"transformer.layers.{local}.{norm}.{part}"] = value.to(getattr(torch, dtype))
        found = linears(layer, names, config, rows)
        for name, linear in found.items():
            key = f"{names.layers}.{number}.{_theirs(names, name)}"
            quantize(linear, name, algorithm, inputs[key], number)
            written.linears[number, name] = linear
            for rank in range(tp):
                shard = sharded(linear, name, algorithm, config, rank, tp, getattr(torch, dtype), outputs[key])
                prefix = f"transformer.layers.{local}.{name}"
                stages[stage][rank] |= {f"{prefix}.{part}": value for part, value in shard.items()}
        written.kv_scales.append(outputs[f"{names.layers}.{number}.{names.qkv[-1]}"] / 127)
        for rank in range(tp):
            extra = scalars(found, names, algorithm, kv_cache, written.kv_scales[-1])
            stages[stage][rank] |= {f"transformer.layers.{local}.{part}": value for part, value in extra.items()}
    _ends(model, names, stages, tp, getattr(torch, dtype), parallel_embedding)
    folder.mkdir(parents=True, exist_ok=True)
    for stage, ranks in enumerate(stages):
        for rank, tensors in enumerate(ranks):
            whole = {name: value.detach().contiguous().clone() for name, value in tensors.items()}
            save_file(whole, folder / f"rank{stage * tp + rank}.safetensors")
    config |= {
        "dtype": dtype,
        "mapping": {"world_size": tp * pp, "tp_size": tp, "pp_size": pp},
        "quantization": {"quant_algo": algorithm, "kv_cache_quant_algo": kv_cache},
        "use_parallel_embedding": parallel_embedding is not None,
        "embedding_sharding_dim": parallel_embedding or 0,
    }
    (folder / "config.json").write_text(json.dumps(config | config_changes, indent=4))
    return written


def linears(layer: torch.nn.Module, names: Names, config: Mapping, rows: Tensor | None) -> dict[str, Linear]:
    """TensorRT-LLM's name -> the float linear."""
    found = {}
    pairs = {"attention.qkv": names.qkv, "attention.dense": (names.dense,), "mlp.fc": (names.fc,)}
    pairs |= {"mlp.gate": (names.gate,)} if names.gate else {}
    for name, parts in (pairs | {"mlp.proj": (names.proj,)}).items():
        modules = [layer.get_submodule(part) for part in parts]
        weights = [module.weight.detach().double() for module in modules]
        biases = [None if module.bias is None else module.bias.detach() for module in modules]
        if names.transposed:
            weights = [weight.T.contiguous() for weight in weights]
        if name == "attention.qkv" and len(parts) == 1:
            size, heads = config["head_size"], config["num_attention_heads"]
            kv_heads = config.get("num_key_value_heads") or heads
            lengths = (heads * size, kv_heads * size, kv_heads * size)
            order = torch.arange(len(weights[0])) if rows is None else rows
            weights = list(weights[0][order].split(lengths))
            biases = [None] * 3 if biases[0] is None else list(biases[0][order].split(lengths))
        found[name] = Linear(weights, biases, torch.ones(weights[0].shape[1], dtype=torch.float64))
    return found


def quantize(linear: Linear, name: str, algorithm: str | None, input_absmax: Tensor, seed: int) -> None:
    """Fill in smoother, q, scale and amax. Row-parallel linears (all of them, in Q/DQ) get smoothers to test with."""
    if algorithm is None:
        return
    qdq = algorithm == "W8A8_SQ_PER_CHANNEL"
    if qdq or name in ("attention.dense", "mlp.proj"):
        generator = torch.Generator().manual_seed(seed)
        factors = torch.rand(linear.smoother.shape, generator=generator) * 2 + 0.25
        linear.smoother = 1 / factors.double() if qdq else factors.double()  # as stored: what multiplies, or divides
    linear.amax = float((input_absmax / linear.smoother).max().float())
    for weight in linear.weight:
        smoothed = weight * linear.smoother
        amax = smoothed.abs().amax(dim=1)
        if "PER_TENSOR_P" in algorithm.replace("PER_CHANNEL_PER_TENSOR", ""):
            amax = amax.max().expand_as(amax)
        scale = (amax / 127).float()
        linear.scale.append(scale)
        linear.q.append((smoothed / scale.double()[:, None]).round().clamp(-127, 127).to(torch.int8))


def sharded(
    linear: Linear,
    name: str,
    algorithm: str | None,
    config: Mapping,
    rank: int,
    tp: int,
    dtype: torch.dtype,
    top: float,
) -> dict[str, Tensor]:
    """One rank's tensors of a linear. top: maximum of its output, for the static form."""
    column = name not in ("attention.dense", "mlp.proj")

    def rows(parts: list[Tensor]) -> Tensor:
        if not column:
            return torch.cat(parts)
        kept = []
        for index, part in enumerate(parts):
            if name == "attention.qkv" and index:
                kv_heads = config.get("num_key_value_heads") or config["num_attention_heads"]
                if kv_heads < tp:  # repeat every head
                    part = part.unflatten(0, (kv_heads, -1)).repeat_interleave(tp // kv_heads, 0).flatten(0, 1)
            kept.append(part.chunk(tp)[rank])
        return torch.cat(kept)

    def columns(whole: Tensor) -> Tensor:
        return whole if column else whole.chunk(tp, dim=-1)[rank]

    found = {}
    if linear.bias[0] is not None:
        found["bias"] = rows([bias for bias in linear.bias if bias is not None]).to(dtype)
    if algorithm is None:
        return found | {"weight": columns(rows(linear.weight)).to(dtype)}
    found["weight"] = columns(rows(linear.q))
    scale = rows(linear.scale)
    if algorithm == "W8A8_SQ_PER_CHANNEL":
        return found | {
            "weights_scaling_factor": scale,
            "activation_scaling_factor": torch.tensor([linear.amax / 127]),
            "prequant_scaling_factor": columns(1 / linear.smoother).to(dtype),
        }
    if "PER_TENSOR_P" in algorithm.replace("PER_CHANNEL_PER_TENSOR", "") and name != "attention.qkv":
        scale = scale[:1]
    if not algorithm.endswith("PER_TOKEN_PLUGIN"):
        scale = scale * linear.amax / top
        found["act_scale"] = torch.tensor([[top / 127]])
    found["per_channel_scale"] = scale[None].float()
    return found if column else found | {"smoother": columns(linear.smoother)[None].float()}


def scalars(
    found: Mapping[str, Linear], names: Names, algorithm: str | None, kv_cache: str | None, kv_scale: float
) -> dict[str, Tensor]:
    """What a layer has besides norms and linears."""
    extra = {"attention.kv_cache_scaling_factor": torch.tensor([kv_scale])} if kv_cache else {}
    if algorithm is None or not algorithm.endswith("PLUGIN"):
        return extra
    behind = {"input_layernorm": "attention.qkv", "post_layernorm": "mlp.fc", "mlp_layernorm": "mlp.fc"}
    static = not algorithm.endswith("PER_TOKEN_PLUGIN")
    for norm in names.norms:
        extra[f"{norm}.scale_to_int"] = torch.tensor([127 / found[behind[norm]].amax if static else 1.0])
    if static:
        extra["attention.quantization_scaling_factor"] = torch.tensor([127 / found["attention.dense"].amax])
        extra["mlp.quantization_scaling_factor"] = torch.tensor([127 / found["mlp.proj"].amax])
    return extra


@torch.no_grad()
def absmax(model: PreTrainedModel, names: Names, ids: Tensor) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Linear -> largest |input| (in,) float64, and largest |output|; of qkv over all three."""
    inputs, outputs, hooks = {}, {}, []

    def hook(name: str) -> object:
        def listen(_module: object, args: tuple[Tensor, ...], output: Tensor) -> None:
            inputs[name] = args[0].abs().flatten(0, -2).amax(0).double()
            outputs[name] = float(output.abs().max())

        return listen

    for name, module in model.named_modules():
        if getattr(module, "weight", None) is not None and module.weight.dim() == 2 and name.startswith(names.layers):
            hooks.append(module.register_forward_hook(hook(name)))
    model(ids)
    for handle in hooks:
        handle.remove()
    for number in range(len(model.get_submodule(names.layers))):
        parts = [f"{names.layers}.{number}.{part}" for part in names.qkv]
        outputs |= dict.fromkeys(parts, max(outputs[part] for part in parts))
    return inputs, outputs


def _theirs(names: Names, name: str) -> str:
    table = {"attention.qkv": names.qkv[0], "attention.dense": names.dense, "mlp.fc": names.fc}
    return (table | {"mlp.gate": names.gate or "", "mlp.proj": names.proj})[name]


def _ends(
    model: PreTrainedModel,
    names: Names,
    stages: list[list[dict[str, Tensor]]],
    tp: int,
    dtype: torch.dtype,
    parallel_embedding: int | None,
) -> None:
    embedding = model.get_submodule(names.embedding).weight.to(dtype)
    head = model.get_output_embeddings().weight.to(dtype)
    size = -(-len(head) // tp)
    padded = [
        torch.cat([table, table.new_zeros(size * tp - len(table), table.shape[1])]) for table in (embedding, head)
    ]
    for rank in range(tp):
        first, last = stages[0][rank], stages[-1][rank]
        shard = embedding
        if parallel_embedding is not None:
            shard = (padded[0] if parallel_embedding == 0 else embedding).chunk(tp, dim=parallel_embedding)[rank]
        first["transformer.vocab_embedding.weight"] = shard
        if names.positions:
            offset = 2 if model.config.model_type == "opt" else 0
            first["transformer.position_embedding.weight"] = (
                model.get_submodule(names.positions).weight[offset:].to(dtype)
            )
        if names.ln_embed:
            for part, value in model.get_submodule(names.ln_embed).state_dict().items():
                first[f"transformer.ln_embed.{part}"] = value.to(dtype)
        for part, value in model.get_submodule(names.ln_f).state_dict().items():
            last[f"transformer.ln_f.{part}"] = value.to(dtype)
        last["lm_head.weight"] = padded[1].chunk(tp)[rank]
