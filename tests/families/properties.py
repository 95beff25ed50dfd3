"""What must hold for every layout. Each property is a function of a `Case`; its docstring says what it proves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from builders.check import check
from builders.check.tensorrt_rtx import compile_onnx
from builders.nvidia.profiles import single_profile
from builders.tensorrt_llm import CheckpointEngine
from builders.tensorrt_llm import check as check_checkpoint
from builders.tensorrt_llm.format.findings import errors
from builders.transformers import TransformersEngine
from exporters.export import export
from exporters.trtllm import TrtllmWriter, choose
from smoothquant.contract import TOLERANCE, relative_error
from smoothquant.errors import CheckpointError, UserError
from smoothquant.model import Model
from smoothquant.scheme import scheme_of
from smoothquant.settings import SmoothingSettings
from tests.exporters.onnx.graphs import Runner
from tests.exporters.onnx.test_linear_exactness import check_products
from tests.families.case import SETTINGS, Case
from tests.families.differences import FLOAT32, GRAPH, largest_difference, products_of, token_errors
from tests.families.engines import (
    engine_generates_as_transformers,
    engine_validates,
    grouped_sequences_do_not_see_each_other,
    openvino_runs_every_layout,
)
from tests.families.hooks import hooked_absmax, hooked_streams
from tests.lacking import require_compiler
from tests.models import sample_ids

COMPILED = ("per-token", "per-tensor fp16")
ALSO_COMPILED = ("per-tensor", "per-token fp16", "per-token bf16")
COMPILED_EXPERTS = 32  # at the most: the compiler's time grows faster than the graph, to most of a minute with 128
KINDS_OF_LAYERS = (  # others differ in numbers of heads, windows, positions; a tied head; whether shares are normed
    "llama",
    "llama-biased",
    "mixtral",
    "falcon-7b",
    "falcon-40b",
    "falcon-rw",
    "opt",
    "opt-350m",
    "bloom",
    "qwen3",
    "phi3",
    "phi3-partial",
    "gemma2",
    "gemma3",
    "granite",
    "olmo2",
)


def decoder_is_transformers(case: Case) -> None:
    """Our decoder, in float, gives the logits of transformers."""
    ids = sample_ids()
    assert largest_difference(case.ours(ids), case.logits(ids)) <= FLOAT32


def every_tensor_is_accounted_for(case: Case) -> None:
    """No tensor of the checkpoint is left over, and none that the record names may be missing."""
    model, tensors = case.model, case.model.checkpoint.tensors
    tied = {f"{model.family.lm_head}.weight"} if model.geometry.tied_embeddings else set()
    assert set(tensors) - tied == set(model.expected())
    for name in list(model.expected())[:: max(1, len(tensors) // 7)]:
        info = tensors.pop(name)
        with pytest.raises(CheckpointError, match=rf"tensor {name} is missing"):
            Model(model.checkpoint, model.family)
        tensors[f"{name}.other"] = info
        tensors[name] = info
        with pytest.raises(CheckpointError, match=rf"tensor {name}\.other is not part of a"):
            Model(model.checkpoint, model.family)
        del tensors[f"{name}.other"]


def act_scales_are_what_hooks_see(case: Case) -> None:
    """Calibration finds the input maxima that hooks on transformers' modules find."""
    expected, found = hooked_absmax(case.transformers, case.model, sample_ids()), case.act_scales.input_absmax
    silent = {name for name in found if name.rpartition(".")[0] in case.act_scales.silent}  # experts without a token
    assert found.keys() == expected.keys() | silent
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values, rtol=1e-4, atol=1e-5 * values.max().item(), msg=name)
    # the stream within a layer, and its branches, lie between what goes in, what comes out, and their norms' sizes
    for name, reach in hooked_streams(case.transformers, case.model, sample_ids()).items():
        held = case.act_scales.held_absmax[name].item()
        branches = [
            values.max().item() for key, values in case.act_scales.output_absmax.items() if key.startswith(name)
        ]
        assert reach * (1 - 1e-5) <= held <= 3 * max(reach, *branches), name


def smoothing_leaves_the_logits(case: Case) -> None:
    """Smoothed logits equal the original's to 1e-5 with the default groups and with the paper's."""
    ids = sample_ids()
    for settings in (SETTINGS, SmoothingSettings(0.85), SmoothingSettings(0.5, "paper")):
        assert relative_error(case.ours(ids, settings), case.logits(ids)) <= TOLERANCE
        smoothed = {role for layer in case.smoothed(settings) for role in layer.column}
        chosen = {
            role for group in settings.chosen(case.model.groups, case.model.quantized_roles) for role in group.linears
        }
        assert smoothed == chosen


def smoothed_export_loads_in_transformers(case: Case) -> None:
    """`export hf`: transformers loads the folder, nothing missing or left over, and it is the same function."""
    ids = sample_ids(seed=3)
    assert relative_error(TransformersEngine(case.export("hf")).logits(ids), case.logits(ids)) <= TOLERANCE


def w8a8_export_runs_in_transformers(case: Case) -> None:
    """`export w8a8`, dynamic: compressed-tensors runs it. It rounds to steps of amax / 127.5 where ours are amax / 127:
    two W8A8 models of the same weights, as near to each other as each is to the float model, and no nearer."""
    ids = sample_ids(sequences=8, seed=5)
    found, ours = TransformersEngine(case.export("w8a8")).logits(ids), case.w8a8(ids, "per-token")
    plain = case.logits(ids)
    assert relative_error(found, ours) < 1.5 * relative_error(ours, plain)
    assert relative_error(found, plain) < 1.5 * relative_error(ours, plain)


def static_w8a8_export_is_ours_in_transformers(case: Case) -> None:
    """`export w8a8 --act per-tensor`: compressed-tensors computes our numbers, but for float32 rounding: tokens that it
    does not push over the edge of a step agree to 1e-5, and these are most."""
    ids = sample_ids(sequences=8, seed=5)
    found = TransformersEngine(case.export("w8a8 static")).logits(ids)
    ours = case.w8a8(ids, "per-tensor", torch.float32)
    assert token_errors(found, ours).median() <= 1e-5


def float_graph_is_transformers(case: Case) -> None:
    """`export onnx --float`: the logits of transformers, in one go, token by token with a cache, and left-padded."""
    ids = sample_ids(sequences=3, tokens=20, seed=2)
    path = case.export("float") / "model.onnx"
    expected = case.logits(ids)
    assert largest_difference(Runner(path).run(ids)[0], expected) <= GRAPH
    chunked = Runner(path)
    parts = [chunked.run(ids[:, :7])[0], *(chunked.run(ids[:, i : i + 1])[0] for i in range(7, 20))]
    assert largest_difference(torch.cat(parts, dim=1), expected) <= GRAPH

    mask = torch.stack([(torch.arange(20) >= padding).long() for padding in (0, 3, 11)])
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    places = {} if case.model.family.alibi else {"position_ids": positions}
    padded = case.logits(ids, attention_mask=mask, **places)[mask.bool()]
    assert largest_difference(Runner(path).run(ids, mask, positions)[0][mask.bool()], padded) <= GRAPH
    chunked = Runner(path)
    parts = [chunked.run(ids[:, :12], mask[:, :12], positions[:, :12])[0]]
    parts += [chunked.run(ids[:, i : i + 1], mask[:, : i + 1], positions[:, i : i + 1])[0] for i in range(12, 20)]
    assert largest_difference(torch.cat(parts, dim=1)[mask.bool()], padded) <= GRAPH


def quantized_linears_are_exact(case: Case) -> None:
    """Every product of the W8A8 graphs is one integer kernel and the exact integer computation, to 1e-6."""
    for form in ("per-token", "per-tensor"):
        assert check_products(case.source, case.export(form), sample_ids(seed=4)) == products_of(case.model)


def quantized_model_is_exact(case: Case) -> None:
    """The whole W8A8 graph is as near to the float64 W8A8 model as PyTorch in float32 is: tokens without a rounding
    flip, which are most, differ by as little.

    A flip: of some 900 values per token that are quantized, each is within float32's rounding of an edge with
    probability 1e-5, which makes 1 token in 100; it moves the 8 tokens behind it, too. They cluster, since equal tokens
    enter the first layer alike: `test_model_exactness` compares their number, over 98304 tokens."""
    ids = sample_ids(128, 16, seed=8)
    for act in ("per-token", "per-tensor"):
        exact, pytorch = case.w8a8(ids, act), case.w8a8(ids, act, torch.float32)
        engine = Runner(case.export(act) / "model.onnx").run(ids)[0]
        ours, theirs = token_errors(engine, exact), token_errors(pytorch, exact)
        assert ours.median() <= 1.5 * theirs.median()
        assert (ours > 1e-4).double().mean() <= 0.1


def tensorrt_compiles_every_product_to_int8(case: Case) -> None:
    """`check --compiler tensorrt-rtx`: TensorRT's real compiler takes the graphs, per token in float32 and per tensor
    in float16, of every kind of layer per token with every body, per tensor with two, with 32 experts at the most;
    every quantized product is an INT8 kernel. The linter finds no fault."""
    require_compiler()
    if case.model.geometry.experts > COMPILED_EXPERTS:
        case = replace(case, root=case.root / "compiled", numbers={"num_experts": COMPILED_EXPERTS})
    for form in COMPILED + ALSO_COMPILED if case.name in KINDS_OF_LAYERS else COMPILED:
        found = check(case.export(form), compile=lambda g: compile_onnx(g.path, single_profile(4, 128, 128), g.symbols))
        assert found.faults == []
        assert found.findings == ()
        assert set(found.in_float) == set(case.model.float_linears())
        assert sum(verdict.int8 for verdict in found.verdicts) == found.kinds["Int8 gemm"] == products_of(case.model)


def trtllm_checkpoint_computes_ours(case: Case) -> None:
    """`export trtllm`: the loader's rules find nothing wrong, and an interpreter of the format, which shares no code
    with the exporter, computes our W8A8 logits (nearer to them than they are to the float model's: the checkpoint holds
    norms and embedding in float16). A dash: TensorRT-LLM has no such decoder; the export is refused with the reason.
    """
    source = replace(case.source, output_absmax=case.act_scales.output_absmax)
    refusals = []
    for act in ("per-token", "per-tensor"):  # OPT only has the static one
        out = case.root / f"trtllm-{act}"
        try:
            export(source, [TrtllmWriter(out, choose(scheme_of(act)))])
        except UserError as refused:
            refusals.append(str(refused))
            continue
        assert not errors(check_checkpoint(out))
        ids = sample_ids(8, case.model.facts().cache_window or 24, seed=5)  # windows are given at run time there
        found, ours = CheckpointEngine(out).logits(ids), case.w8a8(ids, act)
        assert relative_error(found, ours) < relative_error(ours, case.logits(ids))
        return
    pytest.skip(refusals[0])


PROPERTIES: dict[str, Callable[[Case], None]] = {
    "decoder": decoder_is_transformers,
    "tensors": every_tensor_is_accounted_for,
    "calibrate": act_scales_are_what_hooks_see,
    "smooth": smoothing_leaves_the_logits,
    "hf": smoothed_export_loads_in_transformers,
    "w8a8": w8a8_export_runs_in_transformers,
    "w8a8 static": static_w8a8_export_is_ours_in_transformers,
    "onnx float": float_graph_is_transformers,
    "onnx linears": quantized_linears_are_exact,
    "onnx model": quantized_model_is_exact,
    "tensorrt": tensorrt_compiles_every_product_to_int8,
    "engine": engine_generates_as_transformers,
    "grouped": grouped_sequences_do_not_see_each_other,
    "openvino": openvino_runs_every_layout,
    "validate": engine_validates,
    "tensorrt llm": trtllm_checkpoint_computes_ours,
}
