"""Our graph of static SmoothQuant beside NVIDIA's own, node by node.

    python -m tests.servers edge-llm             # makes the exporter's environment
    python -m tests.benchmarks.edge_llm_nodes

One random Llama (2 layers, heads of 64 channels) is exported by `export onnx --act per-tensor --dtype fp16`, and by
TensorRT Edge-LLM's exporter out of `export modelopt`. What is told of both is read from their graphs (`servers.nodes`).
TensorRT Model-Connect writes no graph: it makes TensorRT's network by calls, and its part is read from its sources.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import onnx

from tests.benchmarks.results import publish
from tests.families.case import Case
from tests.servers.edge_llm_graph import edge_llm_export
from tests.servers.environments import EDGE_LLM
from tests.servers.nodes import Nodes

TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
HEADS = {"head_dim": 64}
READ = {  # commit e9132e79f: quantization/formats.py, INT8SmoothQuantFormat; families/llama
    "opset and domains": "none: TensorRT's network by calls",
    "products of a layer": "7: q, k, v, o, gate, up, down",
    "input of a product": "add_quantize, add_dequantize to the body's type (float scale, no zero point)",
    "Q/DQ of inputs": "7 of 7 products",
    "matrix of a product": "float constant in x out, add_quantize and add_dequantize (axis 1, float scale)",
    "behind a product": "what follows it",
    "smoothing at run time": "a product with pre_quant_scale before each Q",
    "attention": "add_attention, decomposable, of queries scaled before it",
    "cache": "add_kv_cache_update with write indices",
    "other inputs": "token_id, position_id, cache_write_indices, key_value_lengths",
    "norms": "by elementwise calls",
    "embedding": "add_gather",
    "head": "in float, by default",
}
WHY = {
    "opset and domains": "TensorRT 10.1 to 11 and ONNX Runtime all read 21; 24 and a plugin want one TensorRT",
    "products of a layer": "matrices that read one input are one in ours: one product in place of three or two",
    "input of a product": "ours multiplies in float32, so that the sum is scaled before it becomes float16. A Cast "
    "before the product makes its type float16; the INT8 kernel stays, by TensorRT-RTX's compiler",
    "Q/DQ of inputs": "one for each input that is read; one for each product in Model-Connect's",
    "matrix of a product": "in x out needs no Transpose; both become INT8 kernels. A float matrix makes a larger file",
    "behind a product": "ours becomes float16 here",
    "smoothing at run time": "ours is folded into norms and linears; Edge-LLM's Mul is by ones here",
    "attention": "ours has ONNX's own operators, which every reader knows; a plugin is one kernel, and knows pages",
    "cache": "ours is copied at every token in this form, and any server can keep it; theirs is written in place",
    "other inputs": "their runtimes hand over lengths, places and tables; ours are Hugging Face's names",
    "norms": "the same arithmetic, in float32",
    "embedding": "Edge-LLM's runtime looks tokens up",
    "head": "in float in all three here; ours may be INT8, too (`--lm-head int8`)",
}


def main() -> None:
    if EDGE_LLM.python is None:
        sys.exit("not measured: python -m tests.servers edge-llm makes the exporter's environment")
    with tempfile.TemporaryDirectory() as scratch:
        case = Case("llama", Path(scratch), HEADS)
        publish("edge_llm_nodes", [], {"ours": ours(case), "theirs": theirs(case)})


def ours(case: Case) -> Mapping[str, str]:
    """What is told of our graph."""
    return Nodes(onnx.load(str(case.export("per-tensor fp16") / "model.onnx")), case.model.geometry.layers).facts()


def theirs(case: Case) -> Mapping[str, str]:
    """What is told of Edge-LLM's graph."""
    give_template(case.folder)
    graph = edge_llm_export(case.export("modelopt"), case.root / "edge-llm")
    return Nodes(graph.model, case.model.geometry.layers).facts()


def give_template(folder: Path) -> None:
    """Give a model's tokenizer a chat template, without which the exporter stops."""
    settings = folder / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"chat_template": TEMPLATE}))


def table(found: Mapping[str, Mapping[str, str]]) -> str:
    """Markdown. found: what is told of both graphs."""
    lines = [f"| | ours | {EDGE_LLM.requirements[0]} | Model-Connect (read) | why |", "|---|---|---|---|---|"]
    for what, here in found["ours"].items():
        lines.append(f"| {what} | {here} | {found['theirs'][what]} | {READ[what]} | {WHY[what]} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
