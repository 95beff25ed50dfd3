"""The model card of a folder that leaves us: what it was made from, how, and how it is served.

card.md.jinja   the text; its front matter is what the Hub reads

What a model's own files say goes into the card only as far as it is one plain line.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from smoothquant.artifacts.card import BEGIN, CARD, measured
from smoothquant.artifacts.manifest import Origin
from smoothquant.artifacts.record import read
from smoothquant.errors import UserError
from smoothquant.files import write_text
from smoothquant.int8_config import COMPRESSED_TENSORS, MODELOPT
from smoothquant.model import Model
from smoothquant.outputs import versions
from smoothquant.reading import read_text
from smoothquant.scheme import Scheme
from smoothquant.sidecars import LICENSES, sidecar
from smoothquant.workspace import Workspace

REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")  # on the Hub: ORG/NAME
CACHED = re.compile(r"models--(.+?)--(.+)")  # the Hub's cache: models--ORG--NAME/snapshots/REVISION
IDENTIFIER = re.compile(r"[A-Za-z0-9][\w.+-]*")
PLAIN = re.compile(r"[^\w .,+@()/-]")
LICENSE_KEYS = ("license", "license_name", "license_link")
UNMEASURED = "Not yet: `smoothquant validate FOLDER --reference MODEL --text heldout.txt` writes its numbers here."


@dataclass(frozen=True)
class CardForm:
    """The form of a folder. name: in words. tags: for the Hub. serve: a command that serves or loads it. library: that
    loads it, by the Hub's name; empty if that has none."""

    name: str
    tags: tuple[str, ...]
    serve: str = "vllm serve FOLDER"
    library: str = "transformers"


SMOOTHED = CardForm("smoothed, in float", ())
FORMS: Mapping[str, CardForm] = {  # by dialect
    COMPRESSED_TENSORS: CardForm("W8A8 (INT8) in the form of compressed-tensors", ("w8a8", "int8", COMPRESSED_TENSORS)),
    MODELOPT: CardForm(
        "W8A8 (INT8) in the form of ModelOpt", ("w8a8", "int8", MODELOPT), "tensorrt-edgellm-export FOLDER ONNX"
    ),
}
ONNX = CardForm(
    "ONNX decoder with Q/DQ", ("onnx", "int8"), "smoothquant build onnxruntime FOLDER --out ENGINE", library="onnx"
)
TRTLLM = CardForm(
    "TensorRT-LLM checkpoint",
    ("tensorrt-llm", "int8"),
    "smoothquant build tensorrt-llm FOLDER --out ENGINE",
    library="",
)
TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=False,  # Markdown; `_plain` leaves nothing to escape
    undefined=StrictUndefined,
    trim_blocks=True,
    keep_trailing_newline=True,
)


def card(model: Model, scheme: Scheme, form: CardForm, rows: Mapping[str, str]) -> str:
    """The text of README.md. rows: further facts, by name, for its table."""
    folder = model.checkpoint.folder
    source, base = _front_matter(folder), base_model(model)
    words = {name: value for name, value in scheme.words().items() if name != "float_linears"}
    return TEMPLATES.get_template("card.md.jinja").render(
        name=base or _plain(folder.resolve().name),
        base=base,
        quantized=scheme.quantized,
        licenses={key: json.dumps(source[key]) for key in LICENSE_KEYS if key in source},
        license=", ".join(_plain(source[key]) for key in LICENSE_KEYS if key in source),
        files=[name for name in LICENSES if sidecar(folder, name)],
        form=form,
        scheme={_plain(name.replace("_", " ")): _plain(str(value)) for name, value in words.items()},
        kept=[_plain(name) for name in scheme.float_linears],
        rows={name: _plain(value) for name, value in rows.items()},
        versions=", ".join(f"{name} {version}" for name, version in versions().items()),
        measured=measured(UNMEASURED),
    )


def write_card(model: Model, work: Workspace, form: CardForm) -> None:
    """Write the card of an export."""
    origin = read(Origin, work.inputs, "inputs")
    write_text(work.path(CARD), card(model, origin.scheme, form, facts(origin)))


def facts(origin: Origin) -> dict[str, str]:
    """What an export knows of how it was made, in words."""
    smoothing = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in origin.smoothing_words().items())
    steps = ", ".join(" ".join(map(str, step.values())) for step in origin.steps)
    told = {
        "smoothing": f"SmoothQuant (Xiao et al., ICML 2023), {smoothing}",
        "between smoothing and storing": steps,
        "fingerprint of the model": origin.model,
        "fingerprint of the act scales": origin.act_scales,
        "fingerprint of the plan": origin.plan,
    }
    return {name: value for name, value in told.items() if value}


def base_model(model: Model) -> str | None:
    """The name of a model on the Hub, as ORG/NAME; None if neither its place, its config.json nor its card tell."""
    folder = model.checkpoint.folder
    for part in folder.resolve().parts:
        cached = CACHED.fullmatch(part)
        if cached and REPOSITORY.fullmatch(name := "/".join(cached.groups())):
            return name
    told = model.checkpoint.config.get("_name_or_path")
    if isinstance(told, str) and REPOSITORY.fullmatch(told):
        return told
    found = _front_matter(folder).get("base_model", "")
    return found if BEGIN in _text(folder) and REPOSITORY.fullmatch(found) else None


def _front_matter(folder: Path) -> dict[str, str]:
    """The keys of a model's own card that have one plain word or line as their value."""
    lines = _text(folder).splitlines()
    if not lines or lines[0].strip() != "---":
        return {}
    found: dict[str, str] = {}
    for line in lines[1:]:
        if line.strip() == "---":
            return found
        key, _, value = line.partition(":")
        value = value.strip().strip("'\"")
        if IDENTIFIER.fullmatch(key) and value and value[0] not in "[{&*!|>%@`#" and value.isprintable():
            found[key] = value
    return {}


def _text(folder: Path) -> str:
    try:
        path = sidecar(folder, CARD)
        return read_text(path) if path else ""
    except UserError:
        return ""


def _plain(text: str) -> str:
    """A text in which nothing means anything in Markdown, and that stays in its line."""
    return PLAIN.sub("_", text)
