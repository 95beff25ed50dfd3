"""The published act scales under the names that their files hold, for a model of each of their families.

Names as the released calibration writes them: every nn.Linear of the model in transformers 4, lm_head and routers too.
For OPT and BLOOM the sizes of the published files, known to the byte, are those of exactly these names and shapes in
float32; for the others to the three digits that the Hub shows.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from act_scales.catalogue import CATALOGUE
from act_scales.store import load_act_scales
from recipes.families import FAMILIES, open_model
from smoothquant.errors import ActScalesError
from tests import zoo

WIDE, INNER = 64, 128  # channels, as in the zoo: hidden and, where it is not four times that, of the MLP
LLAMA_ATTENTION = {f"model.layers.{{}}.self_attn.{name}_proj": WIDE for name in "qkvo"}
FUSED = {"self_attention.query_key_value": WIDE, "self_attention.dense": WIDE, "mlp.dense_h_to_4h": WIDE}
PUBLISHED: dict[str, dict[str, int]] = {
    "llama": LLAMA_ATTENTION
    | {f"model.layers.{{}}.mlp.{name}_proj": WIDE for name in ("gate", "up")}
    | {"model.layers.{}.mlp.down_proj": INNER},
    "mixtral": LLAMA_ATTENTION
    | {"model.layers.{}.block_sparse_moe.gate": WIDE}
    | {f"model.layers.{{}}.block_sparse_moe.experts.{n}.{name}": WIDE for n in range(4) for name in ("w1", "w3")}
    | {f"model.layers.{{}}.block_sparse_moe.experts.{n}.w2": INNER for n in range(4)},
    "falcon-7b": {f"transformer.h.{{}}.{name}": width for name, width in FUSED.items()}
    | {"transformer.h.{}.mlp.dense_4h_to_h": 4 * WIDE},
    "opt": {f"model.decoder.layers.{{}}.self_attn.{name}_proj": WIDE for name in ("q", "k", "v", "out")}
    | {"model.decoder.layers.{}.fc1": WIDE, "model.decoder.layers.{}.fc2": INNER},
}
PUBLISHED |= {"mistral": PUBLISHED["llama"], "falcon-40b": PUBLISHED["falcon-7b"], "bloom": PUBLISHED["falcon-7b"]}


@pytest.mark.parametrize("layout", PUBLISHED)
def test_published_names_are_the_models(layout: str, tmp_path: Path) -> None:
    model = open_model(zoo.save(layout, tmp_path))
    names = {name.format(layer): width for name, width in PUBLISHED[layout].items() for layer in range(2)}
    content = {name: torch.rand(width) for name, width in (names | {"lm_head": WIDE}).items()}
    torch.save(content, tmp_path / "published.pt")
    scales = load_act_scales(tmp_path / "published.pt").for_model(model)
    assert scales.input_absmax.keys() == {name for name in names if not name.endswith(".gate")}
    assert all(torch.equal(values, content[name]) for name, values in scales.input_absmax.items())
    for name in scales.input_absmax:  # each of them is needed
        torch.save({other: values for other, values in content.items() if other != name}, tmp_path / "published.pt")
        with pytest.raises(ActScalesError, match=f"no activation scales for {name};"):
            load_act_scales(tmp_path / "published.pt").for_model(model)


def test_routers_may_be_absent(tmp_path: Path) -> None:
    model = open_model(zoo.save("mixtral", tmp_path))
    names = {name.format(layer): width for name, width in PUBLISHED["mixtral"].items() for layer in range(2)}
    content = {name: torch.rand(width) for name, width in names.items() if not name.endswith(".gate")}
    torch.save(content, tmp_path / "published.pt")
    assert load_act_scales(tmp_path / "published.pt").for_model(model).input_absmax.keys() == content.keys()


def test_every_published_family_is_built_in() -> None:
    assert {published.family for published in CATALOGUE} <= {family.name for family in FAMILIES}
