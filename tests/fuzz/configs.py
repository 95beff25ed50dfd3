"""A damaged config.json: we refuse it, or compute what transformers computes with it.

transformers reads the very folder that we read. Its weights fit the config where a model of that size is small, else
they are those of the config before it was damaged, and nobody should accept them.
"""

from __future__ import annotations

import copy
import functools
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from random import Random
from typing import Any

import torch
import transformers
from torch import Tensor

from recipes.families import FAMILIES, open_model
from recipes.trust.agreement import ATTENTION, TOLERANCE, disagreement, randomize
from recipes.trust.keys import READ_BY_MODELS
from recipes.trust.known import TransformersClass, transformers_class
from recipes.trust.miniature import TOKENS, VOCABULARY, cut_down
from smoothquant import decoder
from smoothquant.attention import patterns
from smoothquant.config import Config
from smoothquant.layers import float_layer
from smoothquant.model import Model
from tests.fuzz.loop import ACCEPTED, ALONE, DIFFERENT, Outcome
from tests.fuzz.mutations import mutate
from tests.zoo import COMMON, ZOO
from tests.zoo.hub_configs import CONFIGS

SMALL = 2**22  # parameters of a model that is made for one trial
LARGE = 10**6  # no number of a small model but one for its positions or its window
FAMILY_OF = {kind: family for family in FAMILIES for kind in family.model_types}
ROPES: tuple[dict[str, Any], ...] = (
    {"rope_type": "linear", "factor": 2.0},
    {"type": "linear", "factor": 4.0},
    {"rope_type": "default"},
    {"rope_type": "dynamic", "factor": 2.0},
    {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 24},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 24, "rope_theta": 5000.0},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 1.0, "rope_theta": 5000.0},
    {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8},
    {"rope_theta": 1000.0, "partial_rotary_factor": 0.5},
    {"full_attention": {"rope_type": "default", "rope_theta": 1e6}},
)
LAYER_TYPES = (["full_attention"] * 2, ["sliding_attention", "full_attention"], ["chunked_attention"] * 2)
FOREIGN: dict[str, tuple[object, ...]] = {
    **dict.fromkeys(READ_BY_MODELS, (None, False, True, 0, 1, 0.5, 2, 16)),
    **dict.fromkeys(("rope_scaling", "rope_parameters"), (None, *ROPES)),
    "layer_types": (None, *LAYER_TYPES),
    "rope_theta": (0, 1, 500.0, 10000.0, 1e6),
    "sliding_window": (None, 0, 1, 5, 16, -1),
    "model_type": (*FAMILY_OF, "gpt2", "mamba", "LLaMA", "ministral"),
    "architectures": (
        *([name] for family in FAMILIES for name in family.architectures),
        ["LlamaModel"],
        ["LLaMAForCausalLM"],
        ["GPT2LMHeadModel"],
    ),
    "quantization_config": ({"quant_method": "gptq", "bits": 4}, None),
    "tie_word_embeddings": (True, False, None),
    "hidden_act": ("gelu", "relu", "gelu_new", "silu", "gelu_pytorch_tanh", "swish", "quick_gelu"),
    "head_dim": (None, 8, 16, 32, 15),
    "rms_norm_eps": (0.0, 1.0, -1.0, float("inf")),
    "torch_dtype": ("float16", "float32", "int8", "nothing"),
    "original_max_position_embeddings": (8, 24, 0),
    "max_position_embeddings": (16, 64),
    "attention_bias": (True,),
    "mlp_bias": (True,),
    "per_layer_config": ({"1": {"hidden_act": "relu"}},),
    "text_config": ({"hidden_size": 32},),
    "attribute_map": ({"hidden_size": "n_embd"},),
}


def trial(random: Random, folder: Path) -> Outcome:
    """Damage one of the configs in up to three places, and let both read it."""
    name = random.choice(sorted(_layouts())) if random.random() < 0.75 else random.choice(sorted(CONFIGS))
    content, weights = base(name)
    content = copy.deepcopy(content)
    done = [mutate(random, content, FOREIGN | _of_another(random)) for _ in range(random.choice((1, 1, 2, 3)))]
    told = f"{name}: {'; '.join(done)}"
    (folder / "config.json").write_text(json.dumps(content), encoding="utf-8")
    _lay_weights(folder, weights, content)
    return judge(folder, told)


def judge(folder: Path, told: str = "") -> Outcome:
    """What becomes of a folder that both read. Raises what our reader raises."""
    model = open_model(folder)
    (folder / "config.json").write_text(json.dumps(model.checkpoint.config))  # without what we say that we drop
    tokens = min(TOKENS, model.geometry.max_positions)
    if model.choices:
        model = open_model(folder, length=tokens)
    ids = _sample(tokens, model.geometry.vocab_size)
    ours, off = our_logits(model, ids), float("inf")
    for attention in ATTENTION:
        if off <= TOLERANCE:
            break
        try:
            off = min(off, disagreement(ours, their_logits(folder, ids, attention)))
        except Exception as error:
            return Outcome(ALONE, f"{told}: transformers raises {' '.join(repr(error).split())[:200]}")
    return Outcome(ACCEPTED) if off <= TOLERANCE else Outcome(DIFFERENT, f"{told}: logits off by {off:.1e}")


@torch.no_grad()
def our_logits(model: Model, ids: Tensor) -> Tensor:
    """Logits (tokens, vocab) float32 by our decoder."""
    hidden, positions = decoder.embed(model, ids, torch.float32), patterns(model, ids.shape[1], torch.float32)
    for index in range(model.geometry.layers):
        hidden = decoder.forward(model, float_layer(model, index), hidden, positions)
    return decoder.logits(model, hidden)[0]


@torch.no_grad()
def their_logits(folder: Path, ids: Tensor, attention: str | None = None) -> Tensor:
    """Logits (tokens, vocab) float32 by what transformers makes of the folder."""
    content = json.loads((folder / "config.json").read_text())
    kind: Any = transformers.AutoModelForCausalLM
    if not content.get("model_type"):
        kind = getattr(transformers, content["architectures"][0])
    chosen = {"attn_implementation": attention} if attention else {}
    model = kind.from_pretrained(folder, dtype=torch.float32, **chosen).eval()
    return model(ids, use_cache=False).logits[0].float()


@functools.cache
def base(name: str) -> tuple[dict[str, Any], Path]:
    """A config before it is damaged, and a folder with weights for it."""
    content = _layouts().get(name) or _cut(CONFIGS[name])
    folder = Path(_scratch().name) / name
    folder.mkdir()
    _save(content, transformers_class(content), folder)
    return content, folder


@functools.cache
def _scratch() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="fuzz-bases-")


@functools.cache
def _layouts() -> dict[str, dict[str, Any]]:
    """Configs of the zoo's layouts, as transformers writes them."""
    found = {}
    for name, layout in ZOO.items():
        config = layout.model.config_class(**(COMMON | dict(layout.numbers)), architectures=[layout.model.__name__])
        found[name] = json.loads(config.to_json_string(use_diff=True)) | {"vocab_size": VOCABULARY}
    return found


def _cut(content: Mapping[str, Any]) -> dict[str, Any]:
    """A published config, of a small model."""
    config, family, theirs = Config(content), FAMILY_OF[content["model_type"]], transformers_class(content)
    assert theirs is not None
    record = family.variant(config) if family.variant else family
    return cut_down(content, record.geometry(config), theirs.read(content))


def _of_another(random: Random) -> dict[str, tuple[object, ...]]:
    """A key of another config, with its value."""
    content = random.choice([*_layouts().values(), *CONFIGS.values()])
    key = random.choice(sorted(content))
    return {key: (content[key],)}


def _lay_weights(folder: Path, weights: Path, content: Mapping[str, Any]) -> None:
    """Weights that fit the config, where it has a small model; else those of the config before."""
    theirs = _class(content)
    try:
        assert theirs is not None
        assert not _is_large(content)
        with torch.device("meta"):
            empty = theirs.model._from_config(theirs.read(content))
        shapes = {name: tuple(tensor.shape) for name, tensor in empty.state_dict().items()}
        if sum(torch.Size(shape).numel() for shape in shapes.values()) < SMALL and shapes != _shapes(weights):
            _save(content, theirs, folder)
            return
    except Exception:  # transformers refuses the config
        pass
    (folder / "model.safetensors").symlink_to(weights / "model.safetensors")


def _is_large(content: Mapping[str, Any]) -> bool:
    """Whether transformers would take long to make even an empty model."""
    sizes = (value for key, value in content.items() if "position" not in key and "window" not in key)
    return any(isinstance(value, int | float) and value > LARGE for value in sizes)


def _class(content: Mapping[str, Any]) -> TransformersClass | None:
    try:
        return transformers_class(content)
    except Exception:
        return None


@functools.cache
def _shapes(weights: Path) -> dict[str, tuple[int, ...]]:
    return {name: tuple(shape) for name, shape in json.loads((weights / "shapes.json").read_text()).items()}


def _save(content: Mapping[str, Any], theirs: TransformersClass | None, folder: Path) -> None:
    assert theirs is not None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = theirs.model._from_config(theirs.read(content), dtype=torch.float32).eval()
        randomize(model)
    written = (folder / "config.json").read_bytes() if (folder / "config.json").exists() else b""
    model.save_pretrained(folder)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    (folder / "shapes.json").write_text(json.dumps(shapes))
    if written:
        (folder / "config.json").write_bytes(written)


def _sample(tokens: int, vocabulary: int) -> Tensor:
    return torch.randint(0, vocabulary, (1, tokens), generator=torch.Generator().manual_seed(1))
