"""Read somebody's INT8 folder linear by linear, in either dialect of `smoothquant.int8_config`.

                     compressed-tensors                  modelopt
    weight           int8 (out, in)                      int8 (out, in)
    weight_scale     (out, 1), or one number             (out,)
    input_scale      one number, if it is static         one number
    pre_quant_scale  --                                  (in,), or none: the engine multiplies the input by it

    y = (xq * input_scale) @ (weight * weight_scale).T       xq = clamp(round(x * pre_quant_scale / input_scale))

All scales are steps, as in `smoothquant.quantization`; they come back in float32, from whichever float dtype they have
on disk. AutoRound writes negative weight_scales, too: -128 then stands for the largest weight of a channel. What is no
linear is read as from a float checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from smoothquant.checkpoint import DTYPES, Checkpoint, Part, TensorInfo
from smoothquant.errors import CheckpointError
from smoothquant.int8_config import DO, MODELOPT, Int8Config, read_int8_config
from smoothquant.scheme import WEIGHTS

WEIGHT, WEIGHT_SCALE, INPUT_SCALE, PRE_QUANT_SCALE = ".weight", ".weight_scale", ".input_scale", ".pre_quant_scale"
BIAS = ".bias"
SCALES = (WEIGHT_SCALE, INPUT_SCALE, PRE_QUANT_SCALE)
ZERO_POINTS = (".weight_zero_point", ".input_zero_point")  # all zero, if there are any
ONE = ((), (1,), (1, 1))  # shapes of one number
MAKE_ANEW = "download the folder again, or quantize the float model anew"


@dataclass(frozen=True)
class Int8Linear:
    """A linear as it lies on disk, which may hold several of a decoder's (`Model.split`).

    weight: int8 (out, in). weight_scale: float32 (out,), not 0. input_scale: a float32 scalar, > 0; None for a dynamic
    scale per token. pre_quant_scale: float32 (in,), > 0, by which the input is multiplied; None for none.
    """

    weight: Tensor
    weight_scale: Tensor
    input_scale: Tensor | None = None
    pre_quant_scale: Tensor | None = None


class Int8Checkpoint(Checkpoint):
    """An INT8 folder. `tensors` lacks the scales; weights of quantized linears are int8 there.

    quantized: what the folder says. modules: names of the quantized linears. Raises CheckpointError, which names the
    key or the tensor, for a form that this tool does not compute as it is written, for scales that are missing, left
    over or of another shape, and what `Checkpoint` raises.
    """

    dtypes: ClassVar[Mapping[str, torch.dtype]] = DTYPES | {"I8": torch.int8}
    quantized: Int8Config
    modules: tuple[str, ...]

    @property
    def notes(self) -> tuple[str, ...]:
        return (self._stale,) if self._stale else ()

    def linear(self, module: str) -> Int8Linear:
        """A quantized linear. Raises CheckpointError for a scale that is not finite, or 0, or an input's below 0."""
        weight = self.read(module + WEIGHT)
        weight_scale = self._scale(module + WEIGHT_SCALE).flatten().expand(len(weight)).contiguous()
        static = self.quantized.activations.static
        input_scale = self._scale(module + INPUT_SCALE).reshape(()) if static else None
        return Int8Linear(weight, weight_scale, input_scale, self.pre_quant_scale(module))

    @property
    def smoothed(self) -> bool:
        """Whether the input of any linear is multiplied by a pre_quant_scale."""
        return any(name.endswith(PRE_QUANT_SCALE) for name in self._scales)

    def pre_quant_scale(self, module: str) -> Tensor | None:
        """That of a quantized linear, float32 (in,); None for none. Raises what `linear` raises."""
        return self._scale(module + PRE_QUANT_SCALE) if module + PRE_QUANT_SCALE in self._scales else None

    def view(self, name: str, parts: Mapping[str, Part]) -> None:
        if self.tensors[name].dtype == torch.int8:
            raise CheckpointError(
                f"{self.tensors[name].file}: {name} is quantized, and holds several matrices",
                expected="a matrix with scales of its own for each",
                do=DO,
            )
        super().view(name, parts)

    def _index(self) -> None:
        self.quantized = read_int8_config(self.folder, self._quantization)
        self._scales: dict[str, TensorInfo] = {}
        super()._index()
        ends = (*SCALES, *ZERO_POINTS)
        self._scales = {name: self.tensors.pop(name) for name in list(self.tensors) if name.endswith(ends)}
        self.modules = tuple(
            name.removesuffix(WEIGHT) for name, info in self.tensors.items() if info.dtype == torch.int8
        )
        for name, fault, expected in self._faults():
            raise CheckpointError(f"{self.folder}: tensor {name} {fault}", expected=expected, do=MAKE_ANEW)

    def _faults(self) -> Iterator[tuple[str, str, str]]:
        """Yield what is wrong with the scales and the matrices: (name, fault, expected)."""
        if not self.modules:
            yield f"*{WEIGHT}", "is int8 nowhere", "quantized linears"
        static, known = self.quantized.activations.static, set(self.modules)
        wanted = (WEIGHT_SCALE, INPUT_SCALE) if static else (WEIGHT_SCALE,)
        for module in self.modules:
            shape = self.tensors[module + WEIGHT].shape if module + WEIGHT in self.tensors else ()
            if len(shape) != 2 or 0 in shape:
                yield module, f"is int8 of shape {list(shape)}", "a matrix, <linear>.weight (out, in)"
            for end in wanted:
                if module + end not in self._scales:
                    yield module + end, "is missing", f"a scale of {module}.weight, which is int8"
        for name, info in self._scales.items():
            module, _, kind = name.rpartition(".")
            end = f".{kind}"
            if module not in known:
                yield name, "belongs to no int8 weight", "scales of quantized linears alone"
            elif end in ZERO_POINTS:
                if self.read(name).any():
                    yield name, "is not 0", "symmetric quantization, whose zero points are 0"
            elif end == INPUT_SCALE and not static:
                yield name, "is there, though the scales of inputs are dynamic", "none"
            elif end == PRE_QUANT_SCALE and self.quantized.dialect != MODELOPT:
                yield name, "is there", f"none in {self.quantized.dialect}"
            elif info.shape not in (shapes := self._shapes(end, *self.tensors[module + WEIGHT].shape)):
                yield name, f"has shape {list(info.shape)}", " or ".join(str(list(shape)) for shape in shapes)
            elif info.dtype == torch.int8:
                yield name, "has dtype I8", "F16, BF16 or F32"

    def _shapes(self, end: str, rows: int, columns: int) -> tuple[tuple[int, ...], ...]:
        """The shapes that a scale of a matrix may have."""
        if end == WEIGHT_SCALE:
            return ((rows, 1), (rows,)) if self.quantized.weights == WEIGHTS["per-channel"] else ONE
        return ONE if end == INPUT_SCALE else ((columns,),)

    def _scale(self, name: str) -> Tensor:
        scale = self.read(name).float()
        signed = name.endswith(WEIGHT_SCALE)
        if not (scale.isfinite() & (scale != 0 if signed else scale > 0)).all():
            raise CheckpointError(
                f"{self._scales[name].file}: {name} holds a number that is no step",
                expected="finite numbers, not 0" if signed else "finite numbers above 0",
                do=MAKE_ANEW,
            )
        return scale

    def _info(self, name: str) -> TensorInfo:
        return self._scales[name] if name in self._scales else super()._info(name)

    def _unknown(self, file: Path, name: str, dtype: str) -> CheckpointError:
        return CheckpointError(
            f"{file}: tensor {name} has dtype {dtype}", expected="I8, F16, BF16 or F32: INT8 weights", do=DO
        )
