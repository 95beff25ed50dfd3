"""A graph under construction: nodes, constants, and weights that lie in external data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from exporters.onnx.external_data import FILE, Content, ExternalData, WeightContent
from smoothquant.packages import require

if TYPE_CHECKING:
    import onnx

OPSETS = {  # opset -> IR version of its time
    17: 8,  # TensorRT 8.6
    21: 10,  # ONNX Runtime >= 1.18 and TensorRT >= 10
    23: 11,  # with Attention as one operator: TensorRT >= 10.14, half precision only
    24: 12,  # with TensorScatter, a cache in place: TensorRT >= 10.15
}
OPSET, IN_PLACE_OPSET = 21, 24
ELEMENTS = {
    torch.float32: "FLOAT",
    torch.float16: "FLOAT16",
    torch.bfloat16: "BFLOAT16",
    torch.int8: "INT8",
    torch.int64: "INT64",
}


class Graph:
    """Values are their names. `scope` prefixes the names of nodes, so that a profile or a viewer reads well.

    body: dtype of what is not quantized, and of all that passes between the parts of a decoder. opset: a key of
    `OPSETS`. data: of another graph, to share its weights; what this one needs beside goes behind them.
    """

    def __init__(self, body: torch.dtype = torch.float32, opset: int = OPSET, data: ExternalData | None = None) -> None:
        self.onnx = require("onnx")
        self.body, self.opset = body, opset
        self.data = ExternalData() if data is None else data
        self._weights: dict[str, Content | WeightContent] = {}
        self.scope = ""
        self._nodes: list[onnx.NodeProto] = []
        self._names: dict[str, int] = {}
        self._constants: dict[tuple, str] = {}
        self._initializers: list[onnx.TensorProto] = []
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []

    def op(self, kind: str, *inputs: str, outputs: int = 1, **attributes: Any) -> Any:
        """Add a node of the standard operator `kind`; returns its output's name, or a tuple of names."""
        name = self._unique(f"{self.scope}/{kind}" if self.scope else kind)
        names = [name] if outputs == 1 else [f"{name}.{index}" for index in range(outputs)]
        self._nodes.append(self.onnx.helper.make_node(kind, list(inputs), names, name=name, **attributes))
        return names[0] if outputs == 1 else tuple(names)

    def constant(self, value: Any, dtype: torch.dtype = torch.int64) -> str:
        """A small inline constant, stored once. value: a number, or a (nested) list of numbers."""
        tensor = torch.tensor(value, dtype=dtype)
        content = tensor.view(-1).view(torch.uint8).numpy().tobytes()
        key = (dtype, tensor.shape, content)
        if key not in self._constants:
            name = self._unique(f"constant.{str(dtype).removeprefix('torch.')}")
            proto = self.onnx.TensorProto(name=name, dims=tensor.shape, data_type=self.element(dtype), raw_data=content)
            self._initializers.append(proto)
            self._constants[key] = name
        return self._constants[key]

    def number(self, value: float) -> str:
        """A constant in the body's dtype."""
        return self.constant(value, self.body)

    def weight(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, content: Content | WeightContent) -> str:
        """A tensor in external data, whose content is written later. With the very same content it is there once, for
        all that ask for it."""
        if name in self._weights:
            if self._weights[name] is not content:
                raise ValueError(f"{name} is there already")
            return name
        self._weights[name] = content
        if name not in self.data.places:
            self.data.plan(name, shape, dtype, content)
        tensor = self.onnx.TensorProto(name=name, dims=shape, data_type=self.element(dtype))
        tensor.data_location = self.onnx.TensorProto.EXTERNAL
        place = self.data.places[name]
        if (place.shape, place.dtype) != (shape, dtype):
            raise ValueError(f"{name}: {shape} {dtype}, shared as {place.shape} {place.dtype}")
        for key, value in (("location", FILE), ("offset", place.offset), ("length", place.nbytes)):
            tensor.external_data.add(key=key, value=str(value))
        self._initializers.append(tensor)
        return name

    def input(self, name: str, dtype: torch.dtype, shape: Sequence[int | str]) -> str:
        """Declare an input; string dimensions are symbolic."""
        self._inputs.append(self.onnx.helper.make_tensor_value_info(name, self.element(dtype), shape))
        return name

    def option(self, name: str, default: Sequence[int]) -> str:
        """Declare an int64 input that may be left away: an initializer of this name, which an input of the name may
        replace (ONNX IR, "initializers as default values of inputs")."""
        proto = self.onnx.helper.make_tensor(name, self.element(torch.int64), [len(default)], default)
        self._initializers.append(proto)
        return self.input(name, torch.int64, [len(default)])

    def output(self, value: str, name: str, dtype: torch.dtype, shape: Sequence[int | str]) -> None:
        """Declare a value as output under a name of its own."""
        for node in reversed(self._nodes):
            if value in node.output:  # rename the value: no Identity node
                node.output[list(node.output).index(value)] = name
                break
        for node in self._nodes:
            for index, source in enumerate(node.input):
                if source == value:
                    node.input[index] = name
        self._outputs.append(self.onnx.helper.make_tensor_value_info(name, self.element(dtype), shape))

    def reduce(self, kind: str, x: str) -> str:
        """ReduceMax or ReduceMean over the last dimension, which stays with size 1."""
        if self.opset < 18:
            return self.op(kind, x, axes=[-1], keepdims=1)
        return self.op(kind, x, self.constant([-1]), keepdims=1)

    def halves(self, x: str, size: int) -> tuple[str, str]:
        """x in two along the last dimension, each of `size`."""
        return self.op("Split", x, self.constant([size, size]), outputs=2, axis=-1)

    def scaled(self, x: str, factor: float) -> str:
        """x, in the body's dtype, times a constant, which 16 bits would round; x itself where that is 1."""
        if factor == 1:
            return x
        return self.narrow(self.op("Mul", self.wide(x), self.constant(factor, torch.float32)))

    def cast(self, x: str, source: torch.dtype, target: torch.dtype) -> str:
        """x in another dtype; x itself where it is the same."""
        return x if source == target else self.op("Cast", x, to=self.element(target))

    def wide(self, x: str) -> str:
        """x, which is in the body's dtype, in float32."""
        return self.cast(x, self.body, torch.float32)

    def narrow(self, x: str) -> str:
        """x, which is in float32, in the body's dtype."""
        return self.cast(x, torch.float32, self.body)

    def rounded(self, x: str, dtype: torch.dtype) -> str:
        """float32 x rounded to the numbers of `dtype`, as float32."""
        return self.cast(self.cast(x, torch.float32, dtype), dtype, torch.float32)

    @contextmanager
    def within(self, scope: str) -> Iterator[None]:
        """Another `scope` for a while."""
        before, self.scope = self.scope, scope
        yield
        self.scope = before

    def element(self, dtype: torch.dtype) -> int:
        """ONNX's code of an element type."""
        return getattr(self.onnx.TensorProto, ELEMENTS[dtype])

    def model(self, metadata: Mapping[str, str]) -> onnx.ModelProto:
        """The finished model. Its weights are in the external data file beside it."""
        helper = self.onnx.helper
        graph = helper.make_graph(self._nodes, "decoder", self._inputs, self._outputs, self._initializers)
        model = helper.make_model(
            graph,
            producer_name="smoothquant-toolchain",
            opset_imports=[helper.make_opsetid("", self.opset)],
            ir_version=OPSETS[self.opset],
        )
        helper.set_model_props(model, dict(metadata))
        return model

    def _unique(self, name: str) -> str:
        count = self._names[name] = self._names.get(name, -1) + 1
        return f"{name}.{count}" if count else name
