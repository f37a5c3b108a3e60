"""Rows of a matrix in another order, read a few at a time."""

from __future__ import annotations

import dataclasses

import numpy as np

from convert.sources import SourceTensor


def half_split(rows: np.ndarray, head_dim: int, rotary_dim: int) -> np.ndarray:
    """Where rows of heads stand in a file that keeps rotary pairs side by side.

    Of the first `rotary_dim` rows of a head, pair j is j and j + rotary_dim / 2 with us, 2j and 2j + 1 in such a file.
    """
    within, half = rows % head_dim, rotary_dim // 2
    return np.where(within < rotary_dim, rows - within + within % half * 2 + within // half, rows)


def reordered(tensor: SourceTensor, order: np.ndarray) -> SourceTensor:
    """The tensor whose row i is row order[i].

    It reads all that lies between the rows asked for, so a row should not come from far away.
    """

    def read(start: int, stop: int) -> np.ndarray:
        rows = order[start:stop]
        first = int(rows.min())
        return tensor.read(first, int(rows.max()) + 1)[rows - first]

    return dataclasses.replace(tensor, read=read)
