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

from dataclasses import dataclass

from smoothquant.errors import UserError


@dataclass(frozen=True)
class Mode:
    """One quant_algo. weights: "per-channel" or "per-tensor"; activations: "per-token" or "per-tensor" (static);
    plugin: whether SmoothQuant's plugins run it, else TensorRT itself does."""

    algo: str
    weights: str
    activations: str
    plugin: bool = True

    @property
    def static(self) -> bool:
        return self.activations == "per-tensor"


MODES = (
    Mode("W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN", "per-channel", "per-token"),
    Mode("W8A8_SQ_PER_TENSOR_PER_TOKEN_PLUGIN", "per-tensor", "per-token"),
    Mode("W8A8_SQ_PER_CHANNEL_PER_TENSOR_PLUGIN", "per-channel", "per-tensor"),
    Mode("W8A8_SQ_PER_TENSOR_PLUGIN", "per-tensor", "per-tensor"),
    Mode("W8A8_SQ_PER_CHANNEL", "per-channel", "per-tensor", plugin=False),
)


def choose(weights: str = "per-channel", activations: str = "per-token", *, plugin: bool = True) -> Mode:
    """The mode with these properties. Raises UserError if TensorRT-LLM has none."""
    for mode in MODES:
        if (mode.weights, mode.activations, mode.plugin) == (weights, activations, plugin):
            return mode
    by = "with plugins" if plugin else "without plugins"
    known = (f"{mode.weights} weights with {mode.activations} activations" for mode in MODES if mode.plugin == plugin)
    raise UserError(f"{by}: {weights} weights with {activations} activations", expected=" or ".join(known))
