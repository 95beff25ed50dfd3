"""Quantizes a model with ModelOpt. Runs in ModelOpt's own environment.

python modelopt_worker.py MODEL OUT
"""

import sys

import modelopt.torch.quantization as mtq
import torch
from modelopt.torch.export import export_hf_checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer


def main(folder: str, out: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16).eval()
    ids = torch.randint(0, 256, (4, 48), generator=torch.Generator().manual_seed(1))
    model = mtq.quantize(model, mtq.INT8_SMOOTHQUANT_CFG, lambda found: found(ids))
    with torch.inference_mode():
        export_hf_checkpoint(model, export_dir=out)
    AutoTokenizer.from_pretrained(folder).save_pretrained(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
