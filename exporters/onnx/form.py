"""What a graph is asked to be, checked before anything is written."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from exporters.onnx.graph import OPSET, OPSETS
from exporters.onnx.linears import FORMS
from smoothquant.errors import UserError
from smoothquant.scheme import Scheme, scheme_of
from smoothquant.settings import KV_CACHES

BODIES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
LM_HEADS = {"float": "float", "int8": "per-token"}  # option -> form of the output head


@dataclass(frozen=True)
class Form:
    """The form of a graph.

    activations: "per-token" or "per-tensor", how the inputs of INT8 linears are quantized, or "float": no linear is.
    body: "fp32", "fp16" or "bf16" (for TensorRT alone), the dtype of everything that is not INT8.
    lm_head: "float" or "int8", the output head. kv: "float" or "int8", the KV cache. opset: a key of `graph.OPSETS`.
    kept: module names of linears that a per-tensor graph leaves in float (`smoothquant.static`).
    """

    activations: str = "per-token"
    body: str = "fp32"
    lm_head: str = "float"
    kv: str = "float"
    opset: int = OPSET
    kept: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for value, choices in (
            (self.activations, FORMS),
            (self.body, BODIES),
            (self.lm_head, LM_HEADS),
            (self.kv, KV_CACHES),
            (self.opset, OPSETS),
        ):
            if value not in choices:
                raise UserError(f"ONNX export: {value!r}", expected=f"one of {', '.join(map(str, choices))}")
        if self.activations == "float" and self.lm_head != "float":
            raise UserError(
                f"ONNX export: a float graph with an {self.lm_head} lm_head",
                expected="no lm_head but float in a float graph",
            )
        if self.body == "bf16" and self.opset < OPSET:
            raise UserError(
                f"ONNX export: a bfloat16 body in opset {self.opset}",
                expected=f"opset {OPSET}",
                do="give TensorRT 8.6, which has no bfloat16, a body of fp16 or fp32",
            )

    @property
    def dtype(self) -> torch.dtype:
        """Of the body."""
        return BODIES[self.body]

    @property
    def scheme(self) -> Scheme:
        """What is INT8."""
        return scheme_of(self.activations, kv_cache=self.kv, head=self.lm_head, float_linears=self.kept)

    @property
    def settings(self) -> dict:
        """For the graph itself: what is always told, and what else is not as by default."""
        told: dict = {"activations": self.activations, "body": self.body, "lm_head": self.lm_head}
        told |= {"kv_cache": self.kv} if self.kv != "float" else {}
        told |= {"opset": self.opset} if self.opset != OPSET else {}
        return told | ({"float_linears": list(self.kept)} if self.kept else {})
