"""Rows of a matrix in another order, read a few at a time.

An order says of some rows of ours where they stand in the source. It is asked for those that are read and never for all
of them, whose number a config.json names freely.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from convert.sources import SourceTensor
from jaxdecode.config import ModelConfig

Order = Callable[[np.ndarray], np.ndarray]


def half_split(rows: np.ndarray, head_dim: int, rotary_dim: int) -> np.ndarray:
    """Where rows of heads stand in a file that keeps rotary pairs side by side.

    Of the first `rotary_dim` rows of a head, pair j is j and j + rotary_dim / 2 with us, 2j and 2j + 1 in such a file.
    """
    within, half = rows % head_dim, rotary_dim // 2
    return np.where(within < rotary_dim, rows - within + within % half * 2 + within // half, rows)


def pairs_side_by_side(config: ModelConfig, rows: np.ndarray) -> np.ndarray:
    """Where rows of queries, keys and values stand in a file that keeps both numbers of a rotary pair side by side."""
    if config.rope is None:
        return rows
    turned = (config.num_heads + config.num_kv_heads) * config.head_dim  # rows of queries and keys
    order = half_split(rows, config.head_dim, config.rope.turned(config.head_dim))
    return np.where(rows < turned, order, rows)


def head_by_head(config: ModelConfig, rows: np.ndarray) -> np.ndarray:
    """Where rows of queries, keys and values stand in a file that keeps each head's three together."""
    kind, row = np.divmod(rows, config.num_heads * config.head_dim)
    head, within = np.divmod(row, config.head_dim)
    return (head * 3 + kind) * config.head_dim + within


def reordered(tensor: SourceTensor, order: Order) -> SourceTensor:
    """The tensor whose row i is row order(i); rows that are all but neighbours there are read in one piece."""

    def read(start: int, stop: int) -> np.ndarray:
        rows = order(np.arange(start, stop))
        places = np.argsort(rows)
        runs = np.split(rows[places], np.flatnonzero(np.diff(rows[places]) > 2) + 1)
        found = np.concatenate([tensor.read(int(run[0]), int(run[-1]) + 1)[run - run[0]] for run in runs])
        return found[np.argsort(places)]

    return dataclasses.replace(tensor, read=read)
