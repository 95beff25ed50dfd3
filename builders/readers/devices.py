"""What a reader runs on: NVIDIA GPUs by their compute capability, and processors with and without AMX."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from smoothquant.errors import UserError
from smoothquant.machine import cpu_flags

AMX = "cpu-amx"
CPU = "cpu"

GPUS: Mapping[str, int] = {  # ten times the compute capability; https://developer.nvidia.com/cuda-gpus
    "v100": 70,
    "t4": 75,
    "a100": 80,
    "a30": 80,
    "a10": 86,
    "a40": 86,
    "a6000": 86,
    "rtx3090": 86,
    "orin": 87,
    "l4": 89,
    "l40": 89,
    "l40s": 89,
    "rtx4090": 89,
    "rtx6000-ada": 89,
    "h100": 90,
    "h200": 90,
    "gh200": 90,
    "b200": 100,
    "gb200": 100,
    "b300": 103,
    "gb300": 103,
    "thor": 110,
    "rtx5090": 120,
    "rtx-pro-6000": 120,
    "gb10": 121,
}
SHOWN = ("t4", "a100", "l4", "h100", "b200", "rtx5090", CPU, AMX)  # where nobody says which


@dataclass(frozen=True)
class Device:
    """A device. capability: ten times a GPU's compute capability; None for a processor. amx: whether a processor has
    AMX's INT8 tiles."""

    name: str
    capability: int | None = None
    amx: bool = False


@dataclass(frozen=True)
class Hardware:
    """The devices that a statement holds for.

    gpus: the smallest and the largest compute capability, times ten; None for no GPU. cpu, amx: whether it holds for
    processors without AMX, and for those with it.
    """

    gpus: tuple[int, int] | None = None
    cpu: bool = False
    amx: bool = False

    def holds(self, device: Device) -> bool:
        """Whether a device is one of them."""
        if device.capability is None:
            return self.amx if device.amx else self.cpu
        return self.gpus is not None and self.gpus[0] <= device.capability <= self.gpus[1]

    def __str__(self) -> str:
        names = {(True, True): "CPU", (True, False): "CPU without AMX", (False, True): "CPU with AMX"}
        found = [names[self.cpu, self.amx]] if self.cpu or self.amx else []
        if self.gpus:
            first, last = (f"{number // 10}.{number % 10}" for number in self.gpus)
            if self.gpus[1] >= LAST:
                found.insert(0, "any GPU" if self.gpus[0] == 0 else f"GPUs of {first} and later")
            else:
                found.insert(0, f"GPUs up to {last}" if self.gpus[0] == 0 else f"GPUs of {first} to {last}")
        return ", ".join(found)


LAST = 999
ANY = Hardware((0, LAST), cpu=True, amx=True)
ANY_GPU = Hardware((0, LAST))
ANY_CPU = Hardware(cpu=True, amx=True)
NO_AMX = Hardware(cpu=True)
WITH_AMX = Hardware(amx=True)


def gpus(first: int, last: int = LAST) -> Hardware:
    """The GPUs of a range of compute capabilities, both ends included, each times ten."""
    return Hardware((first, last))


def device_of(name: str) -> Device:
    """The device of this name: one of `GPUS`, a compute capability such as "8.6", "cpu" or "cpu-amx".

    Raises UserError for another name.
    """
    plain = name.lower().replace(" ", "-")
    if plain in (CPU, AMX):
        return Device(plain, amx=plain == AMX)
    if plain in GPUS:
        return Device(plain, GPUS[plain])
    if re.fullmatch(r"\d{1,2}\.\d", plain):
        return Device(f"compute capability {plain}", int(plain.replace(".", "")))
    raise UserError(
        f"--gpu {name}", expected=f"one of {', '.join(GPUS)}, a compute capability such as 8.6, {CPU} or {AMX}"
    )


def this_cpu() -> Device:
    """The processor of this machine."""
    return device_of(AMX if "amx_int8" in cpu_flags() else CPU)
