"""`jaxdecode env`: what is installed, which devices are here, what will run."""

from __future__ import annotations

import json
import os
import platform
from importlib import metadata
from typing import Annotated

import typer

_PACKAGES = ("jax", "jaxlib", "flax", "orbax-checkpoint", "transformers", "safetensors", "numpy")
_SIZES = {"n": 4096, "k": 4096}  # of the products that stand for all


def env(as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False) -> None:
    """Print versions, devices, cache folders and which backend will run."""
    facts = _facts()
    if as_json:
        typer.echo(json.dumps(facts))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in facts.items():
        table.add_row(name, Text(", ".join(value) if isinstance(value, list) else str(value)))
    Console(highlight=False, soft_wrap=True).print(table)


def _facts() -> dict[str, str | list[str]]:
    import jax

    import jaxdecode
    from jaxdecode.compilation import VARIABLE, enable_cache
    from jaxdecode.devices import describe_backend
    from pallas_kernels.dataflow import choose_attention, choose_implementation
    from pallas_kernels.targets import this_device

    backend = describe_backend()
    folder = enable_cache()
    where = {"dtype": "bfloat16", "device": this_device()}
    choices = {f"linear, {m=}": choose_implementation("linear", m=m, **_SIZES, **where) for m in (1, 8, 512)}
    for op in ("decode_attention", "prefill_attention"):
        choices[op] = choose_attention(op, head_dim=128, q_per_kv=1, max_len=4096, **where)
    return {
        "python": f"{platform.python_version()} on {platform.platform()}",
        "jaxdecode": jaxdecode.__version__,
        **{name: _version(name) for name in _PACKAGES},
        "devices": [f"{device.device_kind} ({device.platform}:{device.id})" for device in jax.devices()],
        "processors": str(os.cpu_count()),
        "compiled programs": f"{folder or 'not kept'} (move or switch off: {VARIABLE})",
        "backend": backend.reason,
        **{op: ": ".join(choice) for op, choice in choices.items()},
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
