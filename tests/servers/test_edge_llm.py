"""TensorRT Edge-LLM's exporter, on the CPU, does with what `export modelopt` writes what the table of readers says.

What it makes is an ONNX graph, which TensorRT compiles on a GPU. Of a folder that the table calls "as written" the
graph holds every int8 matrix with its scales, and every other tensor, to the bit; and its log-probabilities of prompts,
in ONNX's reference evaluator, are as near to our own W8A8 arithmetic as another one can be (`tests.servers.test_vllm`).
A weight_scale that is doubled, or an input_scale that is halved, takes them farther away.

It takes every model for a Llama that it has no class for, and passes over tensors that it has no name for, without a
word: so it is not enough that it makes a graph.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import cached_property
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file
from torch import Tensor

from builders.readers import FolderFacts, Outcome, facts_of, judge
from builders.readers.devices import this_cpu
from recipes.families import open_int8_model
from smoothquant.scheme import scheme_of
from tests import zoo
from tests.benchmarks import edge_llm_nodes
from tests.benchmarks.tables import result
from tests.families.case import Case
from tests.models import sample_ids
from tests.servers.edge_llm_graph import Graph, RefusedError, edge_llm_export
from tests.servers.environments import EDGE_LLM
from tests.servers.test_vllm import CHANGED, WIDE, Record, apart, changed, log_probabilities

pytestmark = [
    pytest.mark.server,
    pytest.mark.skipif(EDGE_LLM.python is None, reason="python -m tests.servers edge-llm makes its environment"),
]

HEADS: dict[str, object] = {"head_dim": 64}
LAYOUTS: dict[str, dict[str, object]] = {
    "llama": HEADS,
    "llama-tied": {},
    "llama-biased": {},
    "llama-scaled": {},
    "mistral": {},
    "mistral-nemo": HEADS,
    "qwen2": {},
    "qwen2-sliding": {},
    "qwen3": HEADS,
    "qwen3-tied": HEADS,
    "qwen3-yarn": HEADS,
    "phi3": {},
    "phi3-sliding": {},
    "phi3-partial": {},
    "gemma2": HEADS,
    "gemma3": HEADS,
    "granite": {},
    "olmo2": {},
    "opt": {},
    "falcon-7b": {},
    "falcon-40b": {},
    "bloom": {},
    "mixtral": {},
    "qwen3-moe-unnormed": HEADS,
}
OTHERS = ("gemma3", "olmo2", "opt", "falcon-7b", "falcon-40b")  # whose graph is of another shape than their own
FACTS: dict[str, FolderFacts] = {
    name: facts_of("modelopt", scheme_of("per-tensor"), zoo.build(name).config.to_dict()) for name in LAYOUTS
}
STATEMENTS = {name: judge(folder, "edge-llm", this_cpu()) for name, folder in FACTS.items()}


def told(outcome: Outcome) -> list[str]:
    """The layouts of which the table says this."""
    return [name for name, statement in STATEMENTS.items() if statement.outcome is outcome]


class Exported:
    """What the exporter makes of one layout."""

    def __init__(self, case: Case) -> None:
        self.case, self.ids = case, sample_ids()
        edge_llm_nodes.give_template(case.folder)
        self.folder = case.export("modelopt")

    @cached_property
    def graph(self) -> Graph:
        return edge_llm_export(self.folder, self.case.root / "edge-llm")

    @cached_property
    def ours(self) -> Tensor:
        """By our own arithmetic."""
        return log_probabilities(self.case.w8a8(self.ids, "per-tensor"), self.ids)

    @cached_property
    def limit(self) -> float:
        """How far two W8A8 arithmetics may be apart."""
        return 2**0.5 * apart(self.ours, log_probabilities(self.case.logits(self.ids), self.ids))

    def off(self, graph: Graph) -> float:
        """How far a graph is from our own arithmetic."""
        return apart(log_probabilities(graph.logits(self.ids, self.case.transformers), self.ids), self.ours)

    @cached_property
    def matrices(self) -> dict[bytes, tuple[Tensor, Tensor]]:
        """weight_scale and input_scale of each linear in the folder, by its int8 numbers."""
        source = open_int8_model(self.folder)
        found = {}
        for layer in range(source.model.geometry.layers):
            for name in source.model.stored:
                linear = source.linear(source.model.family.module(layer, name))
                weights, scales = (source.model.split(name, part) for part in (linear.weight, linear.weight_scale))
                for role, weight in weights.items():
                    assert linear.input_scale is not None
                    found[weight.numpy().tobytes()] = (scales[role], linear.input_scale)
        return found

    def left_out(self) -> list[str]:
        """Names of the tensors in the folder that are not in the graph, but for those of linears."""
        linears = tuple(name for name, _ in self.case.model.linears())
        tensors = load_file(self.folder / "model.safetensors")
        rest = [name for name in tensors if name.endswith(".bias") or not name.startswith(linears)]
        return [name for name in rest if not self.graph.holds(tensors[name])]

    def others(self) -> list[str]:
        """What of the linears in the graph is not what the folder says."""
        found = []
        for number, product in enumerate(self.graph.products):
            scales = self.matrices.get(product.weight.tobytes())
            given = [self.graph.value(name) for name in (product.weight_scale, product.input_scale)]
            if scales is None or not all(
                np.array_equal(one.reshape(other.shape), other.numpy())
                for one, other in zip(given, scales, strict=True)
            ):
                found.append(f"product {number}, {product.weight.shape}")
        return found


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Exported]:
    made: dict[str, Exported] = {}

    def find(name: str) -> Exported:
        if name not in made:
            made[name] = Exported(Case(name, tmp_path_factory.mktemp(name), WIDE | LAYOUTS[name]))
        return made[name]

    return find


def record(keep: Record, name: str, outcome: Outcome, found: str) -> None:
    """Keep what the exporter did, for the table of readers and for the documents."""
    folder = asdict(FACTS[name])
    keep("run", {"reader": "edge-llm", "layout": name, "folder": folder, "outcome": outcome.value, "found": found})
    keep("edge-llm", [name, "per-tensor", f"{outcome.value}: {found}"])


@pytest.mark.parametrize("name", told(Outcome.AS_WRITTEN))
def test_the_graph_holds_our_numbers(name: str, exported: Callable[[str], Exported]) -> None:
    given = exported(name)
    assert given.others() == []
    assert len(given.graph.products) == len(given.matrices)
    assert given.left_out() == []


@pytest.mark.parametrize("name", told(Outcome.AS_WRITTEN))
def test_the_graph_computes_as_written(name: str, exported: Callable[[str], Exported], record_property: Record) -> None:
    """And every scale of the first layer matters."""
    given = exported(name)
    graph, limit = given.graph, given.limit
    off = given.off(graph)
    assert off < limit
    first = graph.products[: len(graph.products) // given.case.model.geometry.layers]
    scales = {product.weight_scale: 2.0 for product in first} | {product.input_scale: 0.5 for product in first}
    found = {scale: given.off(graph.scaled(scale, factor)) for scale, factor in scales.items()}
    assert {scale: other for scale, other in found.items() if other < limit} == {}
    record(record_property, name, Outcome.AS_WRITTEN, f"{off:.3f} of {limit:.3f}")


@pytest.mark.parametrize("kind", CHANGED)
def test_another_scale_in_the_folder_is_seen(kind: str, exported: Callable[[str], Exported], tmp_path: Path) -> None:
    """The control: the same exporter, on a folder with one scale of another size."""
    given = exported("llama")
    other = changed(given.folder, f"model.layers.0.mlp.down_proj.{kind}")
    given.__dict__["graph"], kept = edge_llm_export(other, tmp_path / "out"), given.graph
    try:
        assert len(given.others()) == 1
        assert given.off(given.graph) > given.limit
    finally:
        given.__dict__["graph"] = kept


@pytest.mark.parametrize("name", told(Outcome.WRONG))
def test_what_it_takes_for_a_llama_is_wrong(
    name: str, exported: Callable[[str], Exported], record_property: Record
) -> None:
    """It makes a graph, with a status of 0: tensors of ours are not in it, or it computes something else."""
    given = exported(name)
    left_out = given.left_out()
    if name in OTHERS:
        assert left_out
    else:
        assert given.off(given.graph) > 5 * given.limit
    told = f"{len(left_out)} tensors are left out" if left_out else "another function"
    record(record_property, name, Outcome.WRONG, told)


@pytest.mark.parametrize("name", told(Outcome.REFUSED))
def test_it_is_refused(name: str, exported: Callable[[str], Exported], record_property: Record) -> None:
    said = STATEMENTS[name].said
    assert said
    with pytest.raises(RefusedError) as caught:
        _ = exported(name).graph
    assert said in str(caught.value)
    record(record_property, name, Outcome.REFUSED, said)


def test_its_nodes_are_those_of_the_table(tmp_path: Path) -> None:
    found = edge_llm_nodes.theirs(Case("llama", tmp_path, edge_llm_nodes.HEADS))
    assert found == result("edge_llm_nodes")["details"]["theirs"]


def test_the_table_knows_every_layout() -> None:
    assert told(Outcome.UNKNOWN) == []
