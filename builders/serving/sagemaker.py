"""Write what SageMaker's hosting takes: a folder of artefacts, and the request that creates the model.

    model/               what lies in /opt/ml/model of the container, uncompressed under one S3 prefix
    create-model.json    for `aws sagemaker create-model --cli-input-json`
    manifest.json

An ONNX Runtime engine is served by our image, docker/onnxruntime, its stage `serve`. A W8A8 folder is served by vLLM in
AWS's LMI container, which reads `serving.properties` beside the weights. A folder whose config.json says how it is
quantized wants no option.quantize.

LMI: github.com/deepjavalibrary/djl-serving, serving/docs/lmi/user_guides/vllm_user_guide.md
Artefacts: https://docs.aws.amazon.com/sagemaker/latest/APIReference/API_S3ModelDataSource.html
"""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from act_scales.kept_tokenizer import check_has_encoder
from builders.onnxruntime.record import CPU, provider_of
from builders.readers import device_of, folder_facts, judge
from smoothquant import digests
from smoothquant.artifacts.card import CARD
from smoothquant.artifacts.manifest import Manifest
from smoothquant.errors import UserError
from smoothquant.files import copy, write_text
from smoothquant.outputs import MANIFEST, TOP_MANIFEST, check_content, load_manifest
from smoothquant.workspace import Workspace

STEP = "serve-config sagemaker"
ENGINES, W8A8 = ("build onnxruntime", "export onnx"), "export w8a8"  # steps whose folders are taken
MODEL, REQUEST, PROPERTIES = "model", "create-model.json", "serving.properties"
OURS = "ACCOUNT.dkr.ecr.REGION.amazonaws.com/smoothquant-onnxruntime-serve:latest"
LMI = (
    "763104351884.dkr.ecr.REGION.amazonaws.com/djl-inference:0.36.0-lmi20.0.0-cu128-v1.0"  # February 2026, vLLM 0.15.1
)
NAME = re.compile(r"[a-zA-Z0-9]([-a-zA-Z0-9]*[a-zA-Z0-9])?")  # and at most 63 characters
TO_FILL = re.compile(r"\b(ACCOUNT|REGION|BUCKET|ROLE)\b")
INSTANCES: Mapping[str, str] = {  # family of instances -> its GPU
    "ml.g4dn": "t4",
    "ml.g5": "a10",
    "ml.g6": "l4",
    "ml.g6e": "l40s",
    "ml.p4d": "a100",
    "ml.p5": "h100",
    "ml.p5en": "h200",
    "ml.p6-b200": "b200",
}


@dataclass(frozen=True)
class Deployment:
    """Where the model is to be. name: SageMaker's, and the model's in requests. s3: a prefix, which ends with "/".
    image, role: None for words in capitals that a user fills in."""

    name: str
    s3: str
    image: str | None = None
    role: str | None = None


@dataclass(frozen=True)
class SageMakerHandoff:
    """What was written. instances: families of instances that compute the folder as written; empty for an engine, which
    runs on a processor. commands: by what they do. to_fill: words in capitals that stand for what is not known."""

    instances: tuple[str, ...]
    commands: Mapping[str, str]
    to_fill: tuple[str, ...]


def deployment(folder: str | Path, name: str | None, s3: str | None, image: str | None, role: str | None) -> Deployment:
    """Where a folder's model is to be. Values that are None come from the folder's name.

    Raises UserError for values that SageMaker would refuse.
    """
    usual = re.sub(r"[^a-zA-Z0-9]+", "-", Path(os.path.abspath(folder)).name).strip("-")[:63].strip("-") or "model"
    name = usual if name is None else name
    if not NAME.fullmatch(name) or len(name) > 63:
        raise UserError(f"--name {name}", expected="up to 63 letters, digits and hyphens, no hyphen at an end")
    if s3 is not None and not re.fullmatch(r"s3://[^/\s]+(/\S*)?", s3):
        raise UserError(f"--s3 {s3}", expected="a prefix: s3://BUCKET/MODEL/")
    if image is not None and not re.fullmatch(r"\S{1,255}", image):
        raise UserError(f"--image {image}", expected="the address of an image in a registry")
    if role is not None and not re.fullmatch(r"arn:aws[a-z-]*:iam::\d{12}:role/?[\w+=,.@/-]+", role):
        raise UserError(f"--role {role}", expected="the ARN of a role: arn:aws:iam::123456789012:role/NAME")
    prefix = f"s3://BUCKET/{name}/" if s3 is None else s3 if s3.endswith("/") else f"{s3}/"
    return Deployment(name, prefix, image, role)


def write_sagemaker(
    folder: str | Path,
    out: str | Path,
    where: Deployment,
    *,
    max_length: int | None = None,
    overwrite: bool = False,
) -> SageMakerHandoff:
    """Write the folder `out` for SageMaker. max_length: tokens of a prompt and its answer; None for the model's own.

    Raises UserError for a folder that neither of the two containers serves.
    """
    folder, out = Path(folder), Path(out)
    if max_length is not None and max_length < 1:
        raise UserError(f"--max-length {max_length}", expected="1 or more tokens")
    manifest = load_manifest(folder)
    if manifest.step == W8A8:
        instances, environment, texts = _instances(folder), {}, {PROPERTIES: properties(where.name, max_length)}
        names = [name for name in manifest.files if "/" not in name]
    elif manifest.step in ENGINES:
        _check_engine(folder, manifest)
        words = f"--name {where.name}" + (f" --max-context {max_length}" if max_length else "")
        instances, environment, texts = (), {"SMOOTHQUANT_OPTIONS": words}, {}
        names = [*manifest.files, MANIFEST]
    else:
        raise UserError(
            f"{folder}: made by {manifest.step!r}, which no container for SageMaker serves here",
            expected=f"a folder made by one of: {', '.join((*ENGINES, W8A8))}",
            do="build an ONNX Runtime engine for a processor, or export w8a8 for a GPU",
        )
    check_has_encoder(folder, manifest)
    check_content(folder, manifest)
    names = [name for name in names if name != CARD or (folder / CARD).exists()]
    request = _request(where, OURS if manifest.step in ENGINES else LMI, environment, isolated=not instances)
    texts = {f"{MODEL}/{name}": text for name, text in texts.items()} | {REQUEST: json.dumps(request, indent=2) + "\n"}
    inputs = {"files": {name: digests.sha256(folder / name) for name in names}, "texts": texts}
    with Workspace(out, STEP, inputs, overwrite=overwrite, manifest=TOP_MANIFEST) as work:
        if not work.finished:
            for name in names:
                copy(folder / name, work.path(f"{MODEL}/{name}"))
            for name, text in texts.items():
                write_text(work.path(name), text)
            work.commit()
    commands = {
        "upload": shlex.join(["aws", "s3", "sync", f"{out}/{MODEL}", where.s3]),
        "create": shlex.join(["aws", "sagemaker", "create-model", "--cli-input-json", f"file://{out}/{REQUEST}"]),
    }
    return SageMakerHandoff(instances, commands, tuple(dict.fromkeys(TO_FILL.findall(json.dumps(request)))))


def properties(name: str, max_length: int | None) -> str:
    """The content of serving.properties: vLLM's asynchronous engine, all GPUs of the instance, the folder that it lies
    in. name: of the model in requests, which may leave it out."""
    values = {
        "engine": "Python",
        "option.entryPoint": "djl_python.lmi_vllm.vllm_async_service",
        "option.async_mode": "true",
        "option.rolling_batch": "disable",
        "option.tensor_parallel_degree": "max",
        "option.served_model_name": name,
        **({"option.max_model_len": str(max_length)} if max_length else {}),
    }
    return "".join(f"{key}={value}\n" for key, value in values.items())


def _check_engine(folder: Path, manifest: Manifest) -> None:
    """Raise UserError for an engine that the image cannot run: it has ONNX Runtime for processors alone."""
    if provider_of(manifest) != CPU:
        raise UserError(
            f"{folder}: built for the provider {provider_of(manifest)}",
            expected="an engine for a processor, which is what the image has",
            do="build it with --provider cpu, or export w8a8 for a GPU",
        )


def _instances(folder: Path) -> tuple[str, ...]:
    """The families of instances on which vLLM serves a folder. Raises UserError if there is none."""
    facts = folder_facts(folder)
    found = {family: judge(facts, "vllm", device_of(gpu)) for family, gpu in INSTANCES.items()}
    served = tuple(family for family, statement in found.items() if statement.outcome.serves)
    if not served:
        refusal = next(iter(found.values()))
        raise UserError(f"{folder}: {refusal.what}", expected="a folder that vLLM serves on a GPU", do=refusal.do)
    return served


def _request(where: Deployment, image: str, environment: Mapping[str, str], *, isolated: bool) -> dict[str, Any]:
    """The request CreateModel. isolated: whether the container needs no network."""
    source = {"S3Uri": where.s3, "S3DataType": "S3Prefix", "CompressionType": "None"}
    return {
        "ModelName": where.name,
        "ExecutionRoleArn": where.role or "arn:aws:iam::ACCOUNT:role/ROLE",
        "PrimaryContainer": {
            "Image": where.image or image,
            "ModelDataSource": {"S3DataSource": source},
            "Environment": dict(environment),
        },
        "EnableNetworkIsolation": isolated,
    }
