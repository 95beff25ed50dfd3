"""Run a Hugging Face folder in transformers: an independent reader of our float and W8A8 checkpoints.

    export hf     the smoothed float model, an ordinary checkpoint
    export w8a8   compressed-tensors' int-quantized format; the package must be installed

transformers 5.23 with compressed-tensors 0.20 loads a W8A8 folder like this. Linears keep their int8 weights until the
first forward pass, which decompresses them for good to float32(weight) * weight_scale. From then on every linear
fake-quantizes its input and multiplies in float32:

    static    round(x / input_scale) clamped to [-128, 127]: our numbers, up to float32 rounding
    dynamic   the same with token_scale = token_amax / 127.5, while ours is token_amax / 127

So a dynamic W8A8 folder agrees with `smoothquant.quantization` in accuracy, not in digits, since the two round to
different grids.

compressed-tensors 0.20 mistakes an input of two dimensions for one token. So linears with an input (tokens, in), those
of OPT's MLP and of experts, get it as one sequence. Experts are loaded as linears
(`builders.transformers.linear_experts`). The whole model lies in memory in float32.
"""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import torch
from packaging.version import Version
from torch import Tensor

from builders.engine.protocol import Engine
from builders.transformers.linear_experts import PACKED, linear_experts
from smoothquant.errors import MissingPackageError, UserError, raise_refusal
from smoothquant.outputs import load_manifest
from smoothquant.packages import require
from smoothquant.reading import read_json

OLDEST = "4.56"


class TransformersEngine(Engine):
    """A folder made by `export hf` or `export w8a8`, loaded by AutoModelForCausalLM in float32.

    Raises UserError if the folder is not such an output, or if transformers finds tensors that are missing, left over
    or of another shape; MissingPackageError if transformers is too old, or compressed-tensors is missing for a W8A8
    folder.
    """

    def __init__(self, folder: str | Path) -> None:
        self.manifest = load_manifest(folder)
        quantized = self.manifest.step == "export w8a8"
        here = require("transformers").__version__
        if Version(here) < Version(OLDEST):
            raise MissingPackageError(
                f"transformers {here} is too old to run {folder}",
                expected=f"{OLDEST} or later, whose from_pretrained takes a dtype",
                do=f"pip install 'transformers>={OLDEST}'",
            )
        if quantized:
            require(
                "compressed_tensors",
                "W8A8 checkpoints need compressed-tensors to run in transformers",
                "compressed-tensors",
            )
        with contextlib.redirect_stderr(io.StringIO()):  # two packages draw progress bars
            self.model = _load(Path(folder), quantized)
            self.logits(torch.zeros(1, 1, dtype=torch.int64))  # decompresses

    @torch.no_grad()
    def logits(self, ids: Tensor) -> Tensor:
        """The logits of whole sequences, float32 (batch, tokens, vocab). ids: int64 (batch, tokens)."""
        return self.model(ids, use_cache=False).logits.float()


def _load(folder: Path, quantized: bool) -> Any:
    from transformers import AutoModelForCausalLM

    kind = str(read_json(folder / "config.json").get("model_type", ""))
    experts = linear_experts(kind) if quantized and kind in PACKED else contextlib.nullcontext()
    load: Any = AutoModelForCausalLM.from_pretrained  # its result depends on output_loading_info
    try:
        with experts:
            model, info = load(folder, dtype=torch.float32, output_loading_info=True, trust_remote_code=False)
    except (OSError, ValueError, RuntimeError) as error:
        raise_refusal(error, folder)
        raise UserError(f"{folder}: transformers cannot load it ({error})", do="export it again") from error
    for fault in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[fault]:
            kind = fault.removesuffix("_keys")
            raise UserError(f"{folder}: {kind} tensors for transformers: {', '.join(map(str, sorted(info[fault])))}")
    for module in model.modules():
        if getattr(module, "quantization_scheme", None) is not None:
            module.register_forward_pre_hook(_as_sequence)
            module.register_forward_hook(_as_tokens)
    return model.eval()


def _as_sequence(module: Any, inputs: tuple) -> tuple | None:
    module.takes_tokens = inputs[0].dim() == 2
    return (inputs[0][None], *inputs[1:]) if module.takes_tokens else None


def _as_tokens(module: Any, inputs: tuple, output: Tensor) -> Tensor:
    return output[0] if module.takes_tokens else output
