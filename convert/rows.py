"""Rows of a matrix in another order, read a few at a time."""

from __future__ import annotations

import dataclasses

import numpy as np

from convert.sources import SourceTensor
from jaxdecode.config import ModelConfig


def half_split(rows: np.ndarray, head_dim: int, rotary_dim: int) -> np.ndarray:
    """Where rows of heads stand in a file that keeps rotary pairs side by side.

    Of the first `rotary_dim` rows of a head, pair j is j and j + rotary_dim / 2 with us, 2j and 2j + 1 in such a file.
    """
    within, half = rows % head_dim, rotary_dim // 2
    return np.where(within < rotary_dim, rows - within + within % half * 2 + within // half, rows)


def pairs_side_by_side(config: ModelConfig) -> np.ndarray:
    """Rows of queries, keys and values where the two numbers of a rotary pair stand side by side in the file."""
    turned = (config.num_heads + config.num_kv_heads) * config.head_dim  # rows of queries and keys
    rows = np.arange(turned + config.num_kv_heads * config.head_dim)
    if config.rope is None:
        return rows
    order = half_split(rows, config.head_dim, config.rope.turned(config.head_dim))
    return np.where(rows < turned, order, rows)


def head_by_head(config: ModelConfig) -> np.ndarray:
    """Rows of queries, keys and values where each head's three stand together in the file."""
    rows = np.arange(3 * config.num_heads * config.head_dim).reshape(config.num_heads, 3, config.head_dim)
    return rows.swapaxes(0, 1).reshape(-1)


def reordered(tensor: SourceTensor, order: np.ndarray) -> SourceTensor:
    """The tensor whose row i is row order[i]; rows that are neighbours there are read in one piece."""

    def read(start: int, stop: int) -> np.ndarray:
        rows = order[start:stop]
        places = np.argsort(rows)
        runs = np.split(rows[places], np.flatnonzero(np.diff(rows[places]) != 1) + 1)
        found = np.concatenate([tensor.read(int(run[0]), int(run[-1]) + 1) for run in runs])
        return found[np.argsort(places)]

    return dataclasses.replace(tensor, read=read)
