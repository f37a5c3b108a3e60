"""Cells as a picture: the roofline of each card, and where a decode step stands under it, modelled."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxdecode.aot.check.cells import Cell, Question
from jaxdecode.aot.cost import tensor_rate
from pallas_kernels.targets import Target

_MARKERS = "osD^vP*X"


def plot_rooflines(questions: Sequence[Question], cells: Sequence[Cell], file: Path) -> None:
    """Writes a PNG with one panel a card: operations a second against operations a byte, on logarithmic axes.

    A cell stands where its fewest modelled seconds put it, beside its batch and context. Where no cell fits its card
    and compiles, only the roofs are drawn.

    Raises:
      ImportError: matplotlib is not installed.
    """
    import matplotlib  # pyright: ignore[reportMissingImports]: of the extra `check`

    matplotlib.use("Agg")
    from matplotlib import pyplot  # pyright: ignore[reportMissingImports]

    pairs = list(zip(questions, cells, strict=True))
    cards = list(dict.fromkeys((cell.card, cell.dtype) for cell in cells))
    figure, panels = pyplot.subplots(1, len(cards), figsize=(6.5 * len(cards), 5), squeeze=False)
    for (card, dtype), axes in zip(cards, panels[0], strict=True):
        mine = [(q, c) for q, c in pairs if (c.card, c.dtype) == (card, dtype)]
        _draw_roof(axes, mine[0][0].target, dtype)
        for marker, model in zip(_MARKERS * len(mine), dict.fromkeys(c.model for _, c in mine), strict=False):
            _draw_cells(axes, [c for _, c in mine if c.model == model and c.modelled], marker, model)
        axes.set(
            xscale="log", yscale="log", title=f"{card}, {dtype}: modelled, not measured",
            xlabel="operations a byte of weights, keys and values", ylabel="operations a second",
        )  # fmt: skip
        axes.legend(loc="upper left")
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def _draw_roof(axes: Any, target: Target, dtype: str) -> None:
    intensities = [10 ** (step / 20) for step in range(-10, 61)]
    peak, bandwidth = tensor_rate(target, dtype), target.bandwidth * 1e9
    roof = [min(peak, bandwidth * intensity) for intensity in intensities]
    axes.plot(intensities, roof, color="black", linewidth=1, label=f"{target.bandwidth} GB/s, {peak / 1e12:g} Tflop/s")


def _draw_cells(axes: Any, cells: Sequence[Cell], marker: str, model: str) -> None:
    for index, cell in enumerate(cells):
        assert cell.modelled and cell.bytes_per_token and cell.operations_per_token
        operations = cell.operations_per_token
        point = operations / cell.bytes_per_token, operations / cell.modelled.seconds_per_token[0]
        color = f"C{_MARKERS.index(marker)}"
        axes.scatter(*point, marker=marker, color=color, label=model if index == 0 else None)
        text = f"{cell.batch} x {cell.context}"
        axes.annotate(text, point, xytext=(4, -6), textcoords="offset points", fontsize=6)
