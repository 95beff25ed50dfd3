"""Tiny random models and texts, made on the spot, for every test."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from recipes.llama import FAMILY
from smoothquant.checkpoint import Checkpoint
from smoothquant.model import Model

VOCABULARY = 288
OUTLIER = 64
TEXT = "".join(
    f"def f_{n}(x): return x * {n} + {n * n % 97}  # line {n} of a text long enough to calibrate on\n"
    for n in range(400)
)


def save_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer without merges: any text, no training. Token 256 is <s>, 257 is </s>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {byte: index for index, byte in enumerate(alphabet)} | {"<s>": 256, "</s>": 257}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)


def save_llama(folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: object) -> Path:
    """A random Llama (2 layers, GQA) with outlier channels in its norms, and a tokenizer. changes: to its config."""
    torch.manual_seed(seed)
    numbers = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 512,
        "initializer_range": 0.1,
        "tie_word_embeddings": False,
        "bos_token_id": 256,
        "eos_token_id": 257,
    }
    model = LlamaForCausalLM(LlamaConfig(**(numbers | changes)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("layernorm.weight"):
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                parameter.normal_(std=0.1)
        for layer in model.model.layers:  # outlier channels, without changing the function
            attention, mlp = layer.self_attn, layer.mlp
            for norm, consumers in (
                (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
                (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
            ):
                norm.weight[3::17] *= OUTLIER
                for consumer in consumers:
                    consumer.weight[:, 3::17] /= OUTLIER
    model.to(dtype).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def scale_tensors(folder: Path, factors: Mapping[str, float]) -> Path:
    """Multiply tensors of a model folder. factors: by tensor name."""
    tensors = load_file(folder / "model.safetensors")
    for name, factor in factors.items():
        tensors[name] = (tensors[name].float() * factor).to(tensors[name].dtype)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def stretch_residual(folder: Path, reach: float) -> Path:
    """Let the residual stream of a Llama reach `reach` from the first layer's attention on. Later norms undo that, and
    no weight is beyond float16."""
    name = "model.layers.0.self_attn.o_proj"
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    outputs: list[torch.Tensor] = []
    model.get_submodule(name).register_forward_hook(lambda _module, _args, output: outputs.append(output))
    with torch.no_grad():
        model(sample_ids())
    return scale_tensors(folder, {f"{name}.weight": reach / outputs[0].abs().max().item()})


def open_llama(folder: Path) -> Model:
    return Model(Checkpoint(folder), FAMILY)


def sample_ids(sequences: int = 4, tokens: int = 48, seed: int = 1) -> torch.Tensor:
    """Random token ids (sequences, tokens) int64."""
    return torch.randint(0, 256, (sequences, tokens), generator=torch.Generator().manual_seed(seed))


def hooked_absmax(folder: Path, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Input maxima of every linear but lm_head, by the plainest means: hooks on the Hugging Face model."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found: dict[str, torch.Tensor] = {}

    def listen(name: str) -> Callable:
        def hook(_module: object, args: tuple, _output: object) -> None:
            found[name] = args[0].abs().flatten(0, -2).amax(dim=0)

        return hook

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            module.register_forward_hook(listen(name))
    with torch.no_grad():
        model(ids)
    return found
