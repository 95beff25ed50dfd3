"""What the doctor says of commands that need a GPU, on machines that this one is not."""

from __future__ import annotations

import pytest

from recipes import abilities

H100 = "NVIDIA H100 80GB HBM3, 81559 MiB, 9.0"
PLAIN = {"onnx": "1.23.2", "onnxruntime": "1.32.0"}
GPU = {"onnx": "1.23.2", "onnxruntime-gpu": "1.31.1", "tensorrt-cu13": "10.16.1.11"}


def asked(monkeypatch: pytest.MonkeyPatch, packages: dict[str, str], gpus: list[str]) -> dict[str, abilities.Ability]:
    monkeypatch.setattr(abilities, "_version", packages.get)
    monkeypatch.setattr(abilities, "_gpus", lambda: gpus)
    return {ability.command: ability for ability in abilities.examine().abilities}


def test_a_laptop(monkeypatch: pytest.MonkeyPatch) -> None:
    found = asked(monkeypatch, PLAIN, [])
    assert found["build onnxruntime, demo"].ready
    assert found["generate (an ONNX Runtime engine)"].ready
    assert found["calibrate, export hf, export w8a8, export modelopt, validate"].how == (
        "pip install 'smoothquant-toolchain[convert]'"
    )
    assert not found["build tensorrt"].ready
    assert found["build tensorrt"].how == ("pip install onnx tensorrt, or the image of docker/tensorrt; an NVIDIA GPU")
    assert found["build onnxruntime --provider cuda"].how.startswith("pip uninstall onnxruntime; pip install")


def test_packages_are_not_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    found = asked(monkeypatch, GPU, [])["build tensorrt"]
    assert not found.ready
    assert found.how == "onnx 1.23.2, tensorrt 10.16.1.11; an NVIDIA GPU"


def test_a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    found = asked(monkeypatch, GPU, [H100])
    ready = {command for command, ability in found.items() if ability.ready}
    assert {"build tensorrt", "build onnxruntime --provider cuda", "build onnxruntime --provider tensorrt"} <= ready
    assert "build onnxruntime --provider nv-tensorrt-rtx" not in ready
    assert found["build onnxruntime --provider nv-tensorrt-rtx"].how == (
        "pip install onnxruntime onnxruntime-ep-nv-tensorrt-rtx-cu13"
    )


def test_a_gpu_without_its_package_gets_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    asked(monkeypatch, PLAIN, [H100])
    [advice] = [line for line in abilities.examine().advice if "there is a GPU" in line]
    assert "smoothquant build tensorrt" in advice
    assert "runs Q/DQ as float" in advice
