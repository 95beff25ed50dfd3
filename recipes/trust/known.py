"""What transformers knows: its model types, and the class of a config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from smoothquant.errors import CheckpointError


@dataclass(frozen=True)
class TransformersClass:
    """config: the class of the configuration; model: that of the causal language model."""

    config: Any
    model: Any

    def read(self, content: Mapping) -> Any:
        """The configuration that transformers makes of a config.json. Raises CheckpointError if it refuses."""
        try:
            return self.config.from_dict(dict(content))
        except Exception as error:  # validation of many kinds
            told = " ".join(str(error).split())[:300]
            raise CheckpointError(
                f"config.json: transformers' {self.config.__name__} refuses it ({told})",
                expected="a config that transformers reads",
                do="restore the config.json that came with the weights",
            ) from error


def transformers_class(config: Mapping) -> TransformersClass | None:
    """What transformers would load a config.json with: by `model_type`, or by the architecture where there is none.
    None where it knows neither. Code that lies beside weights is never run."""
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

    kind = config.get("model_type") or model_type_of((config.get("architectures") or [""])[0])
    if kind == "mistral" and "layer_types" in config and "ministral" in CONFIG_MAPPING:  # AutoConfig's own rule
        kind = "ministral"
    if kind is None or kind not in CONFIG_MAPPING:
        return None
    found = CONFIG_MAPPING[kind]
    if found not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return None
    model = MODEL_FOR_CAUSAL_LM_MAPPING[found]
    return TransformersClass(found, model[0] if isinstance(model, tuple) else model)


def model_type_of(architecture: str) -> str | None:
    """The model type that transformers gives the causal language model of this name, None if it has no such class."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    for kind, names in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        if architecture in ((names,) if isinstance(names, str) else names):
            return kind
    return None
