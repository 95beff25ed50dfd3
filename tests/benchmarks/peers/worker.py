"""One engine in a process of its own: python -m tests.benchmarks.peers.worker KIND FOLDER THREADS (`loop`)."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import torch

from builders.engine.generation import pieces
from builders.onnxruntime import OnnxRuntimeEngine
from builders.onnxruntime.session import first_feed, open_session
from builders.openvino import graph
from builders.openvino.engine import OpenVinoRequest
from smoothquant.artifacts.ports import (
    ATTENTION_MASK,
    INPUT_IDS,
    LOGITS,
    LOGITS_TO_KEEP,
    POSITION_IDS,
    PRESENT,
    past_of,
)
from smoothquant.machine import subnormals_as_zero
from tests.benchmarks.peers.llama_cpp import LlamaCpp
from tests.benchmarks.peers.loop import PeerEngine, Rows, UnderWay, serve

LONGEST = 2048


def vocabulary_of(folder: Path) -> int:
    return int(json.loads((folder / "config.json").read_text(encoding="utf-8"))["vocab_size"])


class StandardGraph(PeerEngine):
    """A graph of ONNX operators in ONNX Runtime: prompts side by side, in pieces."""

    def __init__(self, folder: Path, threads: int) -> None:
        self.session, self.vocabulary = open_session(folder, threads=threads), vocabulary_of(folder)

    def start(self, rows: Rows) -> StandardBatch:
        return StandardBatch(self.session, rows)

    def logits(self, ids: numpy.ndarray) -> numpy.ndarray:
        with subnormals_as_zero():
            return numpy.asarray(self.session.run([LOGITS], first_feed(self.session, ids))[0])


class StandardBatch(UnderWay):
    """Sequences whose cache stays inside the runtime."""

    def __init__(self, session: Any, rows: Rows) -> None:
        import onnxruntime

        self._session, self._value = session, onnxruntime.OrtValue.ortvalue_from_numpy
        names = [value.name for value in session.get_outputs() if value.name.startswith(PRESENT)]
        self._ports = [(name, past_of(name)) for name in names]
        feed = first_feed(session, numpy.zeros((len(rows), 0), dtype=numpy.int64))
        self._cache = [self._value(feed[past]) for _, past in self._ports]
        self._binding, self._tokens, self._batch = session.io_binding(), 0, len(rows)
        for positions in pieces(range(len(rows[0]))):
            self._run(numpy.array(rows, dtype=numpy.int64)[:, positions[0] : positions[-1] + 1])

    def step(self) -> None:
        self._run(numpy.ones((self._batch, 1), dtype=numpy.int64))

    def _run(self, ids: numpy.ndarray) -> None:
        binding, before = self._binding, self._tokens
        self._tokens += ids.shape[1]
        positions = numpy.arange(before, self._tokens, dtype=numpy.int64)
        binding.bind_cpu_input(INPUT_IDS, numpy.ascontiguousarray(ids))
        binding.bind_cpu_input(POSITION_IDS, numpy.tile(positions, (self._batch, 1)))
        binding.bind_cpu_input(ATTENTION_MASK, numpy.ones((self._batch, self._tokens), dtype=numpy.int64))
        binding.bind_ortvalue_input(LOGITS_TO_KEEP, self._value(numpy.ones(1, dtype=numpy.int64)))
        binding.bind_output(LOGITS)
        for (present, past), value in zip(self._ports, self._cache, strict=True):
            binding.bind_ortvalue_input(past, value)
            binding.bind_output(present)
        with subnormals_as_zero():
            self._session.run_with_iobinding(binding)
        _, *self._cache = binding.get_outputs()


class GroupedGraph(PeerEngine):
    """Our engine with grouped attention, as `smoothquant serve` drives it: prompt after prompt, steps together."""

    def __init__(self, folder: Path, threads: int) -> None:
        self.engine, self.vocabulary = OnnxRuntimeEngine(folder, threads=threads), vocabulary_of(folder)

    def start(self, rows: Rows) -> GroupedBatch:
        return GroupedBatch(self.engine, rows)

    def logits(self, ids: numpy.ndarray) -> numpy.ndarray:
        return self.engine.logits(torch.from_numpy(ids)).numpy()


class GroupedBatch(UnderWay):
    def __init__(self, engine: OnnxRuntimeEngine, rows: Rows) -> None:
        self._slots = engine.slots(len(rows), LONGEST)
        self._open = [self._slots.open() for _ in rows]
        for slot, row in zip(self._open, rows, strict=True):
            for piece in pieces(row):
                self._slots.append(slot, piece)

    def step(self) -> None:
        self._slots.step(dict.fromkeys(self._open, 1))


class OpenVino(PeerEngine):
    """A graph in OpenVINO: ours, compiled as our engine compiles it, or one that its own tool wrote. precision: of what
    is not quantized."""

    def __init__(self, folder: Path, threads: int, precision: str = "f32") -> None:
        graph.SETTINGS["INFERENCE_PRECISION_HINT"] = precision
        self.vocabulary = vocabulary_of(folder)
        if (folder / "openvino.xml").exists():
            import openvino

            settings = {**graph.SETTINGS, "INFERENCE_NUM_THREADS": threads}
            model = openvino.Core().compile_model(folder / "openvino.xml", graph.DEVICE, settings)
            self.graph = graph.CompiledGraph(folder, model, keeps=True)
        else:
            self.graph = graph.compile_graph(folder, threads)

    def start(self, rows: Rows) -> OpenVinoBatch:
        return OpenVinoBatch(self.graph, rows)

    def logits(self, ids: numpy.ndarray) -> numpy.ndarray:
        return OpenVinoRequest(self.graph, len(ids)).run(ids, keep=0)


class OpenVinoBatch(UnderWay):
    def __init__(self, compiled: graph.CompiledGraph, rows: Rows) -> None:
        self._request, self._batch = OpenVinoRequest(compiled, len(rows)), len(rows)
        for positions in pieces(range(len(rows[0]))):
            self._request.run(numpy.array(rows, dtype=numpy.int64)[:, positions[0] : positions[-1] + 1], keep=1)

    def step(self) -> None:
        self._request.run(numpy.ones((self._batch, 1), dtype=numpy.int64), keep=1)


class Torch(PeerEngine):
    """The model in transformers: in bfloat16, as it is or compiled, or with torchao's INT8 (weights per row,
    activations per token)."""

    def __init__(self, folder: Path, threads: int, dtype: torch.dtype, torchao: bool = False) -> None:
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(threads)
        self.model, self.vocabulary = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype), vocabulary_of(folder)
        if torchao:
            from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

            quantize_(self.model, Int8DynamicActivationInt8WeightConfig())

    def start(self, rows: Rows) -> TorchBatch:
        return TorchBatch(self.model, rows)

    def logits(self, ids: numpy.ndarray) -> numpy.ndarray:
        with torch.inference_mode():
            return self.model(torch.from_numpy(ids)).logits.float().numpy()


class TorchBatch(UnderWay):
    def __init__(self, model: Any, rows: Rows) -> None:
        from transformers import DynamicCache

        self._model, self._cache, self._batch = model, DynamicCache(config=model.config), len(rows)
        self._run(rows)

    def step(self) -> None:
        self._run([[1]] * self._batch)

    def _run(self, rows: Rows) -> None:
        with torch.inference_mode():
            self._model(torch.tensor(rows), past_key_values=self._cache, logits_to_keep=1)


class Genai(PeerEngine):
    """The model by onnxruntime-genai's own builder."""

    def __init__(self, folder: Path, threads: int) -> None:
        import onnxruntime_genai

        settings = onnxruntime_genai.Config(str(folder))
        sessions = {"intra_op_num_threads": threads, "inter_op_num_threads": 1}
        settings.overlay(json.dumps({"model": {"decoder": {"session_options": sessions}}}))
        self.genai, self.model = onnxruntime_genai, onnxruntime_genai.Model(settings)
        self.vocabulary = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))["model"]["vocab_size"]

    def start(self, rows: Rows) -> GenaiBatch:
        return GenaiBatch(self.genai, self.model, rows, len(rows[0]) + 256)

    def logits(self, ids: numpy.ndarray) -> numpy.ndarray:
        sequences = GenaiBatch(self.genai, self.model, ids.tolist(), LONGEST)
        return numpy.asarray(sequences.generator.get_output("logits"), dtype=numpy.float32)


class GenaiBatch(UnderWay):
    def __init__(self, genai: Any, model: Any, rows: Rows, longest: int) -> None:
        parameters = genai.GeneratorParams(model)
        parameters.set_search_options(max_length=longest, do_sample=False, batch_size=len(rows), min_length=longest)
        self.generator, self._batch = genai.Generator(model, parameters), len(rows)
        self.generator.append_tokens(numpy.array(rows, dtype=numpy.int32))
        torch.set_flush_denormal(False)  # its sessions set it for the thread that calls them, and leave it so
        if self._batch > 1:
            self.generator.generate_next_token()  # takes tokens from the logits that are there

    def step(self) -> None:
        if self._batch > 1:  # a batch takes no tokens but its own
            self.generator.generate_next_token()
        else:
            self.generator.append_tokens(numpy.ones((1, 1), dtype=numpy.int32))


KINDS: dict[str, Callable[[Path, int], PeerEngine]] = {
    "standard": StandardGraph,
    "grouped": GroupedGraph,
    "openvino": OpenVino,
    "openvino-bf16": partial(OpenVino, precision="bf16"),
    "torch-bf16": partial(Torch, dtype=torch.bfloat16),
    "torchao": partial(Torch, dtype=torch.float32, torchao=True),
    "genai": Genai,
    "llama.cpp": LlamaCpp,
}

if __name__ == "__main__":
    kind, place, number = sys.argv[1:]
    serve(lambda: KINDS[kind](Path(place), int(number)))
