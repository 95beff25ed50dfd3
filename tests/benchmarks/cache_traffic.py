"""The bytes that a step must move, by the form of its KV cache: computed from sizes and data sheets, not measured.

    weights    INT8 linears, and the output head in half precision, once for all sequences
    grown      3 x cache: Concat reads the past and writes all anew, then attention reads it
    in place   1 x cache: a token's keys and values are written where they stay (some thousandths of it), attention
               reads the rest

Of Llama-2-7B on an H100, with a cache that is as full as its capacity: attention reads a whole buffer in place. INT8
grows alone, since TensorRT writes no integers in place.
"""

from __future__ import annotations

LAYERS, HIDDEN, INTERMEDIATE, VOCABULARY = 32, 4096, 11008, 32000
TOKENS, BATCHES = 4096, (1, 8)
BANDWIDTH = 3.35e12  # bytes a second: an H100 SXM's data sheet
FORMS = {  # form -> bytes of a number, times that the cache is moved
    "grown, float16": (2, 3),
    "grown, INT8 (`--kv int8`)": (1, 3),
    "in place, float16 (`--cache in-place`)": (2, 1),
}


def weight_bytes() -> int:
    """INT8 linears and a half-precision head."""
    return LAYERS * (4 * HIDDEN * HIDDEN + 3 * HIDDEN * INTERMEDIATE) + 2 * VOCABULARY * HIDDEN


def cache_bytes(batch: int, size: int) -> int:
    """Keys and values of all layers. size: bytes of a number."""
    return 2 * LAYERS * HIDDEN * TOKENS * batch * size


def step_bytes(form: str, batch: int) -> int:
    """What a step of `batch` sequences moves. form: of `FORMS`."""
    size, times = FORMS[form]
    return weight_bytes() + times * cache_bytes(batch, size)


def table() -> str:
    """A line per form, a column per batch."""
    heads = [f"{batch} x {TOKENS} tokens" if batch > 1 else f"{TOKENS} tokens" for batch in BATCHES]
    lines = [f"| cache (computed, H100 SXM) | {' | '.join(heads)} |", f"|---|{'---|' * len(heads)}"]
    for form in FORMS:
        cells = []
        for batch in BATCHES:
            moved, least = step_bytes(form, batch), step_bytes(list(FORMS)[-1], batch)
            cells.append(f"{moved / 1e9:.1f} GB, {moved / BANDWIDTH * 1e3:.2f} ms ({moved / least:.2f} times in place)")
        lines.append(f"| {form} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
