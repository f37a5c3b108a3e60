"""What every test shares: JAX on the CPU, split into two simulated devices."""

from __future__ import annotations

import os

# Read when JAX is first imported, so set before any test module is.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2".strip()
