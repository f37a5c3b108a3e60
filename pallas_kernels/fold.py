"""How an operation whose rows are independent behaves under `vmap`: the mapped axis becomes more rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_batching import custom_vmap


def fold_batch(run: Callable[..., Any], *, rows: int) -> Callable[..., Any]:
    """Wraps run(*arguments) -> arrays so that `vmap` folds its axis into theirs.

    Without this a loop over cache blocks would run to every group's own end and select, and a product would read its
    weights once for each group.

    Args:
      run: of its arguments, which are pytrees, the first `rows` and all results have a leading axis of independent
        rows; the others serve every row (weights). A mapped axis of the first kind becomes more rows, what is not
        mapped being repeated; where one of the second kind is mapped, the groups run one after the other.
    """
    run = custom_vmap(run)

    @run.def_vmap
    def fold(axis_size: int, mapped: list[Any], *arguments: Any):
        if any(jax.tree.leaves(mapped[rows:])):
            out = one_by_one(run, mapped, arguments)
            return out, jax.tree.map(lambda _: True, out)

        def more_rows(array: Array, is_mapped: bool) -> Array:
            array = array if is_mapped else jnp.broadcast_to(array, (axis_size, *array.shape))
            return array.reshape(-1, *array.shape[2:])

        folded = jax.tree.map(more_rows, arguments[:rows], tuple(mapped[:rows]))
        out = run(*folded, *arguments[rows:])
        out = jax.tree.map(lambda array: array.reshape(axis_size, -1, *array.shape[1:]), out)
        return out, jax.tree.map(lambda _: True, out)

    return run


def one_by_one(run: Callable[..., Any], mapped: Any, arguments: Any) -> Any:
    """run(*arguments) for each element of the mapped axis, one after the other; `mapped` is shaped like `arguments`."""
    leaves, structure = jax.tree.flatten(arguments)
    flags = jax.tree.leaves(mapped)

    def one(mapped_leaves: list[Array]) -> Any:
        rest = iter(mapped_leaves)
        pairs = zip(leaves, flags, strict=True)
        return run(*structure.unflatten([next(rest) if flag else leaf for leaf, flag in pairs]))

    return lax.map(one, [leaf for leaf, flag in zip(leaves, flags, strict=True) if flag])
