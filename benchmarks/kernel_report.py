"""Compiles every kernel at the shapes of the paper's models for cards that need not be here, and prints a table.

    python benchmarks/kernel_report.py                          # all of it: minutes
    python benchmarks/kernel_report.py --card a100-80gb --batch 1 --batch 8 --context 1024 --csv kernels.csv

Nothing here is a time. It exits with 1 if a kernel spills or uses local memory, lacks tensor-core instructions where it
should have them, copies weights, keys or values in less than 16 bytes a thread or not by TMA, does not fit the card's
shared memory, or asks for more than 1.02 times the bytes there are, and if a program is more than the one kernel.
"""

from __future__ import annotations

import csv
import dataclasses
import importlib.metadata
import math
import re
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))  # where the compiling process finds `benchmarks.shapes`

from benchmarks import shapes
from benchmarks.shapes import MODELS
from jaxdecode.aot import CompiledProgram, CompileError, Job, compile_programs
from jaxdecode.aot.inspection import inspect_kernel
from jaxdecode.aot.traffic import Traffic, decode_attention_traffic, product_traffic
from pallas_kernels.dataflow import choose_implementation
from pallas_kernels.decode_attention.config import choose_config as choose_decode_config
from pallas_kernels.flat_gemm.config import choose_config as choose_product_config
from pallas_kernels.prefill_attention.config import choose_config as choose_prefill_config
from pallas_kernels.targets import TARGETS, Target, find_target

CARDS = ("a100-80gb", "rtx3090", "rtx4090", "h100")
BATCHES = (1, 2, 4, 8, 16, 32)
CONTEXTS = (128, 1024, 2048, 4096, 8192, 32768)
CHUNK = 256  # prompt tokens of a pass
BATCH_JOBS = 12  # programs compiled between two looks at the progress
THREADS = 128  # of a block
MOST_BYTES = 1.02


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """One kernel to compile."""

    model: str
    card: str
    op: str
    batch: int
    context: int
    dtype: str

    @property
    def target(self) -> Target:
        return find_target(self.card)

    @property
    def is_product(self) -> bool:
        return self.op in MODELS[self.model].products()

    def job(self) -> Job:
        where = {"model": self.model, "batch": self.batch, "max_len": self.context, "dtype": self.dtype}
        if self.is_product:
            return Job(build=shapes.product, target=self.target, kwargs=where | {"name": self.op})
        chunk = {"q_len": min(CHUNK, self.context)} if self.op == "prefill_attention" else {}
        return Job(build=shapes.attention, target=self.target, kwargs=where | chunk)


def cells(models: list[str], cards: list[str], batches: list[int], contexts: list[int], dtype: str) -> Iterator[Cell]:
    """Every kernel of every model, card, batch and context that fits the card; products once a batch."""
    for card in cards:
        for model in models:
            shape, memory = MODELS[model], find_target(card).memory_bytes
            for batch in batches:
                fitting = [n for n in contexts if 2 * shape.parameters + shape.cache_bytes(batch, n) <= memory]
                for op in shape.products() if fitting else ():
                    yield Cell(model=model, card=card, op=op, batch=batch, context=fitting[-1], dtype=dtype)
                for context in fitting:
                    for op in ("decode_attention", "prefill_attention"):
                        yield Cell(model=model, card=card, op=op, batch=batch, context=context, dtype=dtype)


def describe(cell: Cell, outcome: CompiledProgram | CompileError) -> dict[str, Any]:
    """A row of the table; "miss" says what is wrong, "" if nothing is."""
    row: dict[str, Any] = dataclasses.asdict(cell)
    if isinstance(outcome, CompileError):
        errors = re.findall(r"(?m)^\w*(?:Error|Exception)\b.*", str(outcome)) or [str(outcome)[-200:]]
        return row | {"miss": f"does not compile: {errors[-1]}"}
    launched = [outcome.kernels[thunk.kernel] for thunk in outcome.walk() if thunk.kernel]
    ours = [kernel for kernel in launched if kernel.kind == "mosaic"]
    others = [thunk.kind for thunk in outcome.walk() if not thunk.kernel] + [k.name for k in launched if k not in ours]
    if len(ours) != 1:
        return row | {"miss": f"{len(ours)} kernels of ours, beside {others or 'nothing'}"}
    [kernel] = ours
    facts, report = inspect_kernel(kernel), kernel.report
    assert report is not None  # inspect_kernel has seen it
    implementation, traffic, copies = requests(cell, kernel.launch.grid)
    product = cell.is_product  # those may copy x, which the cache holds, in smaller pieces
    shared = kernel.launch.shared_bytes + report.shared_bytes
    misses = {
        f"beside it {', '.join(others)}": others
        and cell.op != "prefill_attention",  # its counts are summed over blocks
        "spills": facts.spill_bytes,
        "local memory": facts.local_memory,
        "no tensor cores": not facts.tensor_cores and implementation != "gemv",
        "tensor cores in a gemv": facts.tensor_cores and implementation == "gemv",
        "copies of less than 16 bytes": facts.async_copies < max(1, copies) or (facts.narrow_copies and not product),
        "more shared memory than the card has": shared > cell.target.shared_per_block,
        "asks for too many bytes": traffic and traffic.requested > MOST_BYTES * traffic.least,
    }
    return row | {
        "implementation": implementation,
        "grid": "x".join(map(str, kernel.launch.grid)),
        "registers": report.registers,
        "shared": shared,
        "copies": facts.async_copies,
        "least": traffic.least if traffic else "",
        "requested": traffic.requested if traffic else "",
        "activations": traffic.activations if traffic else "",
        "rereads": "" if traffic else rereads(cell),
        "miss": "; ".join(name for name, is_so in misses.items() if is_so),
    }


def requests(cell: Cell, grid: tuple[int, int, int]) -> tuple[str, Traffic | None, int]:
    """The implementation's name, the bytes it asks for, and the 16-byte copies a thread needs for that.

    No bytes for prefill, whose blocks share keys and values. Below sm_90 a copy stands in the PTX once for each step
    of the ring.
    """
    shape, itemsize = MODELS[cell.model], 2
    thread = 16 * THREADS if cell.target.compute_capability < (9, 0) else math.inf
    if cell.op == "prefill_attention":
        return "mosaic_gpu", None, 1
    if cell.op == "decode_attention":
        heads = {name: getattr(shape, name) for name in ("num_heads", "num_kv_heads", "head_dim")}
        config = choose_decode_config(
            batch=cell.batch,
            num_kv_heads=shape.num_kv_heads,
            q_per_kv=shape.num_heads // shape.num_kv_heads,
            max_len=cell.context,
            head_dim=shape.head_dim,
            target=cell.target,
        )
        traffic = decode_attention_traffic(config, [cell.context - 1] * cell.batch, **heads, itemsize=itemsize)
        return "mosaic_gpu", traffic, int(2 * config.num_stages * config.block_kv * shape.head_dim * itemsize / thread)
    n, k = shape.products()[cell.op]
    segments = 2 if cell.op == "qkv" or (cell.op == "up" and shape.gated) else 1
    unit = None
    options: dict[str, Any] = {"m": cell.batch, "n": n, "k": k, "dtype": cell.dtype, "segments": segments}
    if cell.op == "qkv":
        options |= {"head_dim": shape.head_dim, "rotary_dim": shape.rotary_dim}
        unit = shape.rotary_dim or shape.head_dim
    name = choose_implementation("linear", device=cell.target, **options).implementation
    m = -(-cell.batch // 8) * 8
    where = {"segments": segments, "unit": unit, "gemv": name == "gemv"}
    config = choose_product_config(m, n, k, cell.dtype, cell.target, **where)
    rows = cell.batch if name == "gemv" else config.pad_m(m)
    traffic = product_traffic(blocks=grid[0], block_rows=config.block_n, rows_of_x=rows, n=n, k=k, itemsize=itemsize)
    return name, traffic, int(config.num_stages * config.block_n * config.block_k * itemsize / thread)


def rereads(cell: Cell) -> int:
    """How often a key or value that all queries of the chunk see is asked for."""
    shape = MODELS[cell.model]
    q_per_kv = shape.num_heads // shape.num_kv_heads
    config = choose_prefill_config(
        q_per_kv=q_per_kv,
        max_len=cell.context,
        head_dim=shape.head_dim,
        target=cell.target,
        two_parts=shape.softmax is not None and cell.dtype == "float16",
    )
    return config.reread_factor(min(CHUNK, cell.context), q_per_kv, shape.head_dim)


def compile_all(todo: list[Cell], console: Console) -> list[dict[str, Any]]:
    """A row for each cell; two cards at a time, each in processes of its own."""
    rows: dict[Cell, dict[str, Any]] = {}
    with Progress(console=console) as progress:
        task = progress.add_task("compiling", total=len(todo))

        def compile_card(card: str) -> None:
            mine = [cell for cell in todo if cell.card == card]
            for first in range(0, len(mine), BATCH_JOBS):
                part = mine[first : first + BATCH_JOBS]
                outcomes = compile_programs([cell.job() for cell in part])
                rows.update((cell, describe(cell, outcome)) for cell, outcome in zip(part, outcomes, strict=True))
                progress.advance(task, len(part))

        with ThreadPoolExecutor(2) as pool:
            list(pool.map(compile_card, dict.fromkeys(cell.card for cell in todo)))
    return [rows[cell] for cell in todo]


def show(rows: list[dict[str, Any]], console: Console) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row))
    table = Table(*names, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*(str(row.get(name, "")) for name in names), style="red" if row["miss"] else None)
    console.print(table)


def main(
    card: Annotated[list[str] | None, typer.Option(help="May be repeated.")] = None,
    model: Annotated[list[str] | None, typer.Option(help="May be repeated.")] = None,
    batch: Annotated[list[int] | None, typer.Option(help="May be repeated.")] = None,
    context: Annotated[list[int] | None, typer.Option(help="Slots of the cache; may be repeated.")] = None,
    dtype: Annotated[str, typer.Option(help="float16 or bfloat16.")] = "float16",
    csv_file: Annotated[Path | None, typer.Option("--csv", help="Also write the rows here.")] = None,
) -> None:
    """Compile, print, and fail on any miss."""
    card, model = card or list(CARDS), model or list(MODELS)
    unknown = [name for name in card if name not in TARGETS] + [name for name in model if name not in MODELS]
    if unknown:
        raise typer.BadParameter(f"no card or model {', '.join(unknown)}; there are {', '.join([*TARGETS, *MODELS])}")
    console = Console(width=220, highlight=False)
    rows = compile_all(list(cells(model, card, batch or list(BATCHES), context or list(CONTEXTS), dtype)), console)
    show(rows, console)
    if csv_file:
        versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "jax-cuda12-plugin")}
        with csv_file.open("w", newline="") as file:
            names = list(dict.fromkeys(name for row in rows for name in (*row, *versions)))
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows(row | versions for row in rows)
    missed = sum(bool(row["miss"]) for row in rows)
    console.print(f"{len(rows)} kernels compiled, {missed} with a miss; nothing was run")
    raise typer.Exit(1 if missed else 0)


if __name__ == "__main__":
    typer.run(main)
