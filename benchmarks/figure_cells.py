"""Checks every cell of the paper's decode figure on its card, without a card: compiled and modelled, nothing is run.

    python benchmarks/figure_cells.py                  # all six panels: a quarter of an hour on two cores
    python benchmarks/figure_cells.py --csv cells.csv --kernels kernels.csv

Three models on an A100 (80 GB) and an RTX 3090, batch 1 to 8, each panel with four contexts. OPT is given as many
positions as a context asks for, which the published model has not.
"""

from __future__ import annotations

import csv
import dataclasses
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from jaxdecode.aot.check import Assumptions, Cell, Question, ask, check_cells, find_model, versions
from jaxdecode.aot.check.table import WIDTH, show_cells
from jaxdecode.cli.progress import counter
from pallas_kernels.targets import find_target

MODELS = ("llama2-7b", "opt-6.7b", "chatglm2-6b")
CONTEXTS = {"a100-80gb": (128, 1024, 8192, 32768), "rtx3090": (128, 1024, 2048, 4096)}
BATCHES = (1, 2, 4, 8)


def questions() -> list[Question]:
    """The figure's cells, panel by panel."""
    return [
        question.with_positions()
        for card, contexts in CONTEXTS.items()
        for model in MODELS
        for question in ask(find_model(model), targets=[find_target(card)], batches=BATCHES, contexts=contexts)
    ]


def cell_row(cell: Cell) -> dict[str, Any]:
    """A row of the table: numbers in bytes and milliseconds."""
    row = {name: getattr(cell, name) for name in ("model", "card", "dtype", "batch", "context")}
    fit, program, modelled = cell.fit, cell.program, cell.modelled
    sizes = ("weight_bytes", "cache_bytes", "temporary_bytes", "memory_bytes", "fits")
    row |= {name: getattr(fit, name) for name in sizes}
    row["short_by_bytes"] = max(0, fit.total_bytes - fit.memory_bytes)
    row["error"] = cell.error or ""
    row["faults"] = "; ".join(cell.faults)
    if program is None or modelled is None:
        return row
    row |= {name: value for name, value in dataclasses.asdict(program).items() if name != "prefill_kernels"}
    fewest, most = modelled.prefill_seconds
    return row | {
        "bytes_per_token": cell.bytes_per_token,
        "modelled_ms_per_token": f"{1e3 * modelled.seconds_per_token[0]:.4f}",
        "modelled_ms_per_token_most": f"{1e3 * modelled.seconds_per_token[1]:.4f}",
        "modelled_tokens_per_second": f"{modelled.tokens_per_second[1]:.2f}",
        "roofline_ms": f"{1e3 * modelled.roofline_seconds:.4f}",
        "modelled_roofline_share": f"{modelled.roofline_share:.4f}",
        "modelled_rest_mostly": modelled.binds,
        "modelled_prefill_ms_least": f"{1e3 * fewest:.1f}",
        "modelled_prefill_ms_most": f"{1e3 * most:.1f}",
    }


def kernel_rows(cell: Cell) -> Iterator[dict[str, Any]]:
    """A row for each kernel of ours in the cell's decode step."""
    where = {name: getattr(cell, name) for name in ("model", "card", "dtype", "batch", "context")}
    for use in cell.kernels:
        if use.kind != "mosaic":
            continue
        left_out = ("kind", "modelled_spent_seconds")
        row = {name: value for name, value in dataclasses.asdict(use).items() if name not in left_out}
        row["shape"], row["grid"] = ("x".join(map(str, row[name])) for name in ("shape", "grid"))
        row["waves"] = f"{use.waves:.3f}"
        row["modelled_us"] = f"{1e6 * row.pop('modelled_seconds')[0]:.2f}"
        yield where | row


def write(file: Path, rows: list[dict[str, Any]]) -> None:
    """Writes rows with the versions that they hold for."""
    installed = versions()
    rows = [row | installed for row in rows]
    with file.open("w", newline="") as out:
        writer = csv.DictWriter(out, list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows(rows)


def main(
    csv_file: Annotated[Path | None, typer.Option("--csv", help="Write the cells here.")] = None,
    kernels: Annotated[Path | None, typer.Option(help="Write the kernels of each cell's step here.")] = None,
    workers: Annotated[int, typer.Option(help="Compiling processes.")] = os.cpu_count() or 1,
) -> None:
    """Check, print, write; fails if a cell does not compile or a kernel has a fault."""
    started, assumed, console = time.monotonic(), Assumptions(), Console(highlight=False)
    console.width = max(WIDTH, console.width)
    with counter(Console(stderr=True, highlight=False), "compiling") as advance:
        cells = check_cells(questions(), assumed=assumed, workers=workers, progress=advance)
    show_cells(cells, assumed, console, kernels=False)
    if csv_file:
        write(csv_file, [cell_row(cell) for cell in cells])
    if kernels:
        write(kernels, [row for cell in cells for row in kernel_rows(cell)])
    wrong = sum(bool(cell.error or cell.faults) for cell in cells)
    fit = sum(cell.fit.fits for cell in cells)
    took = (time.monotonic() - started) / 60
    console.print(f"{len(cells)} cells, {fit} fit, {wrong} with an error or fault; {took:.1f} minutes; nothing was run")
    raise typer.Exit(1 if wrong else 0)


if __name__ == "__main__":
    typer.run(main)
