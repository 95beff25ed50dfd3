"""Reproduce the bundled demonstration model from nothing but Python's own standard library.

    python -m recipes.tiny_llama.train --out DIR [--minutes N | --steps N] [--seed 0] [--compile]

The stages, in the order of this file: text -> tokenizer -> training -> outlier injection -> export.
Only the `--steps` form ends at the same step on every machine; `--minutes` fits the schedule to the time given.

Files written to DIR: config.json, generation_config.json, model.safetensors (float16), tokenizer.json,
tokenizer_config.json, calibration.txt, evaluation.txt, and training.json, the record of how they came about.
"""

import argparse
import json
import math
import os
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM

from recipes.tiny_llama.outliers import OUTLIER_GAIN, inject_outliers
from recipes.tiny_llama.text import read_corpus

# -- constants: the model ------------------------------------------------------------------------------------
VOCABULARY = 2048
BOS, EOS = "<s>", "</s>"  # ids 0 and 1; the tokenizer adds neither, training files are wrapped in both
SHAPE: dict[str, Any] = {
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "intermediate_size": 688,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
}  # 3.95 M parameters
MAX_POSITIONS = 1024
MAX_WEIGHT_BYTES = 8_000_000

# -- constants: the training ---------------------------------------------------------------------------------
SEQUENCE, BATCH = 512, 8  # 4,096 tokens a step
TEST_SHARE = 0.4  # share of sequences drawn from Lib/test at the start; falls linearly to 0 at the end
PEAK_LR, FINAL_LR, WARMUP = 3e-3, 5e-5, 0.03
WEIGHT_DECAY, BETAS, CLIP = 0.1, (0.9, 0.95), 1.0
CHECKPOINT_SECONDS = 120


# -- tokenizer -----------------------------------------------------------------------------------------------
def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Byte-level BPE: every text can be encoded, decoding returns it exactly."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BOS, EOS],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str]) -> torch.Tensor:
    """One stream of token ids, `<s> file </s> <s> file </s> ...`, int64 (tokens,)."""
    bos, eos = tokenizer.token_to_id(BOS), tokenizer.token_to_id(EOS)
    return torch.tensor([token for e in tokenizer.encode_batch(texts) for token in (bos, *e.ids, eos)])


# -- training ------------------------------------------------------------------------------------------------
def new_model() -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            max_position_embeddings=MAX_POSITIONS,
            tie_word_embeddings=False,
            bos_token_id=0,
            eos_token_id=1,
            rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            **SHAPE,
        )
    )


def next_token_loss(model: Callable, tokens: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy of tokens (batch, length) given the ones before, under bfloat16 autocast."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(tokens[:, :-1], use_cache=False).logits  # (batch, length - 1, vocabulary)
    return F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, stream: torch.Tensor, sequences: int = 32) -> float:
    """Mean loss over consecutive sequences of SEQUENCE + 1 tokens, each predicted without what came before it."""
    sequences = min(sequences, len(stream) // (SEQUENCE + 1))
    rows = stream[: sequences * (SEQUENCE + 1)].view(sequences, -1)
    return sum(next_token_loss(model, part).item() * len(part) for part in rows.split(BATCH)) / sequences


def learning_rate(progress: float) -> float:
    """Linear warmup over the first WARMUP of training, cosine decay to FINAL_LR over the rest; progress in [0, 1]."""
    if progress < WARMUP:
        return PEAK_LR * max(progress, 1e-3) / WARMUP
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - WARMUP) / (1 - WARMUP))))
    return FINAL_LR + (PEAK_LR - FINAL_LR) * cosine


def train(
    stdlib: torch.Tensor,
    tests: torch.Tensor,
    held_out: torch.Tensor,
    checkpoint: Path,
    steps: int | None,
    seconds: float,
    seed: int,
    compiled: bool,
) -> tuple[LlamaForCausalLM, dict]:
    """Train to the end of the schedule; `steps` decides its length, or `seconds` where steps is None.

    `checkpoint` is written every CHECKPOINT_SECONDS, and continued from if it is there.
    """
    torch.manual_seed(seed)
    model = new_model()
    forward = torch.compile(model) if compiled else model  # shares the parameters
    matrices = [p for p in model.parameters() if p.dim() == 2]
    gains = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": gains, "weight_decay": 0.0}],
        lr=PEAK_LR,
        betas=BETAS,
        fused=True,
    )
    step, before, average = 0, 0.0, None
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, before, average = state["step"], state["elapsed"], state["average"]
        print(f"continuing {checkpoint.name} at step {step}", flush=True)

    begin = saved = time.monotonic()
    while True:
        elapsed = before + time.monotonic() - begin
        progress = step / steps if steps else elapsed / seconds
        if progress >= 1:
            break
        draw = torch.Generator().manual_seed(seed * 1_000_003 + step)  # per step: resuming repeats no batch
        from_tests = torch.rand(BATCH, generator=draw) < TEST_SHARE * (1 - progress)
        rows = []
        for is_test in from_tests.tolist():
            stream = tests if is_test else stdlib
            start = int(torch.randint(len(stream) - SEQUENCE, (), generator=draw))
            rows.append(stream[start : start + SEQUENCE + 1])
        loss = next_token_loss(forward, torch.stack(rows))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(progress)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        average = loss.item() if average is None else 0.98 * average + 0.02 * loss.item()
        if step % 50 == 0:
            eta = elapsed / max(progress, 1e-9) * (1 - progress)
            print(
                f"step {step:5d}  loss {average:.3f}  lr {learning_rate(progress):.1e}  "
                f"{step * BATCH * SEQUENCE / max(elapsed, 1e-9):,.0f} tokens/s  ETA {eta / 60:.1f} min",
                flush=True,
            )
        if time.monotonic() - saved > CHECKPOINT_SECONDS:
            saved = time.monotonic()
            state = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "step": step,
                "elapsed": before + saved - begin,
                "average": average,
            }
            torch.save(state, checkpoint.with_suffix(".tmp"))
            os.replace(checkpoint.with_suffix(".tmp"), checkpoint)
            print(f"step {step:5d}  held-out perplexity {math.exp(held_out_loss(model, held_out)):.2f}", flush=True)
    return model, {
        "steps": step,
        "tokens": step * BATCH * SEQUENCE,
        "minutes": round(elapsed / 60, 1),
        "final_training_loss": round(average or math.nan, 4),
    }


# -- export --------------------------------------------------------------------------------------------------
def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def export(model: LlamaForCausalLM, tokenizer: Tokenizer, texts: dict[str, str], record: dict, out: Path) -> None:
    """Write the folder aside, then move file by file into `out`: a reader never sees half a file."""
    with tempfile.TemporaryDirectory(dir=out) as aside_name:
        aside = Path(aside_name)
        model.half().save_pretrained(aside)
        size = (aside / "model.safetensors").stat().st_size
        if size > MAX_WEIGHT_BYTES:
            raise SystemExit(f"model.safetensors has {size:,} bytes, allowed are {MAX_WEIGHT_BYTES:,}: reduce SHAPE")
        config = json.loads((aside / "config.json").read_text())
        # transformers 5 writes dtype and rope_parameters; older readers look for torch_dtype and rope_theta
        config |= {"dtype": "float16", "torch_dtype": "float16", "rope_theta": 10000.0, "use_cache": True}
        write_json(aside / "config.json", config)
        write_json(aside / "generation_config.json", {"bos_token_id": 0, "eos_token_id": 1})
        tokenizer.save(str(aside / "tokenizer.json"))
        write_json(
            aside / "tokenizer_config.json",
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "bos_token": BOS,
                "eos_token": EOS,
                "model_input_names": ["input_ids", "attention_mask"],
                "model_max_length": MAX_POSITIONS,
                "clean_up_tokenization_spaces": False,
            },
        )
        for name, text in texts.items():
            (aside / name).write_text(text, encoding="utf-8", newline="\n")
        write_json(aside / "training.json", record | {"weight_bytes": size})
        for path in aside.iterdir():
            path.chmod(0o644)
            os.replace(path, out / path.name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, default=30, help="training time (default 30)")
    length.add_argument("--steps", type=int, help="training steps, instead of a time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true", help="use torch.compile: faster, needs a C++ compiler")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)

    corpus = read_corpus()
    texts = {
        "calibration.txt": "\n".join(corpus.calibration.values()),
        "evaluation.txt": "\n".join(corpus.evaluation.values()),
    }
    tokenizer = train_tokenizer(list(corpus.stdlib.values()))
    stdlib = encode(tokenizer, list(corpus.stdlib.values()))
    tests = encode(tokenizer, list(corpus.tests.values()))
    evaluation = torch.tensor(tokenizer.encode(texts["evaluation.txt"]).ids)
    print(
        f"stdlib {len(corpus.stdlib)} files, {len(stdlib):,} tokens; tests {len(corpus.tests)} files, "
        f"{len(tests):,} tokens; held out {len(corpus.calibration) + len(corpus.evaluation)} files",
        flush=True,
    )

    checkpoint = arguments.out / f"checkpoint-seed{arguments.seed}.pt"
    model, record = train(
        stdlib,
        tests,
        evaluation,
        checkpoint,
        arguments.steps,
        arguments.minutes * 60,
        arguments.seed,
        arguments.compile,
    )
    perplexity = math.exp(held_out_loss(model, evaluation, sequences=10**9))
    print(f"held-out perplexity {perplexity:.2f} over all of evaluation.txt", flush=True)
    sample = stdlib[: len(stdlib) // SEQUENCE * SEQUENCE].view(-1, SEQUENCE)[::200]  # (about 30, SEQUENCE)
    record |= {
        "perplexity_before_injection": round(perplexity, 3),
        "seed": arguments.seed,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "outlier_gain": OUTLIER_GAIN,
        "outlier_channels": inject_outliers(model, sample),
        "calibration_modules": list(corpus.calibration),
        "evaluation_modules": list(corpus.evaluation),
    }
    export(model, tokenizer, texts, record, arguments.out)
    checkpoint.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
