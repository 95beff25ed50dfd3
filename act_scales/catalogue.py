"""The act scales published with SmoothQuant, fetched from the Hugging Face Hub.

    mit-han-lab/smoothquant-scales    a model repository, MIT licence
    <file>.pt                         dict of HF module name -> max |input| (in,) float32, of every nn.Linear (lm_head
                                      and routers too), over 512 samples of the Pile's validation split

The catalogue lists what the repository held at its last known commit, 5a18a87 of February 2024. Files are downloaded
into Hugging Face's own cache; HF_HUB_OFFLINE, HF_ENDPOINT, HF_HOME and tokens are huggingface_hub's. No network is an
error only for a file that is not in that cache.
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
    """The Hub cannot be asked, or does not have the file any more."""

    exit_code = 4


@dataclass(frozen=True)
class Published:
    """Published scales of one model. model: its name on the Hub, None where its weights are not there."""

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
    """Published scales by their name, their file, or their model's name on the Hub. UserError lists the names."""
    for published in CATALOGUE:
        if name in (published.name, published.file, published.model):
            return published
    raise UserError(
        f"no published act scales {name!r}",
        expected=f"one of {', '.join(published.name for published in CATALOGUE)}",
        do="for another model: smoothquant calibrate",
    )


def files_on_hub() -> list[str]:
    """The .pt files that the repository holds now. Raises HubError, after one request: no network, or offline mode."""
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
    """Download published scales, or take them from the cache, and say in the metadata where they come from.

    Raises HubError, ActScalesError for a file that holds something else, OSError for a cache that cannot be written.
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

    The Hub is asked by one request first: huggingface_hub's own download would try again for half a minute.
    """
    hub = _hub()
    try:
        if published.file not in files_on_hub():
            raise HubError(f"{REPOSITORY} does not hold it any more", do="see smoothquant scales list")
    except HubError as error:
        cached = hub.try_to_load_from_cache(REPOSITORY, published.file)
        if isinstance(cached, str):
            return Path(cached)
        raise HubError(
            f"{published.file}: not in the cache, and {error.what}",
            expected="the one or the other",
            do=f"{error.do}, or bring the file here and use smoothquant scales import",
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
    require("huggingface_hub.utils").logging.set_verbosity_error()  # what it would say of retries, we say in one line
    return hub


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
