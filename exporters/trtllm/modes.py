"""The five ways in which TensorRT-LLM holds a W8A8 model: `quantization.quant_algo` of config.json.

    quant_algo                              weight scales        activations          run by
    W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN    per output channel   per token, dynamic   SmoothQuant plugins
    W8A8_SQ_PER_TENSOR_PER_TOKEN_PLUGIN     one per matrix       per token, dynamic   SmoothQuant plugins
    W8A8_SQ_PER_CHANNEL_PER_TENSOR_PLUGIN   per output channel   one, static          SmoothQuant plugins
    W8A8_SQ_PER_TENSOR_PLUGIN               one per matrix       one, static          SmoothQuant plugins
    W8A8_SQ_PER_CHANNEL                     per output channel   one, static          TensorRT's own Q/DQ, as ModelOpt
                                                                                      writes it

"One per matrix" is one for each of q, k and v, which the format repeats along their channels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from smoothquant.errors import UserError
from smoothquant.scheme import PER_TOKEN, SHARED_CACHES, WEIGHTS, Precision, Scheme, scheme_of

CACHE_ALGOS = {SHARED_CACHES["float"]: None, SHARED_CACHES["int8"]: "INT8"}  # kv_cache_quant_algo


@dataclass(frozen=True)
class Mode:
    """One quant_algo. scheme: what is INT8; plugin: whether SmoothQuant's plugins run it, else TensorRT itself does.

    Raises UserError for a scheme whose cache, head, embedding or float linears the format does not hold.
    """

    algo: str
    scheme: Scheme
    plugin: bool = True

    def __post_init__(self) -> None:
        scheme = self.scheme
        others = scheme.head, scheme.embedding
        if scheme.kv_cache not in CACHE_ALGOS or any(one.quantized for one in others) or scheme.float_linears:
            raise UserError(
                f"{self.algo} with a KV cache in {scheme.kv_cache.dtype}, a head in {scheme.head.dtype}, an "
                f"embedding in {scheme.embedding.dtype} and {len(scheme.float_linears)} linears in float",
                expected="a cache whose keys and values share their scale; a float head, a float "
                "embedding, no linear in float",
            )

    @property
    def static(self) -> bool:
        """Whether the scales of activations are stored."""
        return self.scheme.activations.static

    @property
    def whole(self) -> bool:
        """Whether a matrix has one scale."""
        return self.scheme.weights == WEIGHTS["per-tensor"]

    @property
    def cache(self) -> Precision:
        """How keys and values are held."""
        return self.scheme.kv_cache

    @property
    def cache_algo(self) -> str | None:
        """kv_cache_quant_algo."""
        return CACHE_ALGOS[self.cache]


MODES = (
    Mode("W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN", scheme_of("per-token", "per-channel")),
    Mode("W8A8_SQ_PER_TENSOR_PER_TOKEN_PLUGIN", scheme_of("per-token", "per-tensor")),
    Mode("W8A8_SQ_PER_CHANNEL_PER_TENSOR_PLUGIN", scheme_of("per-tensor", "per-channel")),
    Mode("W8A8_SQ_PER_TENSOR_PLUGIN", scheme_of("per-tensor", "per-tensor")),
    Mode("W8A8_SQ_PER_CHANNEL", scheme_of("per-tensor", "per-channel"), plugin=False),
)


def choose(scheme: Scheme = PER_TOKEN, *, plugin: bool = True) -> Mode:
    """The mode of a scheme. Raises UserError if TensorRT-LLM has none."""
    known = [mode for mode in MODES if mode.plugin == plugin]
    for mode in known:
        if (mode.scheme.weights, mode.scheme.activations) == (scheme.weights, scheme.activations):
            return replace(mode, scheme=scheme)
    by = "with plugins" if plugin else "without plugins"
    raise UserError(f"{by}: {_said(scheme)}", expected=" or ".join(_said(mode.scheme) for mode in known))


def _said(scheme: Scheme) -> str:
    return f"{scheme.weights.form} weights with {scheme.activations.form} activations"
