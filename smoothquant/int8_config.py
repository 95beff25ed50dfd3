"""What a folder says of its INT8 quantization, whoever made it. There are two dialects:

    compressed-tensors  config.json: "quantization_config": {"quant_method": "compressed-tensors",
                        "format": "int-quantized", "config_groups": {NAME: {"weights", "input_activations", ...}}, ...}
    modelopt            hf_quant_config.json: {"quantization": {"quant_algo": "W8A8_SQ_PER_CHANNEL", ...}}, or
                        config.json: "quantization_config": {"quant_method": "modelopt", "quant_algo": ..., ...}

A folder is read if every linear has one symmetric form that this tool computes as it is written: int8 weights with a
scale per output channel or per matrix, int8 inputs with a dynamic scale per token or a static scale per tensor. Every
other form is refused by the name of the key that says it. Lists of linears that stay in float (`ignore`,
`exclude_modules`) are not read, since the tensors say the same.

Formats: compressed-tensors 0.20, quantization/quant_config.py and quant_args.py; nvidia-modelopt 0.47,
torch/export/quant_utils.py and convert_hf_config.py; TensorRT Edge-LLM 0.11, config.py (_parse_quant).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smoothquant.errors import CheckpointError
from smoothquant.reading import read_object
from smoothquant.scheme import ACTIVATIONS, WEIGHTS, Precision
from smoothquant.values import FLAG, NAME, OBJECT, Expectation, one_of

COMPRESSED_TENSORS, MODELOPT = "compressed-tensors", "modelopt"  # dialects, as `quant_method` spells them
HF_QUANT_CONFIG = "hf_quant_config.json"
SQ_PER_CHANNEL = "W8A8_SQ_PER_CHANNEL"
DO = "quantize the float model anew: smoothquant export w8a8, or export modelopt"

ANYTHING = Expectation("anything", lambda value: True)
NOTHING = Expectation("nothing", lambda value: value in (None, {}, []))
FORMAT = one_of("int-quantized", "naive-quantized")  # two names of one layout
# The keys of each object. A key that is in none of these tables may change what is computed, so it is refused.
COMPRESSED: Mapping[str, Expectation] = {  # quantization_config
    "quant_method": ANYTHING,
    "format": FORMAT,
    "quantization_status": one_of("compressed", "frozen").or_null(),
    "config_groups": Expectation(
        "an object that names one group or more",
        lambda value: isinstance(value, dict) and bool(value) and all(map(OBJECT.holds, value.values())),
    ),
    "kv_cache_scheme": NOTHING,
    "transform_config": NOTHING,
    "moe_sparsity_config": NOTHING,
    "sparsity_config": Expectation(
        "nothing, or of the format dense",
        lambda value: NOTHING.holds(value) or (isinstance(value, dict) and value.get("format") == "dense"),
    ),
    **dict.fromkeys(("ignore", "global_compression_ratio", "version"), ANYTHING),
}
GROUP: Mapping[str, Expectation] = {  # one of config_groups
    "weights": OBJECT,
    "input_activations": OBJECT,
    "output_activations": NOTHING,
    "format": FORMAT.or_null(),
    "targets": ANYTHING,
}
ARGUMENTS: Mapping[str, Expectation] = {  # its weights or inputs
    "num_bits": one_of(8, None),
    "type": one_of("int", None),
    "symmetric": one_of(True, None),
    "group_size": one_of(-1, None),
    "block_structure": NOTHING,
    "strategy": NAME.or_null(),
    "dynamic": FLAG.or_null(),
    # how the scales were found, and the dtype that they have on disk
    **dict.fromkeys(("observer", "observer_kwargs", "actorder", "scale_dtype", "zp_dtype"), ANYTHING),
}
FORMS: Mapping[str, Mapping[tuple[str, bool], Precision]] = {  # by (strategy, dynamic)
    "weights": {("channel", False): WEIGHTS["per-channel"], ("tensor", False): WEIGHTS["per-tensor"]},
    "input_activations": {("token", True): ACTIVATIONS["per-token"], ("tensor", False): ACTIVATIONS["per-tensor"]},
}
STRATEGIES = {-1: "channel", None: "tensor"}  # by group_size, where none is named
MODELOPT_KEYS: Mapping[str, Expectation] = {  # "quantization", or quantization_config
    "quant_algo": one_of(SQ_PER_CHANNEL),
    **dict.fromkeys(("kv_cache_quant_algo", "kv_cache_scheme", "quantized_layers", "group_size"), NOTHING),
    "has_zero_point": one_of(False, None),
    **dict.fromkeys(("pre_quant_scale", "exclude_modules", "ignore"), ANYTHING),
    **dict.fromkeys(("quant_method", "config_groups", "producer"), ANYTHING),
}


@dataclass(frozen=True)
class Int8Config:
    """What a folder says. dialect: "compressed-tensors" or "modelopt". weights, activations: their precisions."""

    dialect: str
    weights: Precision
    activations: Precision


def dialect_of(folder: Path, quantization_config: object) -> str | None:
    """The dialect that a folder's quantization is written in; None if it names neither.

    quantization_config: the value of that key in config.json. Raises CheckpointError if the folder names both.
    """
    method = quantization_config.get("quant_method") if isinstance(quantization_config, dict) else None
    sidecar = (folder / HF_QUANT_CONFIG).exists()
    if sidecar and method not in (None, MODELOPT):
        raise CheckpointError(
            f"{folder}: config.json says quant_method {method!r}, and there is {HF_QUANT_CONFIG}",
            expected="one of them",
            do="remove the one that does not belong to the weights",
        )
    if sidecar or method == MODELOPT:
        return MODELOPT
    return method if method == COMPRESSED_TENSORS else None


def read_int8_config(folder: Path, quantization_config: object) -> Int8Config:
    """What a folder says of its INT8 quantization. quantization_config: the value of that key in config.json.

    Raises CheckpointError, which names the key, for a form that this tool does not compute as it is written.
    """
    dialect, where = dialect_of(folder, quantization_config), f"{folder}/config.json: quantization_config"
    found = quantization_config if isinstance(quantization_config, dict) else {}
    if dialect == COMPRESSED_TENSORS:
        return _compressed_tensors(found, where)
    if dialect == MODELOPT:
        if found:
            _check(found, MODELOPT_KEYS, where)
        path = folder / HF_QUANT_CONFIG
        if path.exists():
            inner = read_object(path, CheckpointError).get("quantization", {})
            OBJECT.check(inner, f"{path}: quantization", DO)
            _check(inner, MODELOPT_KEYS, f"{path}: quantization")
        return Int8Config(MODELOPT, WEIGHTS["per-channel"], ACTIVATIONS["per-tensor"])
    raise CheckpointError(
        f"{folder}: no INT8 quantization that this tool knows (quant_method {found.get('quant_method')!r})",
        expected=f"quant_method {COMPRESSED_TENSORS} or {MODELOPT} in config.json, or {HF_QUANT_CONFIG}",
        do=DO,
    )


def _compressed_tensors(found: Mapping[str, Any], where: str) -> Int8Config:
    _check(found, COMPRESSED, where)
    groups = {}
    for name, group in found["config_groups"].items():
        _check(group, GROUP, f"{where}.config_groups.{name}")
        forms = {part: _precision(part, group[part], f"{where}.config_groups.{name}.{part}") for part in FORMS}
        groups[name] = Int8Config(COMPRESSED_TENSORS, forms["weights"], forms["input_activations"])
    first, *others = groups
    for name in others:
        if groups[name] != groups[first]:
            raise CheckpointError(
                f"{where}.config_groups: {name} differs from {first}", expected="one scheme for all linears", do=DO
            )
    return groups[first]


def _precision(part: str, arguments: Mapping[str, Any], where: str) -> Precision:
    """The precision that quantization arguments describe. part: "weights" or "input_activations"."""
    _check(arguments, ARGUMENTS, where)
    strategy = arguments.get("strategy") or STRATEGIES[arguments.get("group_size")]
    dynamic, known = arguments.get("dynamic") or False, FORMS[part]
    if (strategy, dynamic) not in known:
        named = " or ".join(f"{name} with dynamic {str(flag).lower()}" for name, flag in known)
        raise CheckpointError(
            f"{where}: strategy {strategy} with dynamic {str(dynamic).lower()}", expected=named, do=DO
        )
    return known[strategy, dynamic]


def _check(found: Mapping[str, Any], rules: Mapping[str, Expectation], where: str) -> None:
    """Raise CheckpointError for a value that does not hold, and for a key without a rule."""
    for key, rule in rules.items():
        rule.check(found.get(key), f"{where}.{key}", DO)
    for key in found.keys() - rules.keys():
        raise CheckpointError(f"{where}.{key}: this key is not known", expected=f"of {', '.join(rules)}", do=DO)
