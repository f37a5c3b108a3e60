"""How an operation whose rows are independent behaves under `vmap`: the mapped axis becomes more rows."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array
from jax.custom_batching import custom_vmap


def fold_batch(run: Callable[..., Array]) -> Callable[..., Array]:
    """Wraps run(*arrays) -> array, all with a leading batch axis, so that `vmap` folds its axis into that batch.

    What is not mapped is repeated. Without this a loop over cache blocks would run to every group's own end and select.
    """
    run = custom_vmap(run)

    @run.def_vmap
    def fold(axis_size: int, mapped: list[bool], *arrays: Array):
        def rows(array: Array, is_mapped: bool) -> Array:
            array = array if is_mapped else jnp.broadcast_to(array, (axis_size, *array.shape))
            return array.reshape(-1, *array.shape[2:])

        out = run(*map(rows, arrays, mapped))
        return out.reshape(axis_size, -1, *out.shape[1:]), True

    return run
