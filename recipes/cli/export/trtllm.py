"""smoothquant export trtllm."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import TYPE_CHECKING

from recipes.cli.export.target import ExportTarget, add_activations
from recipes.cli.ui import Ui
from smoothquant.capacity import Capacity
from smoothquant.errors import UserError
from smoothquant.scheme import PER_TOKEN, SHARED_CACHES, WEIGHTS, quantized_names, scheme_of

if TYPE_CHECKING:
    from exporters.export import Source, Writer
    from exporters.trtllm import Mode
    from smoothquant.model import Model


class TensorRTLLM(ExportTarget):
    name = "trtllm"
    form = "TensorRT-LLM checkpoint"
    summary = "the TensorRT-LLM checkpoint (SmoothQuant)"
    description = (
        "config.json and one file per rank, from which trtllm-build makes engines: smoothquant build tensorrt-llm DIR "
        "--out ENGINE. Llama, Mistral, Qwen2, Phi-3, BLOOM, Falcon (7B, 11B, 40B, 180B), and OPT with --act per-tensor."
    )

    def add_options(self, command: argparse.ArgumentParser) -> None:
        command.add_argument("--tp", type=int, default=1, metavar="N", help="ranks that share every matrix (default 1)")
        command.add_argument("--pp", type=int, default=1, metavar="N", help="stages that share the layers (default 1)")
        add_activations(command)
        command.add_argument(
            "--weights",
            choices=quantized_names(WEIGHTS),
            default=PER_TOKEN.weights.form,
            help="weights: one scale per output channel (accurate, default) or per matrix",
        )
        command.add_argument("--kv", choices=tuple(SHARED_CACHES), help="KV cache (default float)")
        command.add_argument(
            "--dtype",
            choices=("float16", "bfloat16"),
            help="of everything that is not INT8 (default: MODEL's; float16 if that is float32, and for BLOOM, whose "
            "ALiBi SmoothQuant's plugins compute in nothing else)",
        )
        command.add_argument(
            "--runtime-smoother",
            action="store_true",
            help="let the engine divide the inputs of o_proj and down_proj by scales of their own, as NVIDIA's "
            "converter does: smooths them behind GELU, too, and costs a division. Default: folded where that is exact",
        )
        command.add_argument(
            "--no-plugins",
            action="store_true",
            help="W8A8_SQ_PER_CHANNEL, which TensorRT computes itself, without SmoothQuant's plugins: norms as in "
            "MODEL, every input is scaled at run time, activations are static",
        )
        command.add_argument(
            "--trtllm-version",
            metavar="VERSION",
            help="of TensorRT-LLM that will build the engine, 0.20.0 to 1.2.1 (default 1.2.1, the last stable one "
            "to build any): whether it can is checked, and it is recorded; the files are the same for all of them",
        )

    def smoothing(self, arguments: argparse.Namespace, model: Model) -> Capacity:
        from exporters.trtllm import capacity

        found = capacity(_mode(arguments), _dtype(arguments, model))
        if not arguments.runtime_smoother:
            return found
        if arguments.no_plugins:
            raise UserError(
                "--no-plugins and --runtime-smoother",
                expected="one of them: the former does what the latter asks for",
            )
        return replace(found, name="--runtime-smoother", groups=("run-time",))

    def writer(self, arguments: argparse.Namespace, source: Source, ui: Ui) -> Writer:
        from exporters.trtllm import Ranks, TrtllmWriter
        from exporters.trtllm.versions import STABLE

        return TrtllmWriter(
            arguments.out,
            _mode(arguments),
            Ranks(arguments.tp, arguments.pp),
            _dtype(arguments, source.model),
            arguments.trtllm_version or STABLE,
        )

    def measures(self, arguments: argparse.Namespace) -> bool:
        return _mode(arguments).static

    def notes(self, arguments: argparse.Namespace, source: Source, ui: Ui) -> None:
        model = source.model
        window = model.geometry.attention[0].window
        if window is not None and window < model.geometry.max_positions:
            ui.note(
                f"sliding window of {window} tokens: smoothquant build tensorrt-llm and serve-config carry it from the "
                f"manifest; another server has to be told max_attention_window {window}"
            )
        if source.plan and source.plan.float_linears:
            ui.note(
                f"TensorRT-LLM leaves no linear in float: the {len(source.plan.float_linears)} that the plan keeps so "
                "are INT8, as it has rounded them"
            )
        ruined = source.kept("auto") if _mode(arguments).static and source.plan is None else ()
        if ruined:
            ui.warn(
                f"one static scale costs the accuracy of {len(ruined)} linears, as of {ruined[0]}, and TensorRT-LLM "
                "leaves none in float: --act per-token is more accurate"
            )


def _mode(arguments: argparse.Namespace) -> Mode:
    """The quant_algo that these options ask for, and what is INT8. Without plugins, activations are static unless they
    are asked to be otherwise. Raises UserError if there is none."""
    from exporters.trtllm import choose

    scheme = scheme_of(arguments.act or ("per-tensor" if arguments.no_plugins else "per-token"), arguments.weights)
    return choose(replace(scheme, kv_cache=SHARED_CACHES[arguments.kv or "float"]), plugin=not arguments.no_plugins)


def _dtype(arguments: argparse.Namespace, model: Model) -> str:
    from exporters.trtllm import dtype_of

    return arguments.dtype or dtype_of(model, _mode(arguments))
