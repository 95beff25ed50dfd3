"""The ranks' files, put together again by the format's rules, are the unsharded file."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from exporters.export import Source
from exporters.trtllm import MODES, Mode
from exporters.trtllm.sharding import divided, padded, repeated_heads, whole
from recipes.families import open_model
from smoothquant.family import Geometry
from tests import zoo
from tests.exporters.trtllm.checkpoints import STATIC, makers, ranks, write

LAYER = "transformer.layers."
COLUMN, ROW = ("attention.qkv", "mlp.fc", "mlp.gate"), ("attention.dense", "mlp.proj")
WIDE = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 16}  # 128 channels of queries, hidden 64
LAYOUTS = {
    "llama": {},
    "llama-tied": {"vocab_size": 287},
    "llama-biased": WIDE,
    "qwen2": {"vocab_size": 285},
    "falcon-7b": {},
    "falcon-40b": {"num_attention_heads": 8},
    "falcon-11b": {},
    "bloom": {"vocab_size": 290},
    "opt": {},
    "phi3": {},
}


@pytest.fixture(scope="module")
def source_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Source]:
    return makers(tmp_path_factory, LAYOUTS)


def reassembled(parts: list[dict[str, Tensor]], geometry: Geometry) -> dict[str, Tensor]:
    """The unsharded tensors of one stage, from the rules of the format alone (and its kv heads, repeated)."""
    return {name: joined(name, [part[name] for part in parts], geometry) for name in parts[0]}


def joined(name: str, parts: list[Tensor], geometry: Geometry) -> Tensor:
    module, _, kind = name.removeprefix(LAYER).partition(".")[2].rpartition(".")
    if name == "lm_head.weight":
        rows = torch.cat(parts)
        assert not rows[geometry.vocab_size :].any()
        return rows[: geometry.vocab_size]
    one_each = parts[0].numel() == 1 or kind in ("act_scale", "activation_scaling_factor")
    if module in COLUMN and not one_each and kind != "prequant_scaling_factor":
        dim = 1 if kind == "per_channel_scale" else 0
        return qkv(parts, dim, geometry) if module == "attention.qkv" else torch.cat(parts, dim)
    if module in ROW and kind in ("weight", "smoother"):
        return torch.cat(parts, 1)
    if module in ROW and kind == "prequant_scaling_factor":
        return torch.cat(parts)
    for part in parts:
        assert part.equal(parts[0]), name
    return parts[0]


def qkv(parts: list[Tensor], dim: int, geometry: Geometry) -> Tensor:
    """q, k and v from the ranks' shares of them; a kv head that several ranks have is the same on all of them."""
    tp, head = len(parts), geometry.head_dim
    queries, keys = geometry.heads // tp * head, max(1, geometry.kv_heads // tp) * head
    shares = zip(*(part.split([queries, keys, keys], dim) for part in parts), strict=True)
    q, *kv = (list(share) for share in shares)
    times = max(1, tp // geometry.kv_heads)
    for share in kv:
        for rank, part in enumerate(share):
            assert part.equal(share[rank // times * times])
    return torch.cat([torch.cat(q, dim), *(torch.cat(share[::times], dim) for share in kv)], dim)


CASES = [
    pytest.param(name, mode, id=f"{name}-{mode.algo}")
    for name in LAYOUTS
    for mode in MODES
    if mode.static or name != "opt"
]


@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize(("name", "mode"), CASES)
def test_ranks_reassemble(name: str, mode: Mode, tp: int, source_of: Callable[[str], Source], tmp_path: Path) -> None:
    source = source_of(name)
    one = source.model.checkpoint.folder.parent / mode.algo
    (unsharded,) = ranks(write(source, one, mode, kv="int8"))  # the second time it is there already
    parts = ranks(write(source, tmp_path / "many", mode, tp=tp, kv="int8"))
    assert len(parts) == tp
    found = reassembled(parts, source.model.geometry)
    assert found.keys() == unsharded.keys()
    for key, expected in unsharded.items():
        assert found[key].dtype == expected.dtype, key
        assert found[key].equal(expected), key


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.algo)
@pytest.mark.parametrize("tp", [1, 4])
def test_stages_reassemble(tp: int, mode: Mode, source_of: Callable[[str], Source], tmp_path: Path) -> None:
    source = source_of("llama-tied")
    (unsharded,) = ranks(write(source, tmp_path / "one", mode))
    parts = ranks(write(source, tmp_path / "many", mode, tp=tp, pp=2))
    found = {}
    for stage in range(2):
        for key, tensor in reassembled(parts[stage * tp : (stage + 1) * tp], source.model.geometry).items():
            if key.startswith(LAYER):
                assert key.startswith(f"{LAYER}0.")  # names start anew on every stage
                key = key.replace(f"{LAYER}0.", f"{LAYER}{stage}.")
            assert key not in found
            found[key] = tensor
    assert found.keys() == unsharded.keys()
    for key, expected in unsharded.items():
        assert found[key].equal(expected), key
    outside = [{key for key in part if not key.startswith(LAYER)} for part in parts]
    assert outside[:tp] == [{"transformer.vocab_embedding.weight"}] * tp
    assert outside[tp:] == [{"transformer.ln_f.weight", "lm_head.weight"}] * tp


def test_a_rank_has_what_the_engine_asks_for(source_of: Callable[[str], Source], tmp_path: Path) -> None:
    """With 2 kv heads on 4 ranks, each has one, which NVIDIA's converter gets wrong (32 rows instead of 48)."""
    for part in ranks(write(source_of("llama"), tmp_path / "out", tp=4)):
        assert part[f"{LAYER}0.attention.qkv.weight"].shape == ((1 + 2) * 16, 64)
        assert part[f"{LAYER}0.attention.qkv.per_channel_scale"].shape == (1, (1 + 2) * 16)
        assert part[f"{LAYER}0.attention.dense.weight"].shape == (64, 16)
    biased = ranks(write(source_of("llama-biased"), tmp_path / "biased", tp=4))[3]
    assert biased[f"{LAYER}0.attention.qkv.bias"].shape == ((2 + 2) * 16,)
    assert biased[f"{LAYER}0.attention.dense.weight"].shape == (64, 2 * 16)  # not hidden / tp
    assert biased[f"{LAYER}0.attention.dense.bias"].shape == (64,)


def test_tied_and_padded_vocabulary(source_of: Callable[[str], Source], tmp_path: Path) -> None:
    """An lm_head of its own, padded; the embedding stays as it is."""
    parts = ranks(write(source_of("llama-tied"), tmp_path / "out", tp=4))
    assert [part["lm_head.weight"].shape[0] for part in parts] == [72] * 4
    embedding = parts[0]["transformer.vocab_embedding.weight"]
    assert embedding.shape == (287, 64)
    assert torch.cat([part["lm_head.weight"] for part in parts])[:287].equal(embedding)
    assert not parts[3]["lm_head.weight"][-1].any()


def test_phi3_is_a_llama(source_of: Callable[[str], Source], tmp_path: Path) -> None:
    """The same weights in a Llama's checkpoint come to the same bytes."""
    phi = source_of("phi3")
    folder, sizes = tmp_path / "llama", {"qkv_proj": (64, 32, 32), "gate_up_proj": (128, 128)}
    names = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}

    def apart(found: Mapping[str, Tensor], rows: bool = True) -> dict[str, Tensor]:
        split = {}
        for key, tensor in found.items():
            fused = next((name for name in names if name in key), None)
            if fused is None:
                split[key] = tensor
                continue
            parts = tensor.split(sizes[fused]) if rows else [tensor] * len(names[fused])
            split |= {key.replace(fused, name): part.clone() for name, part in zip(names[fused], parts, strict=True)}
        return split

    zoo.save("llama", folder)  # config and tokenizer
    save_file(apart(load_file(phi.model.checkpoint.folder / "model.safetensors")), folder / "model.safetensors")
    llama = replace(
        phi,
        model=open_model(folder),
        input_absmax=apart(phi.input_absmax or {}, rows=False),
        output_absmax=apart(phi.output_absmax),
    )
    for source, out in ((phi, "a"), (llama, "b")):
        write(source, tmp_path / out, STATIC, tp=2, kv="int8")
    for file in ("rank0.safetensors", "rank1.safetensors", "config.json"):
        found, expected = ((tmp_path / out / file).read_bytes() for out in "ab")
        if file == "config.json":
            found, expected = ({**json.loads(text), "norm_epsilon": 0} for text in (found, expected))
        assert found == expected, file


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 6), st.sampled_from([1, 2, 4, 8]))
def test_repeated_heads(kv_heads: int, head_dim: int, columns: int, tp: int) -> None:
    tensor = torch.arange(kv_heads * head_dim * columns).view(-1, columns)
    if kv_heads % tp and tp % kv_heads:
        return
    found = repeated_heads(tensor, kv_heads, tp).view(-1, head_dim, columns)
    heads = tensor.view(kv_heads, head_dim, columns)
    assert len(found) == max(kv_heads, tp)
    for index, head in enumerate(found):
        assert head.equal(heads[index * kv_heads // len(found)])


@given(st.integers(1, 1000), st.integers(1, 16))
def test_padded(rows: int, tp: int) -> None:
    assert padded(rows, tp) % tp == 0
    assert 0 <= padded(rows, tp) - rows < tp


def test_parts() -> None:
    tensor = torch.arange(16).view(4, 4)
    assert whole(tensor).of(3, 4).equal(tensor)
    assert divided(1, tensor).of(1, 2).equal(tensor[:, 2:])
    assert divided(0, tensor, tensor + 16).of(0, 2).equal(torch.cat([tensor[:2], tensor[:2] + 16]))
    assert divided(0, tensor, tensor + 16).of(0, 1).equal(torch.cat([tensor, tensor + 16]))
