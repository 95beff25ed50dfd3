"""Run a TensorRT-LLM checkpoint in PyTorch, by the rules of its format and the arithmetic of NVIDIA's kernels.

Every rank holds its own shard and computes with it. All-reduce is a sum over ranks. The bias of a row-parallel linear
is added once, behind the sum. Pipeline stages follow each other.

No code is shared with `exporters`, only the format. Activations are rounded to the checkpoint's
dtype wherever an engine writes them, and overflow there; in `EnginePrecision(torch.float64)` the only roundings are
those to int8.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import linear

from builders.tensorrt_llm.format.architectures import RUNNABLE_ACTIVATIONS, UNSET_EPSILON
from builders.tensorrt_llm.format.checkpoint import RankFile, load_config
from builders.tensorrt_llm.format.config import CheckpointConfig
from builders.tensorrt_llm.format.tensors import LINEARS, expected
from builders.tensorrt_llm.interpreter.arithmetic import (
    EnginePrecision,
    activation,
    integer_product,
    normalize,
    quantize_by_scale,
    quantize_per_tensor,
    quantize_per_token,
    rescale,
)
from builders.tensorrt_llm.interpreter.attention import PositionTerms, attend, positions
from smoothquant.device import DTYPES
from smoothquant.errors import CheckpointError, UserError

EMBEDDING = "transformer.vocab_embedding.weight"
Activation = tuple[Tensor, Tensor | None]  # whole numbers and their token_scale or None; floats and None


class Interpreter:
    """A checkpoint folder, ready to run. Weights are mapped, and widened one linear at a time.

    precision: None is the engine's own: computed in float32, held in the checkpoint's dtype.
    Raises CheckpointError if the folder breaks the format, UserError if it needs an activation or a KV cache that the
    interpreter lacks.
    """

    def __init__(self, folder: str | Path, precision: EnginePrecision | None = None) -> None:
        self.config = load_config(Path(folder))
        if self.config.dtype not in DTYPES:
            raise CheckpointError(
                f"{folder}/config.json: dtype {self.config.dtype!r}", expected=f"one of {', '.join(DTYPES)}"
            )
        self.precision = precision or EnginePrecision(held=DTYPES[self.config.dtype])
        self._ranks = [_load(Path(folder), self.config, rank) for rank in range(self.config.ranks)]
        if self.config.activation not in RUNNABLE_ACTIVATIONS:
            raise CheckpointError(
                f"{folder}: hidden_act {self.config.activation!r} cannot be run here",
                expected=f"one of {', '.join(RUNNABLE_ACTIVATIONS)}",
            )
        if self.config.kv_cache not in (None, "INT8"):
            raise UserError(f"{folder}: an {self.config.kv_cache} KV cache cannot be run here", expected="INT8 or none")

    @torch.no_grad()
    def logits(self, ids: Tensor) -> Tensor:
        """The logits of whole sequences without padding, (batch, tokens, vocab), in the dtype of the arithmetic.

        ids: int64 (batch, tokens). Raises UserError if a sequence is longer than the learned positions.
        """
        config, hold = self.config, self.precision.hold
        places = positions(config, ids.shape[1], self.precision.compute)
        hidden = self._embed(ids)
        for stage in range(config.pp):
            ranks = self._ranks[stage * config.tp : (stage + 1) * config.tp]
            for layer in range(config.stage_layers):
                prefix = f"transformer.layers.{layer}."
                hidden = self._layer([_Part(tensors, prefix) for tensors in ranks], hidden, places)
        last = self._ranks[-config.tp :]
        normed = hold(self._norm(_Part(last[0], "transformer."), "ln_f", hidden))
        heads = [rank["lm_head.weight" if "lm_head.weight" in rank else EMBEDDING] for rank in last]
        return torch.cat([hold(linear(normed, self._wide(head))) for head in heads], dim=-1)[..., : config.vocab_size]

    def _embed(self, ids: Tensor) -> Tensor:
        config, first = self.config, self._ranks[: self.config.tp]
        shards = [rank[EMBEDDING] for rank in first]
        split = config.parallel_embedding and config.tp > 1
        table = torch.cat(shards, dim=config.embedding_dim) if split else shards[0]
        hidden = self._wide(table[ids])
        if config.positions == "learned_absolute":
            learned = first[0]["transformer.position_embedding.weight"]
            if ids.shape[1] > len(learned):
                raise UserError(f"a sequence of {ids.shape[1]} tokens", expected=f"at most {len(learned)}")
            hidden = self.precision.hold(hidden + self._wide(learned[: ids.shape[1]]))
        if config.architecture.embedding_norm:
            hidden = self._norm(_Part(first[0], "transformer."), "ln_embed", hidden)
        return self.precision.hold(hidden)

    def _layer(self, ranks: Sequence[_Part], hidden: Tensor, places: PositionTerms) -> Tensor:
        config, hold = self.config, self.precision.hold
        normed = [self._input(part, "input_layernorm", hidden) for part in ranks]
        attention = self._reduce(
            ranks,
            "attention.dense",
            [self._attention(part, x, places, rank) for rank, (part, x) in enumerate(zip(ranks, normed, strict=True))],
        )
        if not config.parallel:
            hidden = hold(hidden + attention)
            normed = [self._input(part, "post_layernorm", hidden) for part in ranks]
        elif config.mlp_norm:
            normed = [self._input(part, "mlp_layernorm", hidden) for part in ranks]
        inner = [self._inner(part, x) for part, x in zip(ranks, normed, strict=True)]
        mlp = self._reduce(ranks, "mlp.proj", inner)
        return hold(hidden + (hold(mlp + attention) if config.parallel else mlp))

    def _attention(self, part: _Part, x: Activation, places: PositionTerms, rank: int) -> Tensor:
        """The input of a rank's dense, (batch, tokens, its heads x head_size)."""
        qkv = self._linear(part, "attention.qkv", x)
        kv_scale = part.get("attention.kv_cache_scaling_factor") if self.config.kv_cache else None
        return self.precision.hold(attend(self.config, qkv, places, rank * self.config.rank_heads, kv_scale))

    def _inner(self, part: _Part, x: Activation) -> Tensor:
        """The input of a rank's proj, (batch, tokens, its intermediate channels)."""
        hold = self.precision.hold
        inner = hold(activation(self.config.activation, self._linear(part, "mlp.fc", x)))
        return hold(inner * self._linear(part, "mlp.gate", x)) if self.config.architecture.gated else inner

    def _norm(self, part: _Part, name: str, hidden: Tensor) -> Tensor:
        weight, bias, architecture = part[f"{name}.weight"], part.get(f"{name}.bias"), self.config.architecture
        epsilon = UNSET_EPSILON if name in architecture.unset_epsilon else self.config.epsilon
        return normalize(architecture.norm, hidden, weight, bias, epsilon)

    def _input(self, part: _Part, norm: str, hidden: Tensor) -> Activation:
        """The input of the linears behind a norm, quantized if they are."""
        normed = self.precision.hold(self._norm(part, norm, hidden))
        if self.config.algorithm.form != "plugin":
            return normed, None
        if self.config.algorithm.per_token:
            return quantize_per_token(normed)
        return quantize_per_tensor(normed, part[f"{norm}.scale_to_int"]), None

    def _reduce(self, ranks: Sequence[_Part], name: str, inputs: Sequence[Tensor]) -> Tensor:
        """The output of a row-parallel linear: the products of all ranks, all-reduced, and the bias once."""
        hold = self.precision.hold
        products = [
            self._product(part, name, self._smooth(part, name, x)) for part, x in zip(ranks, inputs, strict=True)
        ]
        total = products[0] if len(products) == 1 else hold(torch.stack(products).sum(dim=0))
        bias = ranks[0].get(f"{name}.bias")
        return total if bias is None else hold(total + self._wide(bias))

    def _smooth(self, part: _Part, name: str, x: Tensor) -> Activation:
        """The quantized quotient of x and a linear's smoother. The division is in the engine's dtype."""
        if self.config.algorithm.form != "plugin":
            return x, None
        hold = self.precision.hold
        x = hold(x / hold(self._wide(part[f"{name}.smoother"])).flatten())
        if self.config.algorithm.per_token:
            return quantize_per_token(x)
        return quantize_per_tensor(x, part[f"{name.partition('.')[0]}.quantization_scaling_factor"]), None

    def _linear(self, part: _Part, name: str, x: Activation) -> Tensor:
        """The output of a column-parallel linear, with its bias."""
        assert LINEARS[name]
        y, bias = self._product(part, name, x), part.get(f"{name}.bias")
        return y if bias is None else self.precision.hold(y + self._wide(bias))

    def _product(self, part: _Part, name: str, x: Activation) -> Tensor:
        hold, weight, (values, token_scale) = self.precision.hold, part[f"{name}.weight"], x
        form = self.config.algorithm.form
        if form == "float":
            return hold(linear(values, self._wide(weight)))
        if form == "plugin":
            scale = part[f"{name}.act_scale"] if token_scale is None else token_scale
            return hold(rescale(integer_product(values, weight), scale, part[f"{name}.per_channel_scale"]))
        scaled = hold(values * self._wide(part[f"{name}.prequant_scaling_factor"]))
        input_scale = part[f"{name}.activation_scaling_factor"]
        product = integer_product(quantize_by_scale(scaled, input_scale), weight)
        return hold(rescale(product, input_scale, part[f"{name}.weights_scaling_factor"]))

    def _wide(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.precision.compute)


class _Part:
    """The tensors of one rank under a prefix."""

    def __init__(self, tensors: dict[str, Tensor], prefix: str) -> None:
        self._tensors, self._prefix = tensors, prefix

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[self._prefix + name]

    def get(self, name: str) -> Tensor | None:
        return self._tensors.get(self._prefix + name)


def _load(folder: Path, config: CheckpointConfig, rank: int) -> dict[str, Tensor]:
    file = RankFile(folder, rank)
    headers, tensors = file.headers, {}
    for name, wanted in expected(config, rank).items():
        if name not in headers:
            if wanted.optional:
                continue
            raise CheckpointError(f"{file.path}: no tensor {name}", do="see all faults with smoothquant check")
        if not wanted.fits(headers[name].shape):
            raise CheckpointError(
                f"{file.path}: tensor {name} has shape {list(headers[name].shape)}",
                expected=str(list(wanted.shape)),
                do="see all faults with smoothquant check",
            )
        tensors[name] = file[name]
    return tensors
