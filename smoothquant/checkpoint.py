"""Read a Hugging Face checkpoint tensor by tensor, never as a whole.

    config.json
    model.safetensors, or shards with model.safetensors.index.json
    or pytorch_model.bin, or shards with pytorch_model.bin.index.json

Tensors come back in their own memory, in the dtype they have on disk (F16, BF16 or F32). Shards are opened for
one read and closed again, so that mapped pages never add up; `.bin` files are read with `weights_only=True`,
which runs no code from the file.
"""

from __future__ import annotations

import functools
import hashlib
import json
import zipfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from smoothquant import files
from smoothquant.artifacts.safetensors_files import CODES, as_bytes, read_header
from smoothquant.config_keys import KEYS
from smoothquant.digests import Stamp, check_unchanged, combined, remembered
from smoothquant.elsewhere import refuse_other_folder
from smoothquant.errors import CheckpointError, raise_refusal
from smoothquant.files import is_within
from smoothquant.reading import read_object
from smoothquant.sidecars import digest_of_sidecars
from smoothquant.values import NAME, Expectation

DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
# Ends of names of tensors that old releases saved with the weights and that follow from config.json: nobody reads them.
BUFFERS = (".inv_freq", ".cos_cached", ".sin_cached", ".position_ids", ".masked_bias")
WEIGHT_MAP = Expectation(  # of an index
    "an object that names the file of each tensor",
    lambda value: isinstance(value, dict) and bool(value) and all(map(NAME.holds, value.values())),
)
READERS = 2  # threads that take digests of the tensors: each takes about 1.5 GB/s


@dataclass(frozen=True)
class Part:
    """Some rows of a larger tensor on disk. name: the larger tensor's; index: which matrix, if it holds several."""

    name: str
    index: int | None
    rows: slice


@dataclass(frozen=True)
class TensorInfo:
    """File, shape and dtype of a tensor. part: where it lies in a larger tensor, if it is a view into one."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype
    part: Part | None = None


class Checkpoint:
    """A checkpoint folder. `tensors` maps every name to its `TensorInfo`; `config` is config.json as read.

    `config` lacks `quantization_config`: quantized weights are refused, and for float weights it says nothing (`notes`
    tells the user). `smoothquant.int8_checkpoint` reads INT8 weights. Raises CheckpointError, which names the file: the
    folder or config.json is missing or broken, a shard is missing, truncated or unreadable, no shard holds a tensor
    that the index promises, or a dtype is not F16, BF16 or F32. again: read the files for the fingerprint in any case.
    """

    dtypes: ClassVar[Mapping[str, torch.dtype]] = DTYPES  # that its tensors may have

    def __init__(self, folder: str | Path, *, again: bool = False) -> None:
        self.folder, self.again = Path(folder), again
        if not self.folder.is_dir():
            raise CheckpointError(
                f"{self.folder}: no such folder",
                expected="a Hugging Face model folder",
                do="check the path, or download the model first: hf download ORG/MODEL --local-dir DIR",
            )
        refuse_other_folder(self.folder)
        place = self.folder / "config.json"
        self.config: dict = _read_json(place)
        for key in ("model_type", "architectures"):  # by which everybody goes
            KEYS[key].check(self.config.get(key), f"{place}: {key}")
        self._quantization = self.config.pop("quantization_config", None)
        self._bin_shard: tuple[Path, dict[str, Tensor]] | None = None
        self.tensors: dict[str, TensorInfo] = {}
        self._stale = ""
        self._stamps: dict[Path, Stamp] = {}  # of every file of weights, when it was first looked at
        self._index()

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know of this folder, one line each."""
        told = (self._stale,) if self._stale else ()
        if self._quantization is None:
            return told
        return (
            *told,
            f"{self.folder}/config.json: its quantization_config ({self._quantizer}) is dropped, since the weights are "
            "float",
        )

    @property
    def _quantizer(self) -> str:
        """How the weights were quantized, as the config says."""
        found = self._quantization.get("quant_method") if isinstance(self._quantization, dict) else None
        return f"quant_method {found}"

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that hold the weights."""
        return tuple(self._stamps)

    @property
    def dtype(self) -> torch.dtype:
        """The float dtype that most of the checkpoint's elements have."""
        count = dict.fromkeys(DTYPES.values(), 0)
        for info in self.tensors.values():
            if info.dtype in count:
                count[info.dtype] += torch.Size(info.shape).numel()
        return max(count, key=lambda dtype: count[dtype])

    @property
    def weights(self) -> int:
        """Number of elements of all tensors."""
        return sum(torch.Size(info.shape).numel() for info in self.tensors.values())

    @property
    def nbytes(self) -> int:
        """Size of all tensors on disk, in bytes."""
        return sum(torch.Size(info.shape).numel() * info.dtype.itemsize for info in self.tensors.values())

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """A tensor, or some of its rows, in its own memory. Raises CheckpointError if it cannot be read."""
        info = self._info(name)
        check_unchanged(info.file, self._stamps[info.file])
        source = name
        where: tuple[int | slice, ...] = (rows,) if rows else ()
        if info.part:
            source, begin = info.part.name, info.part.rows.start
            start, stop, _ = (rows or slice(None)).indices(info.shape[0])
            where = (slice(begin + start, begin + stop),)
            where = where if info.part.index is None else (info.part.index, *where)
        try:
            if info.file.suffix == ".safetensors":
                with safe_open(info.file, "pt") as shard:
                    return (shard.get_slice(source)[where] if where else shard.get_tensor(source)).clone()
            tensor = self._load_bin(info.file)[source]
            return (tensor[where] if where else tensor).clone()
        except (SafetensorError, OSError, KeyError, RuntimeError) as error:
            raise _broken(info.file, f"cannot read {name} ({error})", error) from error

    def view(self, name: str, parts: Mapping[str, Part]) -> None:
        """Replace a tensor by parts of it. parts: name -> rows, each beginning where the last ended."""
        whole = self.tensors.pop(name)
        for part_name, part in parts.items():
            shape = (part.rows.stop - part.rows.start, whole.shape[-1])
            self.tensors[part_name] = TensorInfo(whole.file, shape, whole.dtype, part)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Identity of what the model computes: SHA-256 over config.json and all tensors, 16 hex digits.

        It does not depend on how the tensors are split into files. Every file is read once, and not again while it
        stays as it is (`smoothquant.digests`). Raises UserError for a file that changes while it is read.
        """
        digests = {"config.json": json.dumps(self.config, sort_keys=True)}
        for file in self._stamps:
            digests |= remembered(file, "tensors", dict, functools.partial(self._digests, file), again=self.again)
        return combined(digests)

    @functools.cached_property
    def sidecars(self) -> str:
        """Identity of the small files that an export copies, config.json among them: SHA-256, 16 hex digits."""
        return digest_of_sidecars(self.folder)

    def _digests(self, file: Path) -> dict[str, str]:
        """Dtype, shape and SHA-256 of the tensors of one file, by name."""
        if file.suffix == ".bin":
            return {
                name: f"{CODES[tensor.dtype]} {list(tensor.shape)} {hashlib.sha256(as_bytes(tensor)).hexdigest()}"
                for name, tensor in self._load_bin(file).items()
            }
        start, header = read_header(file)

        def digest(name: str) -> str:
            begin, end = header[name]["data_offsets"]
            return files.sha256(file, start + begin, start + end)

        with ThreadPoolExecutor(READERS) as pool:
            found = dict(zip(header, pool.map(digest, header), strict=True))
        return {name: f"{header[name]['dtype']} {header[name]['shape']} {sha256}" for name, sha256 in found.items()}

    def _index(self) -> None:
        for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
            index, single = self.folder / f"{stem}.{suffix}.index.json", self.folder / f"{stem}.{suffix}"
            promised: dict = {}
            if single.exists():  # so does transformers choose
                if index.exists():
                    self._stale = f"{index} is passed over, since {single.name} is there"
            elif index.exists():
                promised = _read_json(index).get("weight_map", {})
                WEIGHT_MAP.check(promised, f"{index}: weight_map")
                outside = [name for name in promised.values() if not is_within(name)]
                if outside:
                    raise _broken(index, f"it names the shard {outside[0]!r}, outside of the folder")
            else:
                continue
            for name in sorted(set(promised.values())) or [single.name]:
                self._index_shard(self.folder / name)
            for name, file in promised.items():
                if name not in self.tensors and not name.endswith(BUFFERS):
                    raise _broken(self.folder / file, f"tensor {name} is missing, though {index.name} promises it")
            return
        raise CheckpointError(
            f"{self.folder}: no weights",
            expected="model.safetensors or pytorch_model.bin, single or sharded with an index",
            do="check that the download is complete",
        )

    def _index_shard(self, file: Path) -> None:
        if not file.exists():
            raise _broken(file, "missing shard")
        if not file.is_file():
            raise _broken(file, "no regular file")
        self._stamps[file] = Stamp.of(file)
        if file.suffix == ".bin":
            for name, tensor in self._load_bin(file).items():
                self._add(name, TensorInfo(file, tuple(tensor.shape), tensor.dtype), str(tensor.dtype))
            return
        try:
            with safe_open(file, "pt") as shard:
                for name in shard.keys():  # noqa: SIM118 (safe_open is not a mapping)
                    view = shard.get_slice(name)
                    dtype = view.get_dtype()
                    known = self.dtypes.get(dtype, torch.uint8)
                    self._add(name, TensorInfo(file, tuple(view.get_shape()), known), dtype)
        except (SafetensorError, OSError) as error:
            raise _broken(file, f"truncated or corrupt ({error})", error) from error

    def _add(self, name: str, info: TensorInfo, dtype: str) -> None:
        if name.endswith(BUFFERS):
            return
        if info.dtype not in self.dtypes.values():
            raise self._unknown(info.file, name, dtype)
        self.tensors[name] = info

    def _unknown(self, file: Path, name: str, dtype: str) -> CheckpointError:
        """The error for a tensor of another dtype."""
        if self._quantization is not None:
            return CheckpointError(
                f"{file}: quantized weights ({self._quantizer}; tensor {name} has dtype {dtype})",
                expected="the float model that they were made from: what is rounded already cannot be smoothed",
                do="give the original checkpoint",
            )
        return CheckpointError(
            f"{file}: tensor {name} has dtype {dtype}",
            expected="F16, BF16 or F32: an unquantized checkpoint",
            do="give the original float model",
        )

    def _info(self, name: str) -> TensorInfo:
        return self.tensors[name]

    def _load_bin(self, file: Path) -> dict[str, Tensor]:
        shard = self._bin_shard  # another thread may put its own there meanwhile
        if shard is None or shard[0] != file:
            self._bin_shard = None
            try:
                mappable = zipfile.is_zipfile(file)  # torch < 1.6 wrote other files, which are read whole
                loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=mappable)
            except Exception as error:  # torch raises many kinds of errors here
                raise _broken(file, "it holds more than tensors, or is truncated or corrupt", error) from error
            if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
                raise _broken(file, "is not a dict of tensors")
            shard = self._bin_shard = (file, loaded)
        return shard[1]


def _read_json(path: Path) -> dict:
    return read_object(path, CheckpointError, wanted="a whole, readable file", do="download this file again")


def _broken(file: Path, fault: str, error: Exception | None = None) -> CheckpointError:
    """The error for a file that cannot be read. Raises OSError instead where that is no fault of the file's."""
    if error:
        raise_refusal(error, file)
    return CheckpointError(f"{file}: {fault}", expected="a whole, readable file", do="download this file again")
