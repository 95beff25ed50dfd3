"""What a graph is asked to be, checked before anything is written."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from exporters.onnx.graph import IN_PLACE_OPSET, OPSET, OPSETS
from exporters.onnx.linears import FORMS
from smoothquant.errors import UserError
from smoothquant.scheme import CACHES, PER_TOKEN, WEIGHTS, Scheme

BODIES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
ENGINES = {"onnxruntime": ("fp32", "fp16"), "tensorrt": ("fp16", "bf16")}  # the bodies that each is quick with
CACHE_DTYPES = {CACHES["int8"]: torch.int8}  # of quantized caches


def body_for(engine: str, stored: torch.dtype, asked: str | None = None) -> str:
    """The body of a graph for an engine: float32 for ONNX Runtime, for TensorRT the checkpoint's half type.

    engine: a key of `ENGINES`. stored: the dtype of the checkpoint; float32 becomes float16. asked: the body that was
    asked for. Raises UserError if the engine is slow with that, or cannot run it.
    """
    bodies = ENGINES[engine]
    if asked is None:
        own = [body for body in bodies if BODIES[body] == stored]
        return own[0] if own and engine == "tensorrt" else bodies[0]
    if asked not in bodies:
        raise UserError(f"--for {engine} with --dtype {asked}", expected=" or ".join(bodies), do="drop one of them")
    return asked


@dataclass(frozen=True)
class Form:
    """The form of a graph.

    scheme: what is INT8. body: "fp32", "fp16" or "bf16" (for TensorRT alone), the dtype of everything that is not.
    opset: a key of `graph.OPSETS`. capacity: the tokens of a cache that is written in place, opset 24; None for a cache
    that grows.
    """

    scheme: Scheme = PER_TOKEN
    body: str = "fp32"
    opset: int = OPSET
    capacity: int | None = None

    def __post_init__(self) -> None:
        self._check_scheme()
        for value, choices in ((self.body, BODIES), (self.opset, OPSETS)):
            if value not in choices:
                raise UserError(f"ONNX export: {value!r}", expected=f"one of {', '.join(map(str, choices))}")
        if (self.capacity is None) == (self.opset == IN_PLACE_OPSET):
            raise UserError(
                f"ONNX export: opset {self.opset} with a cache {'that grows' if self.capacity is None else 'in place'}",
                expected=f"opset {IN_PLACE_OPSET} for a cache in place, and for nothing else",
                do="leave --opset out",
            )
        for what, chosen in (("a bfloat16 body", self.body == "bf16"), (f"opset {self.opset}", self.opset < OPSET)):
            if chosen and self.scheme.embedding.quantized:
                raise UserError(
                    f"ONNX export: an {self.scheme.embedding.dtype} embedding with {what}, which is for TensorRT alone",
                    expected="a float embedding: TensorRT looks up no integers",
                    do="export with --embedding float",
                )
        if self.body == "bf16" and self.opset < OPSET:
            raise UserError(
                f"ONNX export: a bfloat16 body in opset {self.opset}",
                expected=f"opset {OPSET}",
                do="give TensorRT 8.6, which has no bfloat16, a body of fp16 or fp32",
            )

    def _check_scheme(self) -> None:
        """Raise UserError for a scheme that no graph of ours has."""
        scheme = self.scheme
        if scheme.quantized and scheme.weights != WEIGHTS["per-channel"]:
            raise UserError(f"ONNX export: {scheme.weights.form} weights", expected="per-channel ones")
        if scheme.activations not in FORMS:
            raise UserError(
                f"ONNX export: {scheme.activations.form} activations",
                expected=f"one of {', '.join(precision.form for precision in FORMS)}",
            )
        if scheme.kv_cache.quantized and scheme.kv_cache not in CACHE_DTYPES:
            raise UserError(
                f"ONNX export: one scale for keys and values of a KV cache in {scheme.kv_cache.dtype}",
                expected="a scale for each of them",
            )
        if scheme.head.quantized and not scheme.quantized:
            raise UserError(
                f"ONNX export: a float graph with an {scheme.head.dtype} lm_head",
                expected="no lm_head but float in a float graph",
            )
        if scheme.embedding.quantized and not scheme.quantized:
            raise UserError(
                f"ONNX export: a float graph with an {scheme.embedding.dtype} embedding",
                expected="no embedding but float in a float graph",
            )

    @property
    def dtype(self) -> torch.dtype:
        """Of the body."""
        return BODIES[self.body]

    @property
    def cache_dtype(self) -> torch.dtype:
        """Of keys and values in the cache."""
        return CACHE_DTYPES.get(self.scheme.kv_cache, self.dtype)

    @property
    def settings(self) -> dict:
        """For the graph itself: what is always told, and what else is not as by default."""
        scheme = self.scheme
        told: dict = {"activations": scheme.activations.form, "body": self.body, "lm_head": scheme.head.dtype}
        told |= {"kv_cache": scheme.kv_cache.dtype} if scheme.kv_cache.quantized else {}
        told |= {"embedding": scheme.embedding.dtype} if scheme.embedding.quantized else {}
        told |= {"opset": self.opset} if self.opset != OPSET else {}
        told |= {"capacity": self.capacity} if self.capacity is not None else {}
        return told | ({"float_linears": list(scheme.float_linears)} if scheme.float_linears else {})
