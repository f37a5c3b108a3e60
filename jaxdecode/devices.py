"""Which backend runs here, and why, in words for people."""

from __future__ import annotations

import dataclasses

import jax


@dataclasses.dataclass(frozen=True)
class Backend:
    """`platform` as JAX names it (cpu, gpu, …); `reason` is one sentence."""

    platform: str
    reason: str


def describe_backend() -> Backend:
    """The backend JAX chose and why."""
    device = jax.devices()[0]
    if device.platform == "cpu":
        forced = jax.config.jax_platforms
        why = f"JAX_PLATFORMS={forced} asks for it" if forced else "JAX found no GPU"
        return Backend("cpu", f"Running on the CPU: {why}.")
    return Backend(device.platform, f"Running on {device.device_kind}.")
