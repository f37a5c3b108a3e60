"""Cells as text for a terminal: a table a model and card, the kernels of a step, and what was assumed."""

from __future__ import annotations

import collections
import re
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from jaxdecode.aot.check.cells import Cell
from jaxdecode.aot.check.kernels import KernelUse
from jaxdecode.aot.cost import Assumptions

WIDTH = 120  # of a console, at least, that numbers are not cut off
_GB = 1e9
_COLUMNS = {
    "batch": "right", "context": "right", "GB": "right", "fits": "left", "most\nbatch": "right",
    "most\ncontext": "right", "kernels\na token": "right", "modelled\nms a token": "right",
    "modelled\ntokens/s": "right", "modelled\nshare of\nroofline": "right", "the rest is\nmostly": "left",
    "modelled\nprefill ms": "right",
}  # fmt: skip


def show_cells(cells: Sequence[Cell], assumed: Assumptions, console: Console, *, kernels: bool) -> None:
    """Prints a table for each model and card, what is wrong or noteworthy, and the assumptions."""

    def say(line: str) -> None:
        console.print(Text(line), soft_wrap=True)

    for head in dict.fromkeys(map(_head, cells)):
        mine = [cell for cell in cells if _head(cell) == head]
        say(f"{head}\n")
        table = Table(box=None, pad_edge=False)
        for name, justify in _COLUMNS.items():
            table.add_column(name, justify=justify, no_wrap=True)  # pyright: ignore
        for cell in mine:
            table.add_row(*map(Text, _row(cell)), style=None if cell.fit.fits and not cell.error else "red")
        console.print(table, soft_wrap=True)
        say("")
        for line in _all_notes(mine):
            say(f"- {line}")
        for cell in mine if kernels else ():
            say(f"\nThe step at batch {cell.batch}, context {cell.context}:")
            for line in _kernel_lines(cell):
                say(line)
        say("")
    say(f"All times are modelled, none is measured. Assumed: {assumed.describe()}.")


def _head(cell: Cell) -> str:
    return f"{cell.model} in {cell.dtype} on {cell.card}, {cell.fit.memory_bytes / _GB:.1f} GB"


def _all_notes(cells: Sequence[Cell]) -> Iterable[str]:
    """Every cell's own notes under its batch and context; what holds for all of them once."""
    structures = [line for cell in cells for line in _structure(cell)]
    alike = len(set(structures)) == 1
    for cell in cells:
        for line in (*notes(cell), *(() if alike else _structure(cell))):
            yield f"batch {cell.batch}, context {cell.context}: {line}"
    if alike:
        yield structures[0]


def notes(cell: Cell) -> Iterable[str]:
    """What a reader of a cell's row should know, in sentences."""
    fit = cell.fit
    if not fit.fits:
        least = "" if fit.temporary_bytes is not None else "at least "
        yield f"does not fit, {least}{(fit.total_bytes - fit.memory_bytes) / _GB:.2f} GB too many"
    if cell.error:
        yield f"does not compile: {cell.error}"
    elif cell.context > cell.max_position:
        yield f"more tokens than the {cell.max_position} positions that the model was made for"
    if fit.memory_fraction and fit.fits:
        yield f"needs XLA_PYTHON_CLIENT_MEM_FRACTION={fit.memory_fraction:.2f}, as JAX takes 0.75 by itself"
    yield from cell.faults


def _structure(cell: Cell) -> Iterable[str]:
    program = cell.program
    if program is None:
        return
    whole = program.captured == program.kernels_per_token and program.graphs == 1
    graphs = "all" if whole else f"{program.captured} of {program.kernels_per_token}"
    loops = f"; one pass of {program.inner_loops} loops inside the step is counted" if program.inner_loops else ""
    yield (
        f"{program.kernels_per_layer:g} kernels of ours a layer; {graphs} launches of a token in "
        f"{program.graphs} CUDA graph{'s' * (program.graphs != 1)}, the host waits "
        f"{'once' if program.round_trips == 1 else f'{program.round_trips} times'}{loops}"
    )


def _row(cell: Cell) -> list[str]:
    fit, program, modelled = cell.fit, cell.program, cell.modelled
    bound = "" if fit.temporary_bytes is not None else "≤ "
    row = [
        str(cell.batch),
        str(cell.context),
        f"{'' if fit.temporary_bytes is not None else '≥ '}{fit.total_bytes / _GB:.2f}",
        "yes" if fit.fits else "no",
        f"{bound}{fit.largest_batch}",
        f"{bound}{fit.largest_context}",
    ]
    if program is None or modelled is None:
        return row
    fewest, most = modelled.seconds_per_token
    return [
        *row,
        str(program.kernels_per_token),
        _range(1e3 * fewest, 1e3 * most, 3),
        _range(*modelled.tokens_per_second, 1),
        f"{'≤ ' if most > 1.001 * fewest else ''}{modelled.roofline_share:.0%}",
        modelled.binds,
        _range(1e3 * modelled.prefill_seconds[0], 1e3 * modelled.prefill_seconds[1], 0),
    ]


def _range(low: float, high: float, digits: int) -> str:
    return "–".join(dict.fromkeys(f"{number:.{digits}f}" for number in (low, high)))


def _kernel_lines(cell: Cell) -> Iterable[str]:
    for use in cell.kernels:
        if use.kind == "mosaic":
            yield from _our_kernel(use)
    others = [use for use in cell.kernels if use.kind != "mosaic"]
    if others:
        launches = sum(use.launches for use in others)
        micros = [1e6 * sum(use.launches * use.modelled_seconds[bound] for use in others) for bound in (0, 1)]
        yield f"  {launches} launches of XLA's own kernels, modelled {_range(micros[0], micros[1], 1)} µs in all:"
        counts = collections.Counter[str]()
        for use in others:
            counts[re.sub(r"[._]\d+$", "", use.op)] += use.launches
        yield f"    {', '.join(f'{op} x {count}' for op, count in counts.items())}"


def _our_kernel(use: KernelUse) -> Iterable[str]:
    name, shape = use.name.removesuffix("_mosaic_gpu_kernel"), " x ".join(map(str, use.shape))
    grid = " x ".join(map(str, use.grid))
    yield f"  {name}: {use.weight or 'keys and values'} [{shape}], {use.launches} times, grid {grid}"
    yield (
        f"    {use.registers} registers, {use.spill_bytes} bytes spilled, {use.shared_bytes:,} shared; "
        f"{use.blocks_per_sm} blocks an SM, {use.waves:.2f} waves, {use.in_flight_bytes:,} bytes in flight on an SM"
    )
    yield (
        f"    asks for {use.requested_bytes:,} bytes, at least {use.least_bytes:,}; "
        f"of activations {use.activation_bytes:,}"
    )
    spent = ", ".join(f"{name} {1e6 * seconds:.1f}" for name, seconds in use.modelled_spent_seconds.items())
    yield f"    modelled {1e6 * use.modelled_seconds[0]:.1f} µs: {spent}"
