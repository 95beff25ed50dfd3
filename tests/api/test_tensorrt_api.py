"""builders/tensorrt and builders/nvidia call nothing that TensorRT 10 or 11 lacks: checked without TensorRT, against
its real modules."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

from tests.api.check import misuses
from tests.api.stubs import RELEASES, UnavailableError, members, stubs
from tests.lacking import lacking

ROOT = Path(__file__).parents[2]
GONE_IN_11 = {  # of TensorRT 10
    "BuilderFlag": {"FP16", "BF16", "INT8", "FP8", "INT4", "OBEY_PRECISION_CONSTRAINTS"},
    "Builder": {"platform_has_fast_int8", "platform_has_fast_fp16"},
    "IBuilderConfig": {"int8_calibrator", "set_quantization_flag"},
    "ICudaEngine": {"device_memory_size", "weight_streaming_budget"},
    "ILayer": {"precision"},
    "ITensor": {"dynamic_range"},
    "IInt8EntropyCalibrator2": {"read_calibration_cache"},
}
GOOD = """
    import tensorrt as trt

    def build(path: str):
        log = trt.Logger(trt.Logger.WARNING)
        builder = trt.Builder(log)
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, log)
        parser.parse_from_file(path)
        config = builder.create_builder_config()
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, 1 << 30)
        profile = builder.create_optimization_profile()
        profile.set_shape("x", (1, 1), (1, 2), (1, 3))
        config.add_optimization_profile(profile)
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
        print(trt.__version__)
        return builder.build_serialized_network(network, config)
"""
BAD = {  # line of code -> what is said of it, by 11.4
    "config.set_flag(trt.BuilderFlag.INT8)": '"type[BuilderFlag]" has no attribute "INT8"',
    "trt.NetworkDefinitionCreationFlag.EXPLICIT_BATCH": "EXPLICIT_BATCH",
    "builder.platform_has_fast_int8": '"Builder" has no attribute "platform_has_fast_int8"',
    "config.int8_calibrator = None": '"IBuilderConfig" has no attribute "int8_calibrator"',
    "trt.QuantizationFlag": 'Module has no attribute "QuantizationFlag"',
    "anything.engine.device_memory_size": '"ICudaEngine" has no attribute "device_memory_size"',
    "anything._engine.weight_streaming_budget = 0": '"ICudaEngine" has no attribute "weight_streaming_budget"',
    "builder.create_network(flags=0, of='x')": 'Unexpected keyword argument "of"',
    "trt.OnnxParser(log)": "Missing positional argument",
}


@cache
def unavailable(release: str) -> str:
    try:
        stubs(release)
    except UnavailableError as reason:
        return str(reason)
    return ""


@pytest.fixture(autouse=True)
def with_stubs(request: pytest.FixtureRequest) -> None:
    release = getattr(request.node, "callspec", None) and request.node.callspec.params.get("release")
    for wanted in [release] if release else ["10.16", "11.4"]:
        if reason := unavailable(wanted):
            lacking(f"no stubs of TensorRT {wanted}: {reason}")


@pytest.mark.parametrize("release", RELEASES)
def test_the_builder_uses_what_is_there(release: str) -> None:
    files = [path for room in ("tensorrt", "nvidia") for path in sorted((ROOT / "builders" / room).glob("*.py"))]
    assert len(files) > 10
    assert misuses(files, ROOT, release) == []


@pytest.mark.parametrize("release", RELEASES)
def test_good_code_passes(release: str, tmp_path: Path) -> None:
    assert misuses([written(GOOD, tmp_path)], tmp_path, release) == []


def test_bad_code_is_found(tmp_path: Path) -> None:
    code = "    import tensorrt as trt\n\n    def bad(builder: trt.Builder, config, log, anything):\n"
    path = written(code + "".join(f"        {line}\n" for line in BAD), tmp_path)
    found = misuses([path], tmp_path, "11.4")
    for number, (line, said) in enumerate(BAD.items(), start=4):
        assert any(text.startswith(f"code.py:{number}:") and said in text for text in found), (line, found)
    assert {int(text.split(":")[1]) for text in found} == set(range(4, 4 + len(BAD)))


def test_bad_use_of_a_module_that_is_an_argument_is_found(tmp_path: Path) -> None:
    """No type tells what it is; its name does, and so does the annotation of what it makes."""
    code = """
    import tensorrt

    def bad(trt, log):
        parser: tensorrt.OnnxParser = trt.OnnxParser(log, log)
        parser.parse_from_nowhere("x")
        return trt.BuilderFlag.INT8, trt.QuantizationFlag, trt.BuilderFlag.TF32
    """
    assert misuses([written(code, tmp_path)], tmp_path, "11.4") == [
        'code.py:5: "OnnxParser" has no attribute "parse_from_nowhere"',
        'code.py:6: "type[BuilderFlag]" has no attribute "INT8"',
        'code.py:6: Module has no attribute "QuantizationFlag"',
    ]


def test_what_went_with_11() -> None:
    old, new = members(stubs("10.16")), members(stubs("11.4"))
    for kind, names in GONE_IN_11.items():
        assert names <= old[kind]
        assert not names & new.get(kind, frozenset())


def written(code: str, folder: Path) -> Path:
    path = folder / "code.py"
    path.write_text("\n".join(line.removeprefix("    ") for line in code.strip("\n").splitlines()) + "\n")
    return path
