"""How near each engine comes to the float model on real weights: the mean KL divergence of its next tokens.

    python -m tests.benchmarks.peers.accuracy MODEL --calibration valid.txt --text test.txt [--alpha 0.6]

The float model is transformers' in float32. Ours and vLLM's folder are smoothed with act scales of the calibration
text; the others are as their own tools make them. llama.cpp tells the probabilities of the token behind a prompt alone,
so one position of 32 is asked of it. NNCF calibrates with the same text as ours. Each number is saved as soon as it is
there.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy
import torch
from transformers import AutoModelForCausalLM

from act_scales.collect import collect
from act_scales.text import load_text
from recipes.families import open_model
from recipes.pipeline import source_of
from smoothquant.machine import physical_cores
from smoothquant.settings import SmoothingSettings
from tests.benchmarks.peers.forms import PEERS, Forms, PeerForm, chosen, make_all, missing
from tests.benchmarks.peers.process import PeerProcess
from tests.benchmarks.results import Row, keep, show

NOTE = "llama.cpp: one position of 32"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--alpha", type=float, default=0.6)
    parser.add_argument("--samples", type=int, default=4, help="sequences of the text")
    parser.add_argument("--length", type=int, default=512, help="tokens of a sequence")
    parser.add_argument("--calibrate", type=int, default=32, help="sequences of the calibration, of that length")
    parser.add_argument("--threads", type=int, default=physical_cores())
    parser.add_argument("--engines", nargs="+", metavar="NAME", choices=[peer.name for peer in PEERS])
    given = parser.parse_args()
    text = load_text(given.text, given.model, given.samples, given.length)
    found: dict[str, float] = {}
    failed: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        copy = place / "model"  # genai's builder and ours read it; nothing is written beside the given files
        shutil.copytree(given.model, copy)
        model = open_model(copy)
        scales = place / "act_scales.safetensors"
        calibration = load_text(given.calibration, given.model, given.calibrate, given.length)
        collect(model, calibration, scales)
        source = source_of(model, scales, SmoothingSettings(given.alpha))
        forms = Forms(copy, place, source, calibration.sequences)
        ids = torch.stack([sequence for sequence in text.sequences if len(sequence) == given.length])
        reference = reference_logits(given.model, ids)
        for peer in chosen(given.engines):
            folders, refused = make_all(forms, [peer])
            failed |= refused
            try:
                if peer in folders:
                    found[peer.name] = measured(peer, folders[peer], given, place, ids, reference)
                    print(f"{peer.name}: {found[peer.name]:.5f}", file=sys.stderr)
            except RuntimeError as error:
                failed[peer.name] = str(error)
                print(f"left out: {error}", file=sys.stderr)
            keep("peers_accuracy", rows(found), details_of(given, ids, found, failed), command="peers.accuracy")
    show(rows(found))


def measured(
    peer: PeerForm, folder: Path, given: argparse.Namespace, place: Path, ids: torch.Tensor, reference: Sequence
) -> float:
    """The KL of an engine. ids: int64 (sequences, tokens); reference: the logits of each sequence, (tokens, vocab)."""
    each = []
    with PeerProcess(peer, folder, given.threads, place / "log") as process:
        for number, row in enumerate(ids):
            numpy.save(place / "ids.npy", row[None].numpy())
            process.logits(place / "ids.npy", place / "logits.npy")
            each.append(divergence(torch.from_numpy(numpy.load(place / "logits.npy"))[0], reference[number]))
    return torch.cat(each).mean().item()


def rows(found: Mapping[str, float]) -> list[Row]:
    """A line for each engine. found: its KL, by its name."""
    return [Row(f"KL, {name}", f"{value:.5f}") for name, value in found.items()]


def details_of(given: argparse.Namespace, ids: torch.Tensor, found: Mapping[str, float], failed: Mapping) -> dict:
    return {
        "divergence": dict(found),
        "tokens": ids.numel(),
        "calibration": given.calibrate * given.length,
        "note": NOTE,
        "failed": dict(failed),
        "missing": missing(),
    }


@torch.inference_mode()
def reference_logits(model: Path, ids: torch.Tensor) -> list[torch.Tensor]:
    """Transformers' logits in float32, (tokens, vocab) of each sequence. ids: (sequences, tokens)."""
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    return [loaded(row[None]).logits[0] for row in ids]


def divergence(logits: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """KL(reference || logits) in nats, float64 (known positions,). logits, reference: (tokens, vocab); a position whose
    logits are NaN is unknown."""
    known = ~logits[:, 0].isnan()
    theirs, ours = (each[known].double().log_softmax(-1) for each in (logits[:, : reference.shape[1]], reference))
    return (ours.exp() * (ours - theirs)).sum(-1)


if __name__ == "__main__":
    main()
