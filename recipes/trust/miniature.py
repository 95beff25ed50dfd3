"""A config.json cut down to a model that is built and run in a second, with everything kept that its kind has.

layers      as few as show every kind of layer (windowed or not, each rotary embedding), two at least
heads       a few, in the same groups; head_dim and the ratio of hidden size to heads stay
window      WINDOW tokens, and the rotary embeddings' original length ORIGINAL: both shorter than the sequence
the rest    an MLP of 96 channels, 320 tokens, at most 16 experts; everything else as it stands in the file
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from smoothquant.family import Geometry

VOCABULARY, INNER, EXPERTS = 320, 96, 16
WINDOW, ORIGINAL, TOKENS = 16, 24, 48  # newest keys that a query sees; trained length; tokens of the comparison
HEADS = 4  # query heads for each kv head, at most
DEEPEST = 12  # layers, at most
LAYERS = ("num_hidden_layers", "n_layer")
QUERY_HEADS = ("num_attention_heads", "n_head")
KV_HEADS = ("num_key_value_heads", "num_kv_heads")
HIDDEN = ("hidden_size", "n_embed")
INNERS = ("intermediate_size", "ffn_dim", "ffn_hidden_size", "moe_intermediate_size")
EXPERT_COUNTS = ("num_local_experts", "num_experts")
CHOSEN = ("num_experts_per_tok",)
DROPPED = ("torch_dtype", "dtype", "auto_map", "quantization_config", "bos_token_id", "eos_token_id")


def cut_down(content: Mapping[str, Any], geometry: Geometry, known: Any, original: int = ORIGINAL) -> dict[str, Any]:
    """The cut config.json. geometry: of the whole model; known: transformers' configuration of it; original: length
    that scaled rotary embeddings start from."""
    cut = {key: copy.deepcopy(value) for key, value in content.items() if key not in DROPPED}
    if getattr(known, "pad_token_id", None) is not None:  # of another vocabulary; transformers takes none from outside
        cut["pad_token_id"] = None if -known.vocab_size <= known.pad_token_id < known.vocab_size else VOCABULARY
    group, kv_heads = geometry.heads // geometry.kv_heads, _few(geometry.kv_heads, 2)
    heads = _few(group, HEADS) * kv_heads
    hidden = geometry.hidden_size // geometry.heads * heads
    _put(cut, known, QUERY_HEADS, heads)
    _put(cut, known, HIDDEN, hidden)
    _put(cut, known, ("vocab_size",), VOCABULARY)
    if any(name in cut for name in KV_HEADS) or getattr(known, KV_HEADS[0], geometry.heads) != geometry.heads:
        _put(cut, known, KV_HEADS, kv_heads)
    for step, name in enumerate(INNERS):
        if getattr(known, name, None) is not None:
            cut[name] = INNER + 16 * step
    if geometry.experts:
        experts = min(geometry.experts, EXPERTS)
        _put(cut, known, EXPERT_COUNTS, experts)
        _put(cut, known, CHOSEN, min(geometry.experts_per_token, max(1, experts // 2)))
    if cut.get("word_embed_proj_dim"):
        cut["word_embed_proj_dim"] = hidden if geometry.embedded_size == geometry.hidden_size else hidden // 2
    _cut_layers(cut, geometry, known)
    if any(kind.window for kind in geometry.attention) or cut.get("sliding_window"):
        cut["sliding_window"] = WINDOW
    _cut_positions(cut, original)
    return cut


def _cut_layers(cut: dict[str, Any], geometry: Geometry, known: Any) -> None:
    """Keep a layer of every kind: the first of each where the file lists its layers, else all layers before it."""
    kinds = _kinds(geometry, known)
    first = [kinds.index(kind) for kind in dict.fromkeys(kinds)]
    if cut.get("max_window_layers") and first[-1] >= DEEPEST:  # these many have no window, and the others have one
        cut["max_window_layers"], first = 1, [0, 1]
    lists = [key for key, value in cut.items() if isinstance(value, list) and len(value) == geometry.layers > 2]
    kept = sorted(set(first))
    if not lists or len(kept) < 2:
        kept = list(range(min(max(first[-1] + 1, 2), geometry.layers, DEEPEST)))
    for key in lists:
        cut[key] = [cut[key][layer] for layer in kept]
    _put(cut, known, LAYERS, len(kept))


def _kinds(geometry: Geometry, known: Any) -> list[object]:
    """What tells a layer from another, by the record and by transformers."""
    theirs = getattr(known, "layer_types", None)
    if not isinstance(theirs, list) or len(theirs) != geometry.layers:
        theirs = [None] * geometry.layers
    return list(zip(geometry.attention, theirs, strict=True))


def _cut_positions(cut: dict[str, Any], original: int) -> None:
    """Let scaled rotary embeddings start from another length, beyond which the sequence may reach."""
    spelled = [cut[key] for key in ("rope_parameters", "rope_scaling") if isinstance(cut.get(key), dict)]
    ropes = [rope for outer in spelled for rope in (outer, *outer.values()) if isinstance(rope, dict)]
    for place in (cut, *ropes):
        if place.get("original_max_position_embeddings"):
            place["original_max_position_embeddings"] = original
    factors = [rope["factor"] for rope in ropes if isinstance(rope.get("factor"), int | float)]
    if factors and cut.get("max_position_embeddings"):
        cut["max_position_embeddings"] = int(original * max(factors))


def _put(cut: dict[str, Any], known: Any, names: tuple[str, ...], number: int) -> None:
    """Set a number under the name that the file has for it, or else under the one that transformers has."""
    present = [name for name in names if name in cut] or [name for name in names if hasattr(known, name)][:1]
    for name in present:
        cut[name] = number


def _few(count: int, most: int) -> int:
    """At most `most`; a count that is no power of two stays none where there is room."""
    if count <= most:
        return count
    return most if count & (count - 1) == 0 else max(most - 1, 3) if most > 2 else 3
