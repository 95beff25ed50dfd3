"""One layer's attention in ONNX Runtime: our nodes against operators that fuse them.

    python -m tests.benchmarks.attention_forms [--rounds 15]

Forms: the nodes of our graph, opset 21; Attention of opset 23; GroupQueryAttention, ONNX Runtime's own operator, which
takes the causal mask from lengths; the same with one buffer for past and present, into which it writes new keys and
values, where the others copy the cache. 32 heads of 64 channels, 8 kv heads, float32. Forms take turns, and ratios are
of times next to each other. All give the same numbers but for rounding.

Prefill in pieces: what `generate` does with a long prompt. The sum of the times of all pieces counts.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median

import numpy
import onnx
import onnxruntime
from onnx import TensorProto, helper

from builders.engine.generation import PIECE
from builders.onnxruntime.session import SETTINGS
from smoothquant.machine import physical_cores, subnormals_as_zero
from tests.benchmarks.results import Row, publish

HEADS, KV_HEADS, SIZE = 32, 8, 64
OURS, ATTENTION, GROUPED, IN_PLACE = "our nodes", "Attention", "GroupQueryAttention", "GroupQueryAttention in place"
CASES = {  # (tokens of the prompt or behind it, tokens before it), one after another
    "prefill 256": [(256, 0)],
    "prefill 1024": [(1024, 0)],
    f"prefill 1024 in pieces of {PIECE}": [(PIECE, start) for start in range(0, 1024, PIECE)],
    "decode behind 512": [(1, 512)],
    "decode behind 2048": [(1, 2048)],
}
Arrays = Mapping[str, numpy.ndarray]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    rows, details = [], {}
    for case, steps in CASES.items():
        seconds = compare(steps, arguments.rounds)
        details[case] = seconds
        for form in (ATTENTION, GROUPED, IN_PLACE):
            ratios = [ours / other for ours, other in zip(seconds[OURS], seconds[form], strict=True)]
            text = f"{median(ratios):.2f} x as quick as our nodes ({min(ratios):.2f} to {max(ratios):.2f})"
            rows.append(Row(f"{case}, {form}", f"{text}, {median(seconds[form]) * 1e3:.2f} ms"))
    publish("attention_forms", rows, details)


def compare(steps: Sequence[tuple[int, int]], rounds: int) -> dict[str, list[float]]:
    """Seconds of all steps by form, one for each round."""
    runs: dict[str, list[Callable[[], numpy.ndarray]]] = {form: [] for form in (OURS, ATTENTION, GROUPED, IN_PLACE)}
    for tokens, before in steps:
        arrays = inputs(tokens, before)
        for form, made in runs.items():
            made.append(runner(form, arrays))
        expected, *others = (made[-1]() for made in runs.values())
        for other in others:
            numpy.testing.assert_allclose(other, expected, rtol=1e-3, atol=2e-5)
    seconds: dict[str, list[float]] = {form: [] for form in runs}
    for _ in range(rounds):
        for form, made in runs.items():
            begin = time.perf_counter()
            for run in made:
                run()
            seconds[form].append(time.perf_counter() - begin)
    return seconds


def inputs(tokens: int, before: int) -> Arrays:
    """Queries, new keys and values, and the cache."""
    draw = numpy.random.default_rng(0)
    wide = {"q": HEADS, "k": KV_HEADS, "v": KV_HEADS}
    made = {name: draw.standard_normal((1, tokens, heads * SIZE), numpy.float32) for name, heads in wide.items()}
    cache = {name: draw.standard_normal((1, KV_HEADS, before, SIZE), numpy.float32) for name in ("past_k", "past_v")}
    return {**made, **cache}


def runner(form: str, arrays: Arrays) -> Callable[[], numpy.ndarray]:
    """A function that runs a form once and gives its output, (1, tokens, heads * channels)."""
    tokens, before = arrays["q"].shape[1], arrays["past_k"].shape[2]
    nodes, constants = {OURS: _ours, ATTENTION: _attention}.get(form, _grouped)(tokens, before)
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in (*arrays, "y", "k_all", "v_all")]
    graph = helper.make_graph(
        nodes,
        form,
        ports[: len(arrays)],
        ports[len(arrays) :],
        [onnx.numpy_helper.from_array(values, name) for name, values in constants.items()],
    )
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = physical_cores()
    for key, value in SETTINGS.items():
        options.add_session_config_entry(key, value)
    content = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    binding.bind_output("y")
    values = {name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in arrays.items()}
    if form == IN_PLACE:
        for name in ("k", "v"):
            room = numpy.zeros((1, KV_HEADS, before + tokens, SIZE), numpy.float32)
            room[:, :, :before] = arrays[f"past_{name}"]
            values[f"past_{name}"] = onnxruntime.OrtValue.ortvalue_from_numpy(room)
            binding.bind_ortvalue_output(f"{name}_all", values[f"past_{name}"])
    else:
        binding.bind_output("k_all")
        binding.bind_output("v_all")
    for name, value in values.items():
        binding.bind_ortvalue_input(name, value)

    def run() -> numpy.ndarray:
        with subnormals_as_zero():
            session.run_with_iobinding(binding)
        return binding.get_outputs()[0].numpy()

    return run


def _mask(tokens: int, before: int) -> numpy.ndarray:
    return numpy.tril(numpy.ones((tokens, before + tokens), dtype=bool), k=before)


def _ours(tokens: int, before: int) -> tuple[list, dict[str, numpy.ndarray]]:
    group, all_tokens = HEADS // KV_HEADS, before + tokens
    node = helper.make_node
    nodes = [
        node("Reshape", ["q", "by_head"], ["q_heads"]),
        node("Transpose", ["q_heads"], ["q_turned"], perm=[0, 2, 1, 3]),
        node("Reshape", ["q_turned", "by_group"], ["q_groups"]),
        *(
            made
            for name in ("k", "v")
            for made in (
                node("Reshape", [name, "by_kv_head"], [f"{name}_heads"]),
                node("Transpose", [f"{name}_heads"], [f"{name}_new"], perm=[0, 2, 1, 3]),
                node("Concat", [f"past_{name}", f"{name}_new"], [f"{name}_all"], axis=2),
            )
        ),
        node("Transpose", ["k_all"], ["k_turned"], perm=[0, 1, 3, 2]),
        node("MatMul", ["q_groups", "k_turned"], ["products"]),
        node("Mul", ["products", "scale"], ["scaled"]),
        node("Reshape", ["scaled", "apart"], ["scores"]),
        node("Add", ["scores", "mask"], ["masked"]),
        node("Softmax", ["masked"], ["shares"], axis=-1),
        node("Reshape", ["shares", "together"], ["group_shares"]),
        node("MatMul", ["group_shares", "v_all"], ["mixed"]),
        node("Reshape", ["mixed", "mixed_heads"], ["heads"]),
        node("Transpose", ["heads"], ["tokens"], perm=[0, 2, 1, 3]),
        node("Reshape", ["tokens", "flat"], ["y"]),
    ]
    shapes = {
        "by_head": (1, tokens, HEADS, SIZE),
        "by_group": (1, KV_HEADS, group * tokens, SIZE),
        "by_kv_head": (1, tokens, KV_HEADS, SIZE),
        "apart": (1, KV_HEADS, group, tokens, all_tokens),
        "together": (1, KV_HEADS, group * tokens, all_tokens),
        "mixed_heads": (1, HEADS, tokens, SIZE),
        "flat": (1, tokens, HEADS * SIZE),
    }
    constants = {name: numpy.array(shape) for name, shape in shapes.items()}
    mask = numpy.where(_mask(tokens, before), 0, numpy.finfo(numpy.float32).min).astype(numpy.float32)
    return nodes, {**constants, "scale": numpy.array(SIZE**-0.5, numpy.float32), "mask": mask}


def _attention(tokens: int, before: int) -> tuple[list, dict[str, numpy.ndarray]]:
    ports = ["q", "k", "v", "mask", "past_k", "past_v"], ["y", "k_all", "v_all"]
    node = helper.make_node("Attention", *ports, q_num_heads=HEADS, kv_num_heads=KV_HEADS)
    return [node], {"mask": _mask(tokens, before)}


def _grouped(tokens: int, before: int) -> tuple[list, dict[str, numpy.ndarray]]:
    ports = ["q", "k", "v", "past_k", "past_v", "last", "length"], ["y", "k_all", "v_all"]
    node = helper.make_node(
        "GroupQueryAttention", *ports, domain="com.microsoft", num_heads=HEADS, kv_num_heads=KV_HEADS
    )
    length = before + tokens
    return [node], {"last": numpy.array([length - 1], numpy.int32), "length": numpy.array(length, numpy.int32)}


if __name__ == "__main__":
    main()
