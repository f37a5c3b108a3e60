"""The graphics cards we know: what their kernels may use, and how fast their memory is.

The only place that asks JAX what this device is (`this_device`). Compute capabilities and limits per multiprocessor are
those of the CUDA C++ Programming Guide's table of technical specifications; multiprocessors, bandwidth, cache and clock
are those of NVIDIA's data sheets and architecture white papers. `memory_bytes` is what the driver leaves to a program
where that is known (A100 80 GB, H100 SXM, H200), else the data sheet's size rounded down.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import tomllib
from pathlib import Path
from typing import Any

_NVIDIA = ("gpu", "cuda")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """One card.

    Attributes:
      name: JAX's `device_kind`.
      compute_capability: (major, minor).
      num_sms: streaming multiprocessors.
      bandwidth: of the device memory, GB/s (1e9 bytes).
      memory_bytes: device memory.
      l2_bytes: level-2 cache.
      shared_per_sm: bytes of shared memory per multiprocessor.
      shared_per_block: the most that one block may ask for, dynamic shared memory included.
      threads_per_sm: resident threads per multiprocessor.
      fpus_per_sm: float32 units per multiprocessor.
      clock: boost clock, GHz.
      tensor_tflops: dense float16 or bfloat16 products summed up in float32, 1e12 operations a second.
    """

    name: str
    compute_capability: tuple[int, int]
    num_sms: int
    bandwidth: int
    memory_bytes: int
    l2_bytes: int
    shared_per_sm: int
    shared_per_block: int
    threads_per_sm: int
    fpus_per_sm: int
    clock: float
    tensor_tflops: int

    @property
    def arch(self) -> str:
        """What ptxas calls it: "sm_80"."""
        major, minor = self.compute_capability
        return f"sm_{major}{minor}"


def _card(
    name: str, limits: dict, num_sms: int, bandwidth: int, memory: int, l2_mib: int, clock: float, tflops: int
) -> Target:
    return Target(
        name=name,
        num_sms=num_sms,
        bandwidth=bandwidth,
        memory_bytes=memory,
        l2_bytes=l2_mib << 20,
        clock=clock,
        tensor_tflops=tflops,
        **limits,
    )


def _limits(capability: tuple[int, int], shared_kib: int, threads: int, fpus: int) -> dict:
    # the system keeps 1 KiB of shared memory for every block
    return {
        "compute_capability": capability,
        "shared_per_sm": shared_kib << 10,
        "shared_per_block": (shared_kib - 1) << 10,
        "threads_per_sm": threads,
        "fpus_per_sm": fpus,
    }


_A100 = _limits((8, 0), 164, 2048, 64)
_AMPERE = _limits((8, 6), 100, 1536, 128)
_ADA = _limits((8, 9), 100, 1536, 128)
_HOPPER = _limits((9, 0), 228, 2048, 128)
_BLACKWELL = _limits((10, 0), 228, 2048, 128)

TARGETS: dict[str, Target] = {
    "a100-80gb": _card("NVIDIA A100-SXM4-80GB", _A100, 108, 2039, 85_100_068_864, 40, 1.41, 312),
    "a100-40gb": _card("NVIDIA A100-SXM4-40GB", _A100, 108, 1555, 42_300_000_000, 40, 1.41, 312),
    "a100-80gb-pcie": _card("NVIDIA A100 80GB PCIe", _A100, 108, 1935, 85_100_068_864, 40, 1.41, 312),
    "rtx3090": _card("NVIDIA GeForce RTX 3090", _AMPERE, 82, 936, 25_300_000_000, 6, 1.695, 71),
    "a10": _card("NVIDIA A10", _AMPERE, 72, 600, 23_600_000_000, 6, 1.695, 125),
    "rtx4090": _card("NVIDIA GeForce RTX 4090", _ADA, 128, 1008, 25_300_000_000, 72, 2.52, 165),
    "l4": _card("NVIDIA L4", _ADA, 58, 300, 23_600_000_000, 48, 2.04, 121),
    "l40s": _card("NVIDIA L40S", _ADA, 142, 864, 47_600_000_000, 96, 2.52, 362),
    "h100": _card("NVIDIA H100 80GB HBM3", _HOPPER, 132, 3352, 84_942_979_072, 50, 1.98, 989),
    "h100-pcie": _card("NVIDIA H100 PCIe", _HOPPER, 114, 2039, 84_900_000_000, 50, 1.755, 756),
    "h200": _card("NVIDIA H200", _HOPPER, 132, 4800, 150_000_000_000, 50, 1.98, 989),
    "b200": _card("NVIDIA B200", _BLACKWELL, 148, 8000, 180_000_000_000, 126, 1.965, 2250),
}


INTERPRETED = TARGETS["h100"]  # the card whose form of the kernels the interpreter runs


def find_target(name: str) -> Target:
    """The card of a short name such as "a100-80gb" or "RTX 3090", or of a file: see `read_target`.

    Raises:
      ValueError: there is no such card; the message names the nearest and lists all.
    """
    if name.endswith(".toml"):
        return read_target(Path(name))
    wanted, plain = _letters(name), {_letters(key): key for key in TARGETS}
    if wanted in plain:
        return TARGETS[plain[wanted]]
    longer = [key for letters, key in plain.items() if letters.startswith(wanted)]
    near = longer or difflib.get_close_matches(name.lower(), TARGETS, n=1, cutoff=0.3)
    hint = f" (did you mean {' or '.join(near)}?)" if near else ""
    raise ValueError(f"no card {name!r}{hint}; there are {', '.join(TARGETS)}, and files that end in .toml")


def _letters(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def read_target(file: Path) -> Target:
    """A card of your own, from a TOML file with the fields of `Target`; those left out are the ones of the card `like`.

        like = "a100-80gb"
        name = "A100 at 1,200 GB/s"
        bandwidth = 1200

    Raises:
      ValueError: the file cannot be read, or a field is missing, unknown or of another type; all of them are named.
    """
    try:
        given = tomllib.loads(file.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"cannot read a card from {file}: {error}") from error
    like = given.pop("like", None)
    if not isinstance(like, str | None):
        raise ValueError(f"{file} is not a card: like must be the name of a known card; it is {like!r}")
    fields = {field.name: str(field.type) for field in dataclasses.fields(Target)}
    values = dataclasses.asdict(find_target(like)) if like else {}
    values |= given
    problems = [f"{name} is unknown" for name in values.keys() - fields.keys()]
    problems += [f"{name} is missing" for name in fields if name not in values]
    problems += [
        f"{name} must be {_EXPECTED[kind]}; it is {values[name]!r}"
        for name, kind in fields.items()
        if name in values and not _fits(kind, values[name])
    ]
    if problems:
        raise ValueError(f"{file} is not a card: {'; '.join(problems)}")
    exact = {"compute_capability": tuple(values["compute_capability"]), "clock": float(values["clock"])}
    return Target(**values | exact)


_EXPECTED = {
    "str": "a name",
    "int": "a positive integer",
    "float": "a positive number",
    "tuple[int, int]": "two integers from [8, 0] on",
}


def _fits(kind: str, value: Any) -> bool:
    if kind == "str":
        return isinstance(value, str) and bool(re.fullmatch(r"[\w .,()/+-]+", value))
    if kind == "tuple[int, int]":
        two = isinstance(value, list | tuple) and len(value) == 2 and all(type(part) is int for part in value)
        return two and tuple(value) >= (8, 0)
    return type(value) in ((int,) if kind == "int" else (int, float)) and 0 < value < math.inf


def why_none() -> str:
    """Why `this_device` knows none."""
    device = _device()
    if device.platform not in _NVIDIA:
        return "there is no NVIDIA GPU here"
    capability = getattr(device, "compute_capability", "unknown")
    return f"no limits are known for {device.device_kind}, compute capability {capability}"


def this_device() -> Target | None:
    """The card that JAX runs on; None if it is not an NVIDIA card, or none of a capability we know.

    It is asked when a program is traced: on a machine with a GPU, `jax.default_device` of a CPU makes a program for
    that, and under the description of a card that is not here (`jaxdecode.aot`) it is that card. A card that is not in
    the table is taken for the one of its compute capability with the nearest number of multiprocessors: the limits are
    then right, bandwidth and memory are not.
    """
    device = _device()
    capability = getattr(device, "compute_capability", None)
    if device.platform not in _NVIDIA or not isinstance(capability, str) or "." not in capability:
        return None
    for target in TARGETS.values():
        if target.name == device.device_kind:
            return target
    major, _, minor = capability.partition(".")
    alike = [target for target in TARGETS.values() if target.compute_capability == (int(major), int(minor))]
    return min(alike, key=lambda target: abs(target.num_sms - device.core_count), default=None)


def _device() -> Any:
    import jax

    device = jax.config.jax_default_device or jax.devices()[0]
    return jax.devices(device)[0] if isinstance(device, str) else device
