"""`jaxdecode convert`: a Hugging Face checkpoint or a GGUF file to a checkpoint of ours."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jaxdecode.cli.progress import transfer
from jaxdecode.cli.verify import find_reference, write_certificate

if TYPE_CHECKING:
    from rich.console import Console

    from convert import Conversion


def convert(
    src: Annotated[str, typer.Argument(help="Hugging Face model folder, GGUF file, or hub name (owner/model).")],
    dst: Annotated[Path, typer.Argument(help="The checkpoint folder to make; it must not exist.")],
    dtype: Annotated[
        str | None,
        typer.Option(help="float32, bfloat16 or float16; by default the source's (float32 if quantised)."),
    ] = None,
    extend_positions: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="For measuring speed only: N learned positions (OPT), the trained ones again and again.",
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and print the plan, write nothing.")] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Then compare with transformers, as `jaxdecode verify` does.")
    ] = False,
) -> None:
    """Convert a model; the folder appears whole or not at all; an interrupted run continues when repeated."""
    import jax
    from rich.console import Console

    jax.config.update("jax_platforms", "cpu")  # only shapes are needed: leave an accelerator's memory alone
    from convert import convert as run

    console = Console(highlight=False)
    if verify and not dry_run:
        find_reference("--verify: ")  # before converting
    with transfer(console, "converting") as advance:
        done = run(
            src,
            dst,
            dtype=dtype,
            extend_positions=extend_positions,
            dry_run=dry_run,
            planned=lambda plan: _print_plan(console, plan),
            progress=advance,
        )
    if dry_run:
        return
    if done.restarted:
        console.print("An unfinished conversion of something else was in the way; it was thrown away.")
    if done.continued_items:
        console.print(f"Continued an interrupted run: {done.continued_items} weight files were there already.")
    console.print(f"Wrote {dst}", markup=False, soft_wrap=True)
    if verify:
        write_certificate(console, dst, src, f"{dst} was converted, but not compared: ")


def _print_plan(console: Console, plan: Conversion) -> None:
    rows = {
        "source": f"{plan.source} ({plan.kind}, {plan.config.model_type})",
        "destination": str(plan.destination),
        "tensors": f"{plan.tensors}, the largest {_size(plan.largest_tensor_bytes)}",
        "parameters": f"{plan.parameters:,}",
        "dtype": plan.dtype,
        "disk": _size(plan.disk_bytes),
        "peak memory": f"{_size(plan.peak_bytes)} (predicted; mapped files not counted)",
    }
    if plan.trained_positions is not None:
        rows["positions"] = (
            f"{plan.config.max_position:,}; those past the {plan.trained_positions:,} that were trained repeat them, "
            "and what the model says there means nothing"
        )
    for name, value in rows.items():
        console.print(f"{name:<13}{value}", markup=False, soft_wrap=True)


def _size(count: int) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.2f} {unit}"
    return f"{count} B"
