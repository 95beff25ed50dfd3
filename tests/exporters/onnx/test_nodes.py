"""The table of our nodes beside NVIDIA's is of the graph that we write today."""

from __future__ import annotations

from pathlib import Path

from tests.benchmarks import edge_llm_nodes
from tests.benchmarks.tables import result
from tests.families.case import Case


def test_our_nodes_are_those_of_the_table(tmp_path: Path) -> None:
    found = edge_llm_nodes.ours(Case("llama", tmp_path, edge_llm_nodes.HEADS))
    assert found == result("edge_llm_nodes")["details"]["ours"]
    assert found.keys() == edge_llm_nodes.READ.keys() == edge_llm_nodes.WHY.keys()
