"""Write a Triton repository for a TensorRT-LLM engine, and say how to start Triton or trtllm-serve.

    ensemble/config.pbtxt  preprocessing/{config.pbtxt,1/model.py}  tensorrt_llm/config.pbtxt
    postprocessing/{config.pbtxt,1/model.py}  llm_api_options.yaml  manifest.json

`tritonserver` reads the repository; `trtllm-serve`, with OpenAI's protocol and streaming, reads the engine itself. The
container must have the version of TensorRT-LLM that built the engine.
"""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from builders.serving import pbtxt
from builders.serving.pbtxt import Message
from builders.serving.tensorrt_llm import models
from builders.serving.tensorrt_llm.models import Serving
from builders.tensorrt_llm.format.releases import IMAGE, serve_backend, triton_image
from builders.tensorrt_llm.format.rules import RANKS
from exporters.trtllm.versions import FIRST, LAST, builds_engines
from smoothquant.errors import UserError
from smoothquant.files import write_text
from smoothquant.outputs import TOP_MANIFEST, check_content, is_output, load_manifest
from smoothquant.reading import read_json
from smoothquant.values import OBJECT, whole
from smoothquant.workspace import Workspace

STEP = "serve-config"
API_OPTIONS = "llm_api_options.yaml"
LAUNCHER = "/app/scripts/launch_triton_server.py"  # its path in Triton's trtllm containers
MODELS: dict[str, tuple[Callable[[Serving], Message], str | None]] = {  # folder -> its config.pbtxt, and its model.py
    "ensemble": (models.ensemble, None),
    "preprocessing": (models.preprocessing, "preprocessing.py"),
    "tensorrt_llm": (models.tensorrt_llm, None),
    "postprocessing": (models.postprocessing, "postprocessing.py"),
}
MOST = 2**31 - 1  # tokens of a sequence
AGAIN = "build it again"


@dataclass(frozen=True)
class BuiltEngine:
    """The facts about an engine from TensorRT-LLM's own config.json.

    version: the version of TensorRT-LLM. tp, pp: tensor and pipeline parallelism. batch: the sequences in one step.
    paged_context: whether prompts may be computed with the paged cache. window: the newest tokens that a token attends
    to; None if that is the whole of the longest sequence.
    """

    version: str
    tp: int
    pp: int
    batch: int
    paged_context: bool
    window: int | None = None

    @property
    def ranks(self) -> int:
        return self.tp * self.pp


@dataclass(frozen=True)
class Handoff:
    """The commands that start a server. triton: None if NVIDIA lists no Triton container with this TensorRT-LLM."""

    engine: BuiltEngine
    triton: str | None
    trtllm_serve: str


def read_engine(folder: Path, window: int | None = None) -> BuiltEngine:
    """The facts about an engine. window: the model's sliding window; by default the one in the engine's manifest.

    Raises UserError for another folder, or a version that is not served.
    """
    content = read_json(folder / "config.json")
    model, build = content.get("pretrained_config"), content.get("build_config")
    if not (isinstance(model, dict) and isinstance(build, dict)):
        raise UserError(
            f"{folder}: not a TensorRT-LLM engine (its config.json has no pretrained_config and build_config)",
            expected="a folder made by smoothquant build tensorrt-llm",
            do="check the path, or build the engine",
        )
    version = str(content.get("version"))
    if not builds_engines(version):
        known = f"{FIRST} to {LAST}"
        raise UserError(f"{folder}: built by TensorRT-LLM {version}", expected=known, do=AGAIN)
    mapping, plugins = model.get("mapping") or {}, build.get("plugin_config") or {}
    batch, longest = build.get("max_batch_size") or 1, build.get("max_seq_len") or MOST
    OBJECT.check(mapping, f"{folder}/config.json: pretrained_config.mapping", AGAIN)
    OBJECT.check(plugins, f"{folder}/config.json: build_config.plugin_config", AGAIN)
    tp, pp = mapping.get("tp_size", 1), mapping.get("pp_size", 1)
    RANKS.check(tp, f"{folder}/config.json: tp_size", AGAIN)
    RANKS.check(pp, f"{folder}/config.json: pp_size", AGAIN)
    whole(1, 2**20).check(batch, f"{folder}/config.json: max_batch_size", AGAIN)
    whole(1, MOST).check(longest, f"{folder}/config.json: max_seq_len", AGAIN)
    if window is None and is_output(folder):
        geometry = load_manifest(folder).geometry
        window = geometry.cache_window if geometry else None
    paged_context = bool(plugins.get("use_paged_context_fmha"))
    return BuiltEngine(version, tp, pp, batch, paged_context, window if window and window < longest else None)


def write_repository(
    engine_folder: str | Path,
    out: str | Path,
    *,
    tokenizer: str | Path | None = None,
    engine_at: str | None = None,
    repository_at: str | None = None,
    memory: float = 0.9,
    instances: int = 1,
    window: int | None = None,
    overwrite: bool = False,
) -> Handoff:
    """Write a model repository for Triton. Returns the commands that start a server.

    tokenizer: the folder with the tokenizer, if the engine's has none. engine_at, repository_at: the paths of the two
    folders on the server, if they differ from here. memory: the share of the free GPU memory for the KV cache.
    instances: the number of instances of preprocessing and of postprocessing. window: the model's sliding window, for
    an engine whose manifest does not say.
    Raises UserError if the folder is not an engine or has no tokenizer.
    """
    folder, out = Path(engine_folder).absolute(), Path(out).absolute()
    if is_output(folder):
        check_content(folder, load_manifest(folder))
    if window is not None and window < 1:
        raise UserError(f"--window {window}", expected="a number of tokens")
    engine = read_engine(folder, window)
    if not 0 < memory < 1 or instances < 1:
        raise UserError(f"--memory {memory:g}, --instances {instances}", expected="a share in (0, 1), and at least 1")
    words = folder if tokenizer is None else Path(tokenizer).absolute()
    if not any((words / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise UserError(f"{words}: no tokenizer", expected="tokenizer.json", do="give --tokenizer, the model's folder")
    there = engine_at or str(folder)
    serving = Serving(
        engine=there,
        tokenizer=there if words == folder else str(words),
        batch=engine.batch,
        paged_context=engine.paged_context,
        memory=memory,
        instances=instances,
        window=engine.window,
    )
    texts = _texts(serving)
    inputs = {
        "files": {name: hashlib.sha256(text.encode()).hexdigest()[:16] for name, text in texts.items()},
        "version": engine.version,
    }
    with Workspace(out, STEP, inputs, overwrite=overwrite, manifest=TOP_MANIFEST) as work:
        if not work.finished:
            for name, text in texts.items():
                write_text(work.path(name), text)
            work.commit()
    return _handoff(engine, serving, repository_at or str(out), {folder, words, out})


def _texts(serving: Serving) -> dict[str, str]:
    """The content of each file of the repository, by name."""
    found = {API_OPTIONS: _api_options(serving)}
    for name, (message, program) in MODELS.items():
        found[f"{name}/config.pbtxt"] = pbtxt.dumps(message(serving))
        if program:
            source = resources.files("builders.serving.tensorrt_llm").joinpath(program)
            found[f"{name}/1/model.py"] = source.read_text(encoding="utf-8")
        else:
            found[f"{name}/1/.keep"] = ""  # Triton demands the folder, even for a model without files
    return found


def _api_options(serving: Serving) -> str:
    """The options of trtllm-serve, as YAML. Its other options for the cache give way to kv_cache_config."""
    lines, cache = [], {}
    if serving.window is not None:
        lines.append(f"# A sliding window: every token attends to the newest {serving.window}.")
        cache["max_attention_window"] = f"[{serving.window}]"
    if not serving.reuses:
        lines.append("# Prompts are not computed out of the cache, so they are neither reused nor cut.")
        cache["enable_block_reuse"] = "false"
    if cache:
        cache = {"free_gpu_memory_fraction": f"{serving.memory:g}", **cache}
        lines += ["kv_cache_config:", *(f"  {name}: {value}" for name, value in cache.items())]
    lines.append(f"enable_chunked_prefill: {str(serving.reuses).lower()}")
    return "\n".join(lines) + "\n"


def _handoff(engine: BuiltEngine, serving: Serving, repository: str, folders: set[Path]) -> Handoff:
    image = triton_image(engine.version)
    volumes = shlex.join(word for path in sorted(folders) for word in ("-v", f"{path}:{path}"))
    container = f"docker run --rm --gpus all --net host --shm-size 2g {volumes}"
    launch = shlex.join(["python3", LAUNCHER, f"--world_size={engine.ranks}", f"--model_repo={repository}"])
    serve = ["trtllm-serve", serving.engine, "--tokenizer", serving.tokenizer, *serve_backend(engine.version)]
    serve += ["--tp_size", str(engine.tp), "--pp_size", str(engine.pp)] if engine.ranks > 1 else []
    serve += ["--extra_llm_api_options", f"{repository}/{API_OPTIONS}"]
    serve += ["--kv_cache_free_gpu_memory_fraction", f"{serving.memory:g}"]
    serve += ["--host", "0.0.0.0", "--port", "8000"]
    return Handoff(
        engine,
        f"{container} {image} {launch}" if image else None,
        f"{container} {IMAGE}:{engine.version} {shlex.join(serve)}",
    )


def request_example(text: str = "Once upon a time") -> str:
    """A command that sends a request to Triton's generate endpoint."""
    body = json.dumps({"text_input": text, "max_tokens": 64, "temperature": 0.7, "top_p": 0.9})
    return f"curl localhost:8000/v2/models/ensemble/generate -d {shlex.quote(body)}"
