"""Everything about the images but building them: linters, what they copy, and the entry point with fake tools."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from builders.tensorrt_llm.build.command import CONTAINER
from builders.tensorrt_llm.format.releases import IMAGE
from exporters.trtllm.versions import STABLE, builds_engines
from recipes.cli import parser
from tests.builders.tensorrt_llm.fake_tools import script
from tests.docker.dockerfile import Stage, assignments, stages
from tests.lacking import lacking

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
ENTRYPOINT = DOCKER / "tensorrt-llm/entrypoint.sh"
DOCKERFILES = sorted(DOCKER.glob("*/Dockerfile"))


def linter(name: str) -> str:
    """A linter, of this environment or of the machine."""
    found = shutil.which(name, path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    return found or lacking(f"{name} is not installed")


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.parent.name)
def test_dockerfiles_pass_hadolint(path: Path) -> None:
    found = subprocess.run([linter("hadolint"), path], capture_output=True, text=True, check=False)
    assert (found.stdout, found.returncode) == ("", 0)


def test_scripts_pass_shellcheck() -> None:
    scripts = sorted(DOCKER.rglob("*.sh"))
    found = subprocess.run([linter("shellcheck"), *scripts], capture_output=True, text=True, check=False)
    assert (found.stdout, found.returncode) == ("", 0)


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.parent.name)
def test_what_is_copied_is_there(path: Path) -> None:
    ignored = [line.strip("/*") for line in (ROOT / ".dockerignore").read_text().splitlines()]
    sources = re.findall(r"^COPY (?:--\S+ )*(\S+) ", path.read_text(), re.MULTILINE)
    assert sources
    for source in sources:
        assert (ROOT / source).exists()
        assert Path(source).parts[:1] not in [(name,) for name in ignored]


def test_compose_knows_every_image() -> None:
    services = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]
    del services["triton"]  # NVIDIA's own
    for name, service in services.items():
        assert service["image"] == f"smoothquant-{name}"
        assert service["build"]["context"] == ".."
        folder = name.removesuffix("-serve")
        assert service["build"]["dockerfile"] == f"docker/{folder}/Dockerfile"
        assert service["build"].get("target") in (None, *stages((DOCKER / folder / "Dockerfile").read_text()))
        gpu = service.get("deploy", {}).get("resources", {}).get("reservations", {}).get("devices")
        assert bool(gpu) == name.startswith("tensorrt")
    assert {path.parent.name for path in DOCKERFILES} <= set(services)
    assert services["tensorrt-llm"]["image"] == CONTAINER


def test_the_serving_image_is_for_a_file_system_that_is_read_only() -> None:
    """It installs what `serve` needs, and no extra that brings PyTorch. Nobody but a number runs it, and the process
    that signals reach is the server itself."""
    stage = stages((DOCKER / "onnxruntime/Dockerfile").read_text())["serve"]
    steps = dict(stage.steps)
    (installed,) = [rest for word, rest in stage.steps if word == "RUN" and "pip install" in rest]
    assert '".[serve]"' in installed
    assert steps["USER"].isdecimal()
    assert int(steps["USER"]) > 0
    assert assignments(steps["ENV"])["HOME"] == "/tmp"
    assert json.loads(steps["ENTRYPOINT"]) == ["smoothquant-serve"]
    assert json.loads(steps["HEALTHCHECK"].partition(" CMD ")[2]) == ["smoothquant-serve", "health"]
    service = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]["onnxruntime-serve"]
    assert (service["read_only"], service["tmpfs"], service["build"]["target"]) == (True, ["/tmp"], "serve")


def documented(name: str) -> list[list[str]]:
    """The commands of a block in docker/README.md, as words."""
    text = (DOCKER / "README.md").read_text().partition(f"<!-- {name} -->\n\n")[2].partition("\n\n")[0]
    return [shlex.split(line) for line in text.replace("\\\n", " ").splitlines()]


def test_the_serving_image_is_documented_as_it_is() -> None:
    """Its stage, its name, what it is to be run with, and the port that it listens on."""
    build, run, ask = documented("serve image")
    service = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]["onnxruntime-serve"]
    assert build == [
        *("docker", "build", "-f", service["build"]["dockerfile"], "--target", service["build"]["target"]),
        *("-t", service["image"], "."),
    ]
    assert run[:6] == ["docker", "run", "--rm", "--read-only", "--tmpfs", *service["tmpfs"]]
    assert run[-3:] == ["-p", *service["ports"], service["image"]]
    assert run[run.index("-v") + 1].partition(":")[2] == service["volumes"][0].rpartition("}:")[2]
    assert json.loads(ask[-1])["model"] == "engine"  # the name of the folder that is mounted
    script = (DOCKER / "onnxruntime/serve.sh").read_text()
    assert re.findall(r"^ *(engine|port)=(\S+)$", script, re.MULTILINE) == [
        *(("engine", "/engine"), ("port", "8000"), ("engine", "/opt/ml/model"), ("port", "8080")),
    ]


def test_what_is_documented_of_sagemaker_is_a_command() -> None:
    written = []
    for words in documented("sagemaker"):
        if words[0] == "smoothquant":
            arguments = parser().parse_args(words[1:])
            assert (arguments.command, arguments.server) == ("serve-config", "sagemaker")
            written.append(arguments.out)
        else:
            assert words[0] == "aws"
            assert any(written[0] in word for word in words)
    assert len(written) == 2


def test_a_dockerfile_is_read_as_it_is_built() -> None:
    text = "# one\nARG A=1\nFROM a AS first\nRUN x \\\n # not a step\n && y\n\nfrom\nFROM first\nCOPY . .\n"
    with pytest.raises(ValueError, match="from"):
        stages(text)
    found = stages(text.replace("from\n", "ENV A=1 B='2 3'\n"))
    assert found == {
        "first": Stage("a", (("RUN", "x   && y"), ("ENV", "A=1 B='2 3'"))),
        "1": Stage("first", (("COPY", ". ."),)),
    }
    assert assignments("A=1 B='2 3'") == {"A": "1", "B": "2 3"}


def test_the_pinned_version_builds_engines() -> None:
    text = (DOCKER / "tensorrt-llm/Dockerfile").read_text()
    (version,) = re.findall(r"^ARG TENSORRT_LLM=(\S+)$", text, re.MULTILINE)
    assert version == STABLE
    assert builds_engines(version)
    assert f"FROM {IMAGE}:${{TENSORRT_LLM}}" in text
    assert "${TENSORRT_LLM:-1.2.1}" in (DOCKER / "compose.yaml").read_text()


def test_compose_builds_the_release_of_the_dockerfile() -> None:
    """And hands another one on."""
    (release,) = re.findall(r"^ARG RELEASE=(\S+)$", (DOCKER / "tensorrt/Dockerfile").read_text(), re.MULTILINE)
    services = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]
    assert services["tensorrt"]["build"]["args"] == {"RELEASE": f"${{RELEASE:-{release}}}"}
    assert services["triton"]["image"].endswith(f"/tritonserver:${{RELEASE:-{release}}}-py3")  # serves what was built


def test_images_install_what_their_commands_need() -> None:
    """Extras that pyproject.toml has; in the TensorRT image those of `generate --triton` too."""
    known = dict(re.findall(r"^([\w-]+) = \[(.*)", (ROOT / "pyproject.toml").read_text(), re.MULTILINE))
    installed = {path.parent.name: re.findall(r'"\.\[(\S+)\]"', path.read_text()) for path in DOCKERFILES}
    extras = {name: set(",".join(found).split(",")) - {""} for name, found in installed.items()}
    assert set().union(*extras.values()) <= set(known)
    assert {"triton", "polygraphy"} <= extras["tensorrt"]


# -- NVIDIA's entry point, and a user without a name -------------------------------------------------------------------

NVIDIA = [DOCKER / name / "Dockerfile" for name in ("tensorrt", "tensorrt-llm")]
AFTER = DOCKER / "after-nvidia.sh"
THEIRS = """#!/bin/bash
cat "${0%/*}/banner.txt"
source "${0%/*}/compatibility.sh"
if [[ $# -eq 0 ]]; then exec /bin/bash; else exec "$@"; fi
"""


def test_nvidias_entry_point_comes_first(tmp_path: Path) -> None:
    """What it sets is there; what it prints does not mix with a result; arguments, input and status are handed on."""
    script(tmp_path / "theirs", THEIRS)  # in the manner of triton-inference-server/server, docker/cpu_only
    (tmp_path / "banner.txt").write_text("== TensorRT ==\n")
    (tmp_path / "compatibility.sh").write_text("export FOUND=compat\n")
    command = [AFTER, "bash", "-c", 'echo "$FOUND|$1|$(cat)"; exit 3', "bash", "a  b"]
    for name, expected, banner in (("theirs", "compat|a  b|in\n", "== TensorRT ==\n"), ("absent", "|a  b|in\n", "")):
        environment = {"PATH": "/usr/bin:/bin", "NVIDIA_ENTRYPOINT": str(tmp_path / name)}
        found = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, input="in")
        assert (found.stdout, found.stderr, found.returncode) == (expected, banner, 3)


@pytest.mark.parametrize("path", NVIDIA, ids=lambda path: path.parent.name)
def test_a_user_without_a_name(path: Path) -> None:
    """`docker run --user`: no line of /etc/passwd is theirs, and PyTorch asks for a name."""
    text = path.read_text()
    assert re.search(r'^ENTRYPOINT \["after-nvidia", "smoothquant', text, re.MULTILINE)
    assert re.findall(r"^USER (\d+)$", text, re.MULTILINE) == ["65534"]
    (line,) = re.findall(r"^ENV (HOME=.*)$", text, re.MULTILINE)
    names = dict(entry.split("=") for entry in line.split())
    assert os.stat(names["HOME"]).st_mode & 0o1777 == 0o1777
    program = "import getpass, pwd; pwd.getpwuid = {}.__getitem__; print(getpass.getuser())"
    without = {"HOME": names["HOME"]}
    for environment, status in ((names, 0), (without, 1)):
        found = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, check=False)
        assert found.returncode == status


# -- the entry point, with a `smoothquant` that writes down how it was called ------------------------------------------

FAKE = """#!/bin/sh
printf '%s\\n' "$*" >> "$CALLS"
[ "$1 $2" = "$FAIL" ] && { echo "smoothquant: no" >&2; exit 3; }
while [ $# -gt 1 ]; do [ "$1" = --out ] && : > "$2.made"; shift; done
exit 0
"""


class Machine:
    """Runs the entry point, and knows which commands it ran."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.calls_file = folder, folder / "calls"
        (folder / "bin").mkdir()
        script(folder / "bin/smoothquant", FAKE)
        self.model, self.out = folder / "my model", folder / "out"
        self.model.mkdir()

    def run(self, *arguments: object, fail: str = "") -> subprocess.CompletedProcess[str]:
        environment = {"PATH": f"{self.folder}/bin:/usr/bin:/bin", "CALLS": str(self.calls_file), "FAIL": fail}
        command = [ENTRYPOINT, *map(str, arguments)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30, check=False)

    def engine(self, *arguments: object, fail: str = "") -> subprocess.CompletedProcess[str]:
        return self.run("engine", "--model", self.model, "--out", self.out, *arguments, fail=fail)

    @property
    def calls(self) -> list[str]:
        return self.calls_file.read_text().splitlines() if self.calls_file.exists() else []


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_any_command_is_handed_on(machine: Machine) -> None:
    assert machine.run("build", "tensorrt-llm", "/c d", "--out", "/e").returncode == 0
    assert machine.run().returncode == 0
    assert machine.calls == ["build tensorrt-llm /c d --out /e", ""]
    assert machine.run("check", "/x", fail="check /x").returncode == 3


def test_a_model_becomes_an_engine(machine: Machine) -> None:
    model, out = machine.model, machine.out
    found = machine.engine("--text", "/t.txt", "--export", "--tp 2 --alpha 0.85", "--build", "--max-batch-size 64")
    assert found.returncode == 0, found.stderr
    scales = out / "act_scales.safetensors"
    assert machine.calls == [
        f"calibrate {model} --text /t.txt --out {scales}",
        f"export trtllm {model} {scales} --out {out}/checkpoint --tp 2 --alpha 0.85",
        f"build tensorrt-llm {out}/checkpoint --out {out}/engine --max-batch-size 64",
        f"serve-config {out}/engine --out {out}/triton --tokenizer {model}",
    ]
    assert re.findall(r"== (\w+)", found.stderr) == ["calibrate", "export", "build", "serve"]


def test_scales_that_are_there_are_not_made_again(machine: Machine) -> None:
    assert machine.engine("--scales", "/s.pt").returncode == 0
    assert machine.calls[0].startswith(f"export trtllm {machine.model} /s.pt ")
    (machine.out / "act_scales.safetensors").touch()
    machine.calls_file.unlink()
    assert machine.engine("--text", "/t.txt").returncode == 0
    assert machine.calls[0].startswith("export trtllm")


def test_validation_comes_before_the_build(machine: Machine) -> None:
    found = machine.engine("--scales", "/s.pt", "--reference-text", "/h.txt", fail=f"validate {machine.out}/checkpoint")
    assert found.returncode == 3
    out = machine.out
    assert machine.calls[-1] == (
        f"validate {out}/checkpoint --reference {machine.model} --text /h.txt --report {out}/report.html"
    )


def test_a_step_that_fails_is_the_last(machine: Machine) -> None:
    found = machine.engine("--text", "/t.txt", fail=f"calibrate {machine.model}")
    assert (found.returncode, found.stderr.splitlines()[-1]) == (3, "smoothquant: no")
    assert len(machine.calls) == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--model", "/m"), "--out is missing"),
        (("--out", "/o"), "--model is missing"),
        (("--model", "/m", "--out", "/o"), "give --text to calibrate on, or --scales"),
        (("--model", "/m", "--out", "/o", "--text", "t"), "/m: no such folder; is it mounted (-v)?"),
        (("--model",), "--model wants a value"),
        (("--modle", "/m"), "unknown option --modle"),
    ],
)
def test_arguments_that_are_wrong(arguments: tuple[str, ...], said: str, machine: Machine) -> None:
    found = machine.run("engine", *arguments)
    assert (found.returncode, found.stderr.splitlines()[0]) == (2, f"entrypoint: {said}")
    assert "usage: engine" in found.stderr
    assert machine.calls == []


def test_help(machine: Machine) -> None:
    found = machine.run("engine", "--help")
    assert (found.returncode, found.stdout.splitlines()[0][:13]) == (0, "usage: engine")


def test_with_the_real_command() -> None:
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    found = subprocess.run([ENTRYPOINT, "--version"], env=environment, capture_output=True, text=True, check=False)
    assert found.stdout.startswith("smoothquant "), found.stderr
