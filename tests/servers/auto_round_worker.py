"""Quantizes models with AutoRound. Runs in AutoRound's own environment.

    python auto_round_worker.py < {"jobs": [{"model": FOLDER, "out": FOLDER, "form": NAME}, ...]}

The answer is one line of stdout for each job: {"out": FOLDER}, or {"failed": why}.
"""

import json
import shutil
import sys
from pathlib import Path

import torch
from auto_round import AutoRound
from transformers import AutoModelForCausalLM, AutoTokenizer

FORMS = {  # scheme, format, steps of tuning
    "rounded": ("INT8", "llm_compressor", 0),
    "tuned": ("INT8", "llm_compressor", 8),
    "4 bits": ("W4A16", "auto_round", 0),
}


def main() -> None:
    for job in json.load(sys.stdin)["jobs"]:
        try:
            quantize(job["model"], job["out"], job["form"])
            answer = {"out": job["out"]}
        except Exception as error:  # what it says is the answer
            answer = {"failed": " ".join(f"{type(error).__name__}: {error}".split())}
        print(json.dumps(answer), flush=True)


def quantize(folder: str, out: str, form: str) -> None:
    scheme, kind, steps = FORMS[form]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = torch.randint(0, 256, (16, 64), generator=torch.Generator().manual_seed(1))
    rounding = AutoRound(
        model,
        tokenizer,
        scheme=scheme,
        iters=steps,
        nsamples=len(ids),
        seqlen=ids.shape[1],
        dataset=list(ids[:, None]),
        device_map="cpu",
        enable_torch_compile=False,
        disable_opt_rtn=True,
    )
    rounding.quantize_and_save(f"{out}.made", format=kind)
    (made,) = (path.parent for path in Path(f"{out}.made").rglob("config.json"))  # it adds a folder of its own
    shutil.move(made, out)


if __name__ == "__main__":
    main()
