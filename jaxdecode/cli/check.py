"""`jaxdecode check`: how a model would run on a card that is not here."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jaxdecode.cli.progress import counter

if TYPE_CHECKING:
    from jaxdecode.config import ModelConfig

_NUMBER = re.compile(r"(\d+)(k?)", re.IGNORECASE)


def check(
    model: Annotated[
        list[str],
        typer.Argument(help="A checkpoint, a Hugging Face config.json, or a name such as llama2-7b; several too."),
    ],
    gpu: Annotated[
        list[str], typer.Option(help="a100-80gb, rtx3090, h100, …, or a TOML file with your own; may be repeated.")
    ],
    batch: Annotated[str, typer.Option(help="Rows; several with commas between them.")] = "1",
    context: Annotated[str, typer.Option(help="Tokens of prompt and text of a row: 128,1k,8k,32k.")] = "1k",
    dtype: Annotated[
        str | None, typer.Option(help="float16, bfloat16 or float32; by default the model's own, else float16.")
    ] = None,
    extend_positions: Annotated[
        bool, typer.Option("--extend-positions", help="Give models with learned positions as many as asked for.")
    ] = False,
    kernels: Annotated[bool, typer.Option("--kernels", help="Also list the kernels of each step.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Write a PNG of rooflines here.", dir_okay=False)] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Fail also where a kernel spills, copies weights, or asks for too much.")
    ] = False,
    workers: Annotated[int | None, typer.Option(help="Compiling processes; by default one a core.", min=1)] = None,
) -> None:
    """Compile a model's generation for cards that are not here: does it fit, with which kernels, how fast at best.

    Only shapes are needed, no weights. Nothing is run: every time is modelled.
    """
    from rich.console import Console

    from jaxdecode.aot.check import Assumptions, ask, check_cells, versions
    from jaxdecode.aot.check.table import WIDTH, show_cells
    from pallas_kernels.targets import find_target

    if plot:
        _can_plot(plot)
    assumed = Assumptions()
    sizes = {"batches": _numbers("--batch", batch), "contexts": _numbers("--context", context)}
    targets, models = list(map(find_target, gpu)), list(map(_find_model, model))
    questions = [question for one in models for question in ask(one, targets=targets, dtype=dtype, **sizes)]
    if extend_positions:
        questions = [question.with_positions() for question in questions]
    with counter(Console(stderr=True, highlight=False), "compiling") as advance:
        cells = check_cells(questions, assumed=assumed, workers=workers or os.cpu_count() or 1, progress=advance)
    if as_json:
        whole = {"versions": versions(), "assumed": dataclasses.asdict(assumed)}
        typer.echo(json.dumps(whole | {"cells": [cell.to_dict() for cell in cells]}))
    else:
        console = Console(highlight=False)
        console.width = max(WIDTH, console.width)
        show_cells(cells, assumed, console, kernels=kernels or len(cells) == 1)
    if plot:
        from jaxdecode.aot.check.plot import plot_rooflines

        plot_rooflines(questions, cells, plot)
    if any(cell.error or (strict and cell.faults) for cell in cells):
        raise typer.Exit(1)


def _find_model(model: str) -> tuple[str, ModelConfig, str]:
    """Name, config and dtype; a Hugging Face config.json, or a folder that holds one, is translated."""
    from jaxdecode.aot.check import find_model

    path = Path(model)
    file = path / "config.json" if path.is_dir() else path
    if file.is_file() and file.suffix == ".json":
        from convert import read_config

        config, dtype = read_config(file)
        return file.resolve().parent.name, config, dtype
    return find_model(model)


def _numbers(option: str, text: str) -> list[int]:
    found = [_NUMBER.fullmatch(part.strip()) for part in text.split(",")]
    if not all(found):
        raise ValueError(f"{option} takes whole numbers with commas between them, such as 1,8 or 128,1k; got {text!r}")
    return [int(match[1]) * (1024 if match[2] else 1) for match in found if match]


def _can_plot(file: Path) -> None:
    """Refuses before minutes of compiling what could not be drawn after them."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError('--plot needs matplotlib: pip install "jaxdecode[check]"')
    if file.suffix.lower() != ".png" or not file.parent.is_dir():
        raise ValueError(f"--plot takes the name of a .png file in a folder that exists; got {file}")
