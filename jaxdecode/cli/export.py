"""`jaxdecode export`: a checkpoint of ours to a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from jaxdecode.cli.progress import transfer


def export(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint folder that `jaxdecode convert` wrote.")],
    outdir: Annotated[Path, typer.Argument(help="The Hugging Face folder to make; it must not exist.")],
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; by default as stored.")] = None,
) -> None:
    """Write config.json, safetensors and tokenizer, which transformers loads."""
    from rich.console import Console

    from convert.export import export as run

    console = Console(highlight=False)
    with transfer(console, "exporting") as advance:
        run(checkpoint, outdir, dtype=dtype, progress=advance)
    console.print(f"Wrote {outdir}", markup=False, soft_wrap=True)
