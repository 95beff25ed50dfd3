"""The versions of compressed-tensors that servers pin read our config.json: they forbid what they do not know."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable

import pytest

from exporters.huggingface.dialects import quantization_config
from smoothquant.scheme import scheme_of
from tests.servers.environments import COMPRESSED_TENSORS, Environment

pytestmark = [
    pytest.mark.server,
    pytest.mark.skipif(
        any(environment.python is None for environment in COMPRESSED_TENSORS),
        reason="python -m tests.servers compressed-tensors unpacks its versions",
    ),
]
READ = """
import json, sys
import compressed_tensors
from compressed_tensors.quantization import QuantizationConfig
found = QuantizationConfig.model_validate(json.load(sys.stdin)).config_groups["group_0"]
print(compressed_tensors.__version__, found.weights.strategy, found.input_activations.dynamic)
"""


def read(environment: Environment, content: dict) -> subprocess.CompletedProcess[str]:
    """What a version says to a quantization_config."""
    [packages] = environment.folder.glob("lib/python*/site-packages")
    return subprocess.run(
        [sys.executable, "-c", READ],
        input=json.dumps(content),
        env=os.environ | {"PYTHONPATH": str(packages)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("environment", COMPRESSED_TENSORS, ids=lambda one: one.requirements[0])
@pytest.mark.parametrize("act", ["per-token", "per-tensor"])
def test_our_config_is_read(environment: Environment, act: str, record_property: Callable[[str, object], None]) -> None:
    content = quantization_config(scheme_of(act), ["lm_head"])
    version = environment.requirements[0].partition("==")[2]
    found = read(environment, content)
    assert found.stdout.split() == [version, "channel", str(act == "per-token")], found.stderr[-2000:]
    content["config_groups"]["group_0"]["weights"]["invented_later"] = None  # the control
    unknown = read(environment, content)
    assert unknown.returncode
    assert "invented_later" in unknown.stderr
    record_property("compressed-tensors", [version, act, "read"])
