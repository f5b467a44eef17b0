"""GPUs by name, as records know them: for whoever decides for one that is not here."""

from __future__ import annotations

from attngen.analysis import GPUS, Gpu
from attngen.errors import InputError
from attngen.store import Device

# How the GPUs of `GPUS` call themselves: a modelled record must be found on the real one. Driver unknown.
IDENTITIES = {
    "H200": Device("NVIDIA H200", 132, 140),
    "H100": Device("NVIDIA H100 80GB HBM3", 132, 79),
    "A100": Device("NVIDIA A100-SXM4-80GB", 108, 79),
    "B200": Device("NVIDIA B200", 148, 178),
    "MI300X": Device("AMD Instinct MI300X", 304, 192),
}


def find_gpu(target: str) -> Gpu | None:
    """A GPU by its name ("H100"), the name it gives itself, or its architecture ("sm_90"); None for one that is not known."""
    wanted = target.strip().lower()
    own = (gpu for gpu in GPUS.values() if wanted in (gpu.name.lower(), IDENTITIES[gpu.name].name.lower(), gpu.target))
    return next(own, None)


def gpu_named(target: str) -> Gpu:
    """The same. InputError for one that is not known."""
    found = find_gpu(target)
    if found is None:
        names = ", ".join([*GPUS, *dict.fromkeys(gpu.target for gpu in GPUS.values())])
        raise InputError("target", f"one of {names}", repr(target), "or measure on the device itself, without target=")
    return found
