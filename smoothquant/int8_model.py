"""Somebody's INT8 folder seen through its family, the counterpart of `smoothquant.model` for float checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from smoothquant.errors import CheckpointError
from smoothquant.int8_checkpoint import WEIGHT, Int8Checkpoint, Int8Linear
from smoothquant.int8_config import DO
from smoothquant.layers import FloatLayer, float_layer
from smoothquant.model import Model
from smoothquant.scheme import Scheme


@dataclass(frozen=True)
class Int8Model:
    """An INT8 folder with its family. model: the model whose checkpoint this is, which reads what is not quantized.

    Raises CheckpointError for a quantized matrix that is no linear of a layer.
    """

    checkpoint: Int8Checkpoint
    model: Model

    def __post_init__(self) -> None:
        linears = {self._stem(name) for name, _ in self.model.linears()}
        for module in self.checkpoint.modules:
            if module not in linears:
                raise CheckpointError(
                    f"{self.checkpoint.tensors[module + WEIGHT].file}: {module} is quantized",
                    expected="int8 in the linears of layers alone; head, embeddings and routers in float",
                    do=DO,
                )

    @cached_property
    def scheme(self) -> Scheme:
        """What of the model is INT8, and which linears of its layers stay in float."""
        found, quantized = self.checkpoint.quantized, set(self.checkpoint.modules)
        kept = tuple(name for name, _ in self.model.linears() if self._stem(name) not in quantized)
        return Scheme(found.weights, found.activations, float_linears=kept)

    def float_part(self, index: int) -> FloatLayer:
        """What of a layer is not quantized: its norms, biases, and the weights of linears in float."""
        return float_layer(self.model, index, among={*self.scheme.float_linears, *self.model.float_linears()})

    def linear(self, name: str) -> Int8Linear:
        """A quantized linear by its module name, as `Model.linears` has it. Raises CheckpointError for scales that are
        no steps."""
        return self.checkpoint.linear(self._stem(name))

    def pre_quant_scale(self, name: str) -> Tensor | None:
        """What the input of a quantized linear is multiplied by, float32 (in,); None for nothing."""
        return self.checkpoint.pre_quant_scale(self._stem(name))

    def _stem(self, name: str) -> str:
        """The name of a linear in the checkpoint."""
        return self.model.on_disk(name + WEIGHT).removesuffix(WEIGHT)
