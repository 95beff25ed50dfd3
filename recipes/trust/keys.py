"""Every key of a config.json accounted for.

A key may be passed over if the family's record read it, if it is known to have no influence on the logits, or if
transformers itself makes nothing of it: its configuration of this very file is the same with and without the key. Some
keys look so to transformers and matter all the same, since models read them by themselves: `READ_BY_MODELS`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from recipes.trust.known import TransformersClass
from smoothquant.config import Config
from smoothquant.errors import CheckpointError
from smoothquant.family import Family

NAMES_AND_DTYPES = """
    architectures model_type auto_map transformers_version _name_or_path _commit_hash torch_dtype dtype torchscript
    _attn_implementation attn_implementation _attn_implementation_autoset use_bfloat16 prefix tokenizer_class
"""
TRAINING = """
    initializer_range init_std initializer_factor attention_dropout hidden_dropout dropout activation_dropout
    classifier_dropout resid_dropout embedding_dropout attn_pdrop resid_pdrop embd_pdrop layerdrop hidden_dropout_prob
    attention_probs_dropout_prob gradient_checkpointing pretraining_tp slow_but_exact router_aux_loss_coef
    router_jitter_noise output_router_logits router_z_loss_coef aux_loss_alpha
"""
OUTPUT_AND_GENERATION = """
    use_cache cache_implementation return_dict output_attentions output_hidden_states problem_type id2label label2id
    num_labels finetuning_task task_specific_params bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id
    cls_token_id mask_token_id decoder_start_token_id forced_bos_token_id forced_eos_token_id suppress_tokens
    begin_suppress_tokens bad_words_ids max_length min_length max_new_tokens do_sample early_stopping num_beams
    num_beam_groups diversity_penalty temperature top_k top_p typical_p repetition_penalty length_penalty
    no_repeat_ngram_size encoder_no_repeat_ngram_size num_return_sequences output_scores return_dict_in_generate
    remove_invalid_values exponential_decay_length_penalty
"""
WITHOUT_INFLUENCE = frozenset((NAMES_AND_DTYPES + TRAINING + OUTPUT_AND_GENERATION).split())
# key -> values at which it does nothing. Nobody declares these, and modelling code reads them.
READ_BY_MODELS: Mapping[str, tuple[object, ...]] = {
    **dict.fromkeys(("rope_scaling", "rope_parameters", "rope_theta", "rope_local_base_freq"), (None,)),
    **dict.fromkeys(("partial_rotary_factor", "rotary_pct", "rope_pct", "rope_ratio"), (None, 1)),
    **dict.fromkeys(("rotary_dim", "rotary_emb_base", "n_inner", "no_rope_layers", "layer_types"), (None,)),
    **dict.fromkeys(("sliding_window", "attention_chunk_size", "use_sliding_window"), (None, False)),
    **dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar"), (None,)),
    **dict.fromkeys(("embedding_multiplier", "residual_multiplier", "attention_multiplier"), (None, 1)),
    **dict.fromkeys(("logits_scaling", "logit_scale", "scale_emb", "scale_depth", "dim_model_base"), (None, 1)),
    **dict.fromkeys(("alibi", "use_qk_norm", "qk_layernorm", "qk_norm", "clip_qkv", "parallel_attn"), (None, False)),
    **dict.fromkeys(("use_parallel_residual", "apply_residual_connection_post_layernorm"), (None, False)),
    **dict.fromkeys(("is_encoder_decoder", "add_cross_attention", "use_bidirectional_attention"), (None, False)),
}


def check_keys(
    config: Config, family: Family, theirs: TransformersClass | None, where: str | Path = "config.json"
) -> None:
    """Raise CheckpointError for a key of config.json that nobody accounts for, with its value and what to do.

    config: as the family's record has read it. theirs: what transformers reads it with, if it knows the model. where:
    the file, for the message.
    """
    if theirs is not None:
        _check_nothing_lost(config.content, theirs, where)
    for path, value in unread(config):
        key = ".".join(path)
        if key in WITHOUT_INFLUENCE or key in family.ignored_keys or _is_neutral(path, value):
            continue
        if theirs is not None and len(path) == 1 and _makes_no_difference(config.content, key, theirs):
            continue
        raise CheckpointError(
            f"{where}: {key} is {_shown(value)}, and the family {family.name} does not read it: it may change what "
            "the model computes",
            expected="a key that the family's record reads, or one without influence on the logits",
            do="restore the config.json that came with the weights; in a record of your own, read the key in its "
            "geometry, or name it in ignored_keys if it has no influence",
        )


def _check_nothing_lost(content: Mapping, theirs: TransformersClass, where: str | Path) -> None:
    """Raise CheckpointError where rope_scaling, which users add, replaces more of rope_parameters than it says."""
    before = content.get("rope_parameters")
    if not content.get("rope_scaling") or not isinstance(before, Mapping):
        return
    after = getattr(theirs.read(copy.deepcopy(dict(content))), "rope_parameters", None) or {}
    for key in ("rope_theta", "partial_rotary_factor"):
        if key in before and after.get(key) != before[key]:
            raise CheckpointError(
                f"{where}: rope_scaling goes before rope_parameters, whose {key} {_shown(before[key])} is lost thereby",
                expected="one of the two",
                do="move the numbers of rope_scaling into rope_parameters, or name them all in rope_scaling",
            )


def unread(config: Config) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Path and value of every key that nobody read, in order; objects that were read are looked into."""

    def walk(content: Mapping, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
        for key, value in content.items():
            here = (*path, key)
            if here not in config.read:
                yield here, value
            elif isinstance(value, Mapping):
                yield from walk(value, here)

    return walk(config.content, ())


def _is_neutral(path: tuple[str, ...], value: object) -> bool:
    """Whether a key has a value at which it does nothing. `type` is the older name of `rope_type`, which rules."""
    if len(path) > 1:
        return path[-1] == "type"
    neutral = READ_BY_MODELS.get(path[0], ())
    return any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in neutral)


def _makes_no_difference(content: Mapping, key: str, theirs: TransformersClass) -> bool:
    """Whether transformers' configuration is the same with and without a key, but for the key itself.

    One that transformers declares must have the value that it has when it is absent; so must one of READ_BY_MODELS, and
    nobody declares those.
    """
    with_it, without_it = (
        theirs.read(copy.deepcopy(found)).to_dict()
        for found in (dict(content), {name: value for name, value in content.items() if name != key})
    )
    if key not in without_it:
        if key in READ_BY_MODELS:
            return False
        with_it.pop(key, None)
    return with_it == without_it


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
