"""The engine's own logic, run for real: shapes, chunks, profiles, the cache and its two sets of buffers.

The arithmetic is ONNX Runtime's (`fake`), so that every logit has one that it must equal.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from builders.engine.table import open_engine
from builders.onnxruntime import OnnxRuntimeEngine
from builders.tensorrt.cache import Cache
from builders.tensorrt.engine import TensorRTEngine
from builders.tensorrt.runtime import Port
from smoothquant.errors import UserError
from tests.builders.tensorrt.fake import Context, FakeGpu
from tests.models import sample_ids

PROMPT = [256, 5, 6, 7, 40, 41]


def runs(trt: Any) -> list[tuple]:
    """(profile, shape of the ids, shape of the mask) of every run so far; they are forgotten."""
    found = [call[1:] for call in trt.calls if call[0] == "run"]
    trt.calls.clear()
    return found


def test_logits_of_chunks_are_those_of_the_whole(make: Callable[..., Path], exports: dict[str, Path], trt: Any) -> None:
    engine, ids = open_engine(make("float")), sample_ids(4, 40)
    assert isinstance(engine, TensorRTEngine)
    runs(trt)
    found = engine.logits(ids)
    assert runs(trt) == [  # three sequences fit, then one; 40 = 8 + 16 + 16
        (0, (3, 8), (3, 8)), (0, (3, 16), (3, 24)), (0, (3, 16), (3, 40)),
        (0, (1, 8), (1, 8)), (0, (1, 16), (1, 24)), (0, (1, 16), (1, 40)),
    ]  # fmt: skip
    expected = OnnxRuntimeEngine(exports["float"]).logits(ids)
    assert (found.dtype, found.shape) == (torch.float32, expected.shape)
    assert (found - expected).abs().max() <= 5e-6 * expected.abs().max()  # the same sums in another order


@pytest.mark.parametrize("form", ["float", "per-token", "per-tensor"])
def test_generates_what_onnx_runtime_does(form: str, make: Callable[..., Path], exports: dict[str, Path]) -> None:
    """Through chunks of 4, so that the prompt is 2 + 4, and far enough for the cache to grow."""
    expected = list(OnnxRuntimeEngine(exports[form]).generate(PROMPT, 40))
    assert list(TensorRTEngine(make(form, chunk=4)).generate(PROMPT, 40)) == expected
    assert len(set(expected)) > 4


def test_profiles_and_shapes_of_a_generation(make: Callable[..., Path], trt: Any) -> None:
    engine = TensorRTEngine(make("float", chunk=4))
    trt.calls.clear()
    list(engine.generate(PROMPT, 3))
    switches = [call[1] for call in trt.calls if call[0] == "profile"]
    assert switches == [1]  # once per generation, not per token
    assert runs(trt) == [(0, (1, 2), (1, 2)), (0, (1, 4), (1, 6)), (1, (1, 1), (1, 7)), (1, (1, 1), (1, 8))]
    list(engine.generate(PROMPT, 1))
    assert [call[1] for call in trt.calls if call[0] == "profile"] == [0]
    trt.calls.clear()
    list(engine.generate(PROMPT[:5], 2))  # a prompt's run of one token is the decode profile's, too
    assert runs(trt) == [(1, (1, 1), (1, 1)), (0, (1, 4), (1, 5)), (1, (1, 1), (1, 6))]


def test_as_long_as_it_was_built_for(make: Callable[..., Path]) -> None:
    engine = TensorRTEngine(make("float"))
    assert engine.longest == 64
    decoding = engine.start(PROMPT)
    for token in range(58):
        decoding.step(token)
    expected = engine.logits(torch.tensor([[*PROMPT, *range(58)]]))[0, -1].numpy()
    assert abs(decoding.logits - expected).max() <= 5e-6 * abs(expected).max()
    with pytest.raises(UserError, match="at most 64 tokens together"):
        next(engine.generate(PROMPT, 59))
    with pytest.raises(UserError, match=r"a sequence of 65 tokens; expected at most 64.*--max-length"):
        engine.logits(sample_ids(1, 65))


def test_work_is_done_before_it_is_read(make: Callable[..., Path], gpu: FakeGpu) -> None:
    engine = TensorRTEngine(make("float"))
    before = gpu.waited
    engine.logits(sample_ids(1, 20))
    assert gpu.waited == before + 2


def test_a_token_tells_the_context_only_what_has_changed(
    make: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []

    def noted(call: Callable[[Context, str, Any], bool]) -> Callable[[Context, str, Any], bool]:
        return lambda self, name, value: told.append(name) or call(self, name, value)  # type: ignore[func-returns-value]

    for call in ("set_input_shape", "set_tensor_address"):
        monkeypatch.setattr(Context, call, noted(getattr(Context, call)))
    engine = TensorRTEngine(make("float"))
    decoding = engine.start(PROMPT)
    for token in range(4):
        told.clear()
        decoding.step(token)
    inputs = [name for name, port in engine.session.plan.ports.items() if port.is_input]
    past = [name for name in inputs if name.startswith("past")]
    present = ["present" + name.removeprefix("past_key_values") for name in past]
    assert sorted(told) == sorted(["attention_mask", *past, *past, *present])


def test_sequences_that_take_turns(make: Callable[..., Path]) -> None:
    """They share a context, and each has a cache of its own."""
    engine = TensorRTEngine(make("float"))
    first, second = engine.start(PROMPT), engine.start(PROMPT[:3])
    kept = first.logits
    for token in range(20, 30):
        first.step(token)
        second.step(token + 1)
    for found, ids in ((first, [*PROMPT, *range(20, 30)]), (second, [*PROMPT[:3], *range(21, 31)])):
        expected = engine.logits(torch.tensor([ids]))[0, -1].numpy()
        assert abs(found.logits - expected).max() <= 5e-6 * abs(expected).max()
    expected = engine.logits(torch.tensor([PROMPT]))[0, -1].numpy()
    assert abs(kept - expected).max() <= 5e-6 * abs(expected).max()  # a step does not write into earlier logits


# -- the cache ---------------------------------------------------------------------------------------------------------

PORTS = [Port(f"past_key_values.{layer}.{part}", torch.float32, (-1, 2, -1, 3), True) for layer in (0, 1)
         for part in ("key", "value")]  # fmt: skip


def filled(cache: Cache, tokens: int, first: int) -> list[tuple[int, int]]:
    """Run as an engine would: the present is the past and, per token, its number. Returns (past, present) addresses."""
    shapes, addresses = cache.shapes(), cache.place(tokens)
    places = []
    for port in PORTS:
        batch, heads, past, channels = shapes[port.name]
        old, write = cache.read[port.name], cache.write[port.name]
        place = (addresses[port.name], addresses["present." + port.name[16:]])
        assert place == (old.data_ptr(), write.data_ptr())
        new = torch.arange(first, first + tokens).float().view(1, 1, -1, 1).expand(batch, heads, tokens, channels)
        present = torch.cat([old[: batch * heads * past * channels].view(shapes[port.name]), new], dim=2)
        write[: present.numel()] = present.flatten()
        places.append(place)
    cache.advance(tokens)
    return places


def content(cache: Cache) -> list[int]:
    """Numbers of the tokens in the cache, the same in every layer, head and channel."""
    found = []
    for name, shape in cache.shapes().items():
        values = cache.read[name][: torch.Size(shape).numel()].view(shape)
        assert (values == values[:1, :1, :, :1]).all()
        found.append(values[0, 0, :, 0].tolist())
    assert len(found) == len(PORTS)
    assert all(one == found[0] for one in found)
    return found[0]


def test_two_sets_of_buffers_that_swap_and_grow() -> None:
    cache = Cache(PORTS, 2, 40, None, torch.device("cpu"))
    seen = []
    for tokens, first in ((5, 0), *((1, first) for first in range(5, 40))):
        for past, present in filled(cache, tokens, first):
            assert past != present
            seen.append(present)
        assert content(cache) == list(range(first + tokens))
    assert cache.cached == 40
    assert len(set(seen)) <= len(PORTS) * 2 * 4  # a set is replaced a few times, not at every token


@pytest.mark.parametrize("window", [1, 2, 7])
def test_a_window_bounds_the_cache(window: int) -> None:
    cache = Cache(PORTS, 1, 3 * window + 1, window, torch.device("cpu"))
    filled(cache, window, 0)
    for first in range(window, 60):
        filled(cache, 1, first)
        assert cache.cached <= 2 * window
        kept = content(cache)
        assert kept == list(range(first + 1 - len(kept), first + 1))
        assert len(kept) >= window - 1
