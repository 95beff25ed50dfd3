"""The act scales published with SmoothQuant, fetched from the Hugging Face Hub.

    mit-han-lab/smoothquant-scales    a model repository, MIT licence
    <file>.pt                         dict of HF module name -> max |input| (in,) float32, of every nn.Linear (lm_head
                                      and routers too), over 512 samples of the Pile's validation split

The catalogue lists what the repository held at its last known commit, 5a18a87 of February 2024. huggingface_hub
downloads the files into its own cache, and reads HF_HUB_OFFLINE, HF_ENDPOINT, HF_HOME and the user's token. Without a
network, only a file that the cache lacks is an error.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

from act_scales.store import DISK_FULL, FORMAT_VERSION, ActScales, load_act_scales
from smoothquant.errors import UserError
from smoothquant.packages import require

REPOSITORY = "mit-han-lab/smoothquant-scales"
TIMEOUT = 10.0  # seconds for the Hub's first answer


class HubError(UserError):
    """The Hub cannot be reached, or it no longer holds the file."""

    exit_code = 4


@dataclass(frozen=True)
class Published:
    """The published scales of one model. model: the model's name on the Hub, or None if the Hub lacks its weights."""

    name: str
    family: str
    file: str
    model: str | None


CATALOGUE = (
    Published("llama-2-7b", "llama", "llama-2-7b.pt", "meta-llama/Llama-2-7b-hf"),
    Published("llama-2-13b", "llama", "llama-2-13b.pt", "meta-llama/Llama-2-13b-hf"),
    Published("llama-2-70b", "llama", "llama-2-70b.pt", "meta-llama/Llama-2-70b-hf"),
    Published("mistral-7b", "mistral", "Mistral-7B-v0.1.pt", "mistralai/Mistral-7B-v0.1"),
    Published("mixtral-8x7b", "mixtral", "Mixtral-8x7B-v0.1.pt", "mistralai/Mixtral-8x7B-v0.1"),
    Published("falcon-7b", "falcon", "falcon-7b.pt", "tiiuae/falcon-7b"),
    Published("falcon-40b", "falcon", "falcon-40b.pt", "tiiuae/falcon-40b"),
    Published("opt-1.3b", "opt", "opt-1.3b.pt", "facebook/opt-1.3b"),
    Published("opt-2.7b", "opt", "opt-2.7b.pt", "facebook/opt-2.7b"),
    Published("opt-6.7b", "opt", "opt-6.7b.pt", "facebook/opt-6.7b"),
    Published("opt-13b", "opt", "opt-13b.pt", "facebook/opt-13b"),
    Published("opt-30b", "opt", "opt-30b.pt", "facebook/opt-30b"),
    Published("opt-66b", "opt", "opt-66b.pt", "facebook/opt-66b"),
    Published("opt-175b", "opt", "opt-175b.pt", None),
    Published("bloom-176b", "bloom", "bloom-176b.pt", "bigscience/bloom"),
)


def find(name: str) -> Published:
    """The published scales with this name, file or model. Raises UserError, which lists the names."""
    for published in CATALOGUE:
        if name in (published.name, published.file, published.model):
            return published
    raise UserError(
        f"no published act scales {name!r}",
        expected=f"one of {', '.join(published.name for published in CATALOGUE)}",
        do="measure those of another model with smoothquant calibrate",
    )


def files_on_hub() -> list[str]:
    """The .pt files that the repository holds now. Raises HubError in offline mode, or after one request that fails."""
    hub = _hub()
    if hub.constants.HF_HUB_OFFLINE:
        raise HubError("HF_HUB_OFFLINE is set", do="unset it")
    try:
        siblings = hub.HfApi().model_info(REPOSITORY, timeout=TIMEOUT).siblings or []
    except Exception as error:  # httpx, requests and the hub raise many kinds here: network, name, token, status
        where = f"{REPOSITORY} at {hub.constants.ENDPOINT}"
        raise HubError(f"{where} cannot be reached ({_first_line(error)})", do="check the network") from error
    return sorted(sibling.rfilename for sibling in siblings if sibling.rfilename.endswith(".pt"))


def pull(published: Published) -> ActScales:
    """The published scales, downloaded or from the cache. Their metadata names the source.

    Raises HubError; ActScalesError if the file holds something else; OSError if the cache cannot be written.
    """
    path = fetch(published)
    told = {
        "format_version": FORMAT_VERSION,
        "source": REPOSITORY,
        "source_file": published.file,
        "source_commit": path.parent.name,  # .../snapshots/<commit>/<file>
        "text_source": "the Pile, validation split",
        "samples": "512",
    }
    return replace(load_act_scales(path), metadata=told)


def fetch(published: Published) -> Path:
    """The published file in Hugging Face's cache, downloaded if need be. Raises HubError, OSError.

    One request asks the Hub for its list first, since a download by huggingface_hub would retry for half a minute.
    """
    hub = _hub()
    try:
        if published.file not in files_on_hub():
            raise HubError(f"{REPOSITORY} no longer holds it", do="see smoothquant scales list")
    except HubError as error:
        cached = hub.try_to_load_from_cache(REPOSITORY, published.file)
        if isinstance(cached, str):
            return Path(cached)
        raise HubError(
            f"{published.file}: not in the cache, and {error.what}",
            expected="the file in the cache or on the Hub",
            do=f"{error.do}, or copy the file to this machine and run smoothquant scales import",
        ) from error
    try:
        return Path(hub.hf_hub_download(REPOSITORY, published.file))
    except Exception as error:
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            raise OSError(error.errno, error.strerror, str(hub.constants.HF_HUB_CACHE)) from error
        if isinstance(error, OSError) and error.filename:  # the cache itself, not the network
            raise
        raise HubError(
            f"{published.file}: the download from {REPOSITORY} failed ({_first_line(error)})",
            do="check the network and run the same command again",
        ) from error


def _hub() -> ModuleType:
    hub = require("huggingface_hub", "published act scales are fetched with huggingface_hub")
    require("huggingface_hub.utils").logging.set_verbosity_error()  # it would report every retry; our error is one line
    return hub


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
