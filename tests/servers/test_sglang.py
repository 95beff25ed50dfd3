"""SGLang, without a GPU: the class of its loader that holds static scales is taken out of the wheel and run.

The rest of SGLang imports its CUDA package. What its other files say is read, and stands in the table as read.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from builders.readers import Outcome, facts_of, judge
from builders.readers.devices import this_cpu
from smoothquant.scheme import scheme_of
from tests import zoo
from tests.servers.environments import SGLANG

pytestmark = [
    pytest.mark.server,
    pytest.mark.skipif(SGLANG.python is None, reason="python -m tests.servers sglang unpacks SGLang's wheel"),
]
STUBS: dict[str, dict] = {  # what the file imports of SGLang
    "sglang": {},
    "sglang.srt": {},
    "sglang.srt.environ": {"envs": None},
    "sglang.srt.layers": {},
    "sglang.srt.layers.utils": {"pad_or_narrow_weight": None},
    "sglang.srt.utils": {"is_cpu": lambda: False},
}


@pytest.fixture
def parameter(monkeypatch: pytest.MonkeyPatch) -> type:
    """`PerTensorScaleParameter` of the wheel."""
    for name, content in STUBS.items():
        module = types.ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    [path] = SGLANG.folder.glob("lib/python*/site-packages/sglang/srt/layers/parameter.py")
    content: dict = {"__name__": "sglang.srt.layers.parameter"}
    exec(compile(Path(path).read_text(encoding="utf-8"), path, "exec"), content)
    return content["PerTensorScaleParameter"]


def test_a_static_scale_has_no_room_for_q_k_and_v(
    parameter: type, record_property: Callable[[str, object], None]
) -> None:
    """`CompressedTensorsW8A8Int8.create_weights` makes room for one number; its loader then asks for three."""
    folder = facts_of("compressed-tensors", scheme_of("per-tensor"), zoo.build("llama").config.to_dict())
    room = parameter(data=torch.empty(1), weight_loader=lambda *_: None)
    room.load_qkv_weight(torch.tensor([0.5]), shard_id="q", tp_rank=0)
    statement = judge(folder, "sglang", this_cpu())
    with pytest.raises(IndexError) as caught:
        room.load_qkv_weight(torch.tensor([0.5]), shard_id="k", tp_rank=0)
    assert statement.outcome is Outcome.REFUSED
    assert statement.said in str(caught.value)
    found = {"reader": "sglang", "layout": "llama", "folder": asdict(folder)}
    record_property("run", found | {"outcome": Outcome.REFUSED.value, "found": str(caught.value)})
