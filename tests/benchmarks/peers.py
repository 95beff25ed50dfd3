"""Our engines for CPUs beside those of others, on the same random Llama: a prompt, and tokens behind it.

    pip install onnx-ir torchao       # wanted by onnxruntime-genai's builder, and a peer
    python -m tests.benchmarks.peers [--hidden 2048 --layers 4 --vocab 32000 --rounds 7]

Every engine keeps a cache and computes the logits of the last token alone, where its form lets it. Engines take turns;
ratios are of times next to each other in one round, over the FP32 graph in ONNX Runtime. Peers whose packages are
missing are left out. How near an engine comes to the float model is another question: rounding per tensor while it runs
(`quantize_dynamic`) spoils every token that shares a batch with an outlier.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import onnxruntime_genai
import torch
from onnxruntime.quantization import QuantType, quantize_dynamic
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedTokenizerFast

from builders import openvino
from builders.onnxruntime import OnnxRuntimeEngine
from builders.onnxruntime.providers import find_provider
from builders.onnxruntime.session import open_session
from builders.openvino import OpenVinoEngine
from smoothquant.artifacts.ports import MODEL
from smoothquant.machine import physical_cores
from smoothquant.outputs import load_manifest
from tests.benchmarks.engine_speed import BASE as FLOAT
from tests.benchmarks.engine_speed import export_all
from tests.benchmarks.results import Row, publish, ratio_text
from tests.servers.quantizers import ENVIRONMENT  # without our path: genai's builder has a package builders, too

BASE = "ONNX Runtime, FP32"
CASES = {"prefill 256": (256, 0), "prefill 1024": (1024, 0), "decode behind 512": (512, 16)}  # prompt, tokens behind it
LONGEST = 2048


class UnderWay(Protocol):
    """A sequence under way."""

    def step(self, token: int) -> None:
        """Append a token and compute its logits."""


Start = Callable[[Sequence[int]], UnderWay]  # from a prompt to the sequence behind it


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(physical_cores())
    with tempfile.TemporaryDirectory() as scratch:
        engines = open_all(Path(scratch), arguments.hidden, arguments.layers, arguments.vocab)
        found = compare(engines, arguments.vocab, arguments.rounds)
    rows = [
        Row(f"{what}, {name}", ratio_text(seconds, by_engine[BASE]))
        for what, by_engine in found.items()
        for name, seconds in by_engine.items()
    ]
    publish("peers", rows, found)


def open_all(scratch: Path, hidden: int, layers: int, vocabulary: int) -> dict[str, Start]:
    """Every engine by its name."""
    folders, model = export_all(scratch, hidden, layers, vocabulary), scratch / "model"
    words = {f"<{number}>": number for number in range(vocabulary)}
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, "<0>"))).save_pretrained(model)
    made: dict[str, Start] = {
        BASE: OnnxRuntimeEngine(folders[FLOAT]).start,
        "ours, float head": OnnxRuntimeEngine(folders["W8A8, float head"]).start,
        "ours, INT8 head": OnnxRuntimeEngine(folders["W8A8, INT8 head"]).start,
    }
    for name, form in (("ours in OpenVINO, INT8 head", "W8A8, INT8 head"), ("OpenVINO, FP32", FLOAT)):
        openvino.build(folders[form], scratch / name)
        made[name] = OpenVinoEngine(scratch / name).start
    made["ONNX Runtime, quantize_dynamic"] = DynamicEngine(folders[FLOAT], scratch / "dynamic").start
    made["PyTorch, bfloat16"] = Torch(model).start
    if find_spec("torchao"):
        made["torchao, INT8 dynamic"] = Torch(model, torchao=True).start
    if find_spec("onnx_ir"):
        for precision in ("int8", "int4"):
            built = scratch / f"genai-{precision}"
            build = ["-m", "onnxruntime_genai.models.builder", "-e", "cpu", "-p", precision]
            places = ["-i", model, "-o", built, "-c", scratch / "cache"]
            command = [sys.executable, *build, *map(str, places)]
            subprocess.run(command, check=True, capture_output=True, cwd=scratch, env=ENVIRONMENT)
            made[f"onnxruntime-genai, {precision}"] = Genai(built).start
    return made


class DynamicEngine(OnnxRuntimeEngine):
    """A float graph by ONNX Runtime's own tool: INT8 per column, activations per tensor while it runs."""

    def __init__(self, export: Path, folder: Path) -> None:
        folder.mkdir()
        options: dict[str, Any] = {"weight_type": QuantType.QInt8, "per_channel": True}
        where = {"op_types_to_quantize": ["MatMul"], "use_external_data_format": True}
        quantize_dynamic(export / MODEL, folder / MODEL, **options, **where)
        self.folder, self.manifest = folder, load_manifest(export)
        self.provider, self.session = find_provider("cpu"), open_session(folder)


class Torch:
    """The model in transformers: in bfloat16, or with torchao's INT8 (weights per row, activations per token)."""

    def __init__(self, folder: Path, torchao: bool = False) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32 if torchao else torch.bfloat16)
        if torchao:
            from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

            quantize_(self.model, Int8DynamicActivationInt8WeightConfig())

    def start(self, prompt: Sequence[int]) -> TorchSequence:
        return TorchSequence(self.model, prompt)


class TorchSequence:
    def __init__(self, model: Any, prompt: Sequence[int]) -> None:
        self._model, self._cache = model, DynamicCache(config=model.config)
        self._run(prompt)

    def step(self, token: int) -> None:
        self._run([token])

    def _run(self, ids: Sequence[int]) -> None:
        with torch.inference_mode():
            self._model(torch.tensor([ids]), past_key_values=self._cache, logits_to_keep=1)


class Genai:
    """The model by onnxruntime-genai's own builder."""

    def __init__(self, folder: Path) -> None:
        self.model = onnxruntime_genai.Model(str(folder))

    def start(self, prompt: Sequence[int]) -> GenaiSequence:
        return GenaiSequence(self.model, prompt)


class GenaiSequence:
    def __init__(self, model: onnxruntime_genai.Model, prompt: Sequence[int]) -> None:
        parameters = onnxruntime_genai.GeneratorParams(model)
        parameters.set_search_options(max_length=LONGEST, do_sample=False)
        self._generator = onnxruntime_genai.Generator(model, parameters)
        self._generator.append_tokens(list(prompt))
        torch.set_flush_denormal(False)  # its sessions set it for the thread that calls them, and leave it so

    def step(self, token: int) -> None:
        self._generator.append_tokens([token])


def compare(engines: Mapping[str, Start], vocabulary: int, rounds: int) -> dict[str, dict[str, list[float]]]:
    """By case and engine the seconds of a prompt, or of one token behind it, one for each round. Engines take turns,
    after a turn to warm up."""
    found: dict[str, dict[str, list[float]]] = {what: {name: [] for name in engines} for what in CASES}
    for turn in range(rounds + 1):
        for what, (prompt, behind) in CASES.items():
            for name, start in engines.items():
                begin = time.perf_counter()
                sequence = start([token % vocabulary for token in range(prompt)])
                ready = time.perf_counter()
                for _ in range(behind):
                    sequence.step(1)
                end = time.perf_counter()
                if turn:
                    found[what][name].append((end - ready) / behind if behind else ready - begin)
    return found


if __name__ == "__main__":
    main()
