"""How generation behaves under JAX's transformations: `vmap` folds into the batch, `shard_map` types its loops.

A plain `vmap` of a `while_loop` must select between old and new state for every mapped element, which copies the
whole cache each step and reads the weights once an element. Here the mapped axis becomes more rows of one batch.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_batching import custom_vmap

from pallas_kernels.fold import one_by_one


def foldable(run):
    """Wraps run(params, sampler, tokens, lengths, keys, limits, eos, stops, pad) so that `vmap` folds its rows.

    Rows (tokens, lengths, keys, limits) and the sampler's numbers may be mapped; where anything else is, the mapped
    elements run one after the other instead.
    """
    run = custom_vmap(run)

    @run.def_vmap
    def fold(axis_size: int, mapped, params, sampler, *arrays):
        rows, shared = arrays[:4], arrays[4:]
        if any(jax.tree.leaves((mapped[0], mapped[6:]))):
            out = one_by_one(run, mapped, (params, sampler, *arrays))
            return out, jax.tree.map(lambda _: True, out)

        folded = [
            (row if is_mapped else jnp.broadcast_to(row, (axis_size, *row.shape)))
            for row, is_mapped in zip(rows, mapped[2:6], strict=True)
        ]
        batch = folded[0].shape[1]
        folded = [row.reshape(axis_size * batch, *row.shape[2:]) for row in folded]
        leaves, structure = jax.tree.flatten(sampler)
        axes = tuple(0 if leaf else None for leaf in jax.tree.leaves(mapped[1]))
        out = run(params, _GroupedSampler(tuple(leaves), structure, axes, axis_size), *folded, *shared)
        out = jax.tree.map(lambda leaf: leaf.reshape(axis_size, batch, *leaf.shape[1:]), out)
        return out, jax.tree.map(lambda _: True, out)

    return run


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _GroupedSampler:
    """A mapped sampler: each group of rows is sampled by its own copy of the numbers."""

    leaves: tuple[Any, ...]
    structure: Any = dataclasses.field(metadata={"static": True})
    axes: tuple[int | None, ...] = dataclasses.field(metadata={"static": True})
    groups: int = dataclasses.field(metadata={"static": True})

    def init_(self, batch: int) -> Any:
        return self._map(lambda sampler: sampler.init_(batch // self.groups))

    def observe(self, state: Any, tokens: Array, lengths: Array) -> Any:
        def one(sampler, state, tokens, lengths):
            return sampler.observe(state, tokens, lengths) if hasattr(sampler, "observe") else state

        return self._map(one, state, self._split(tokens), self._split(lengths))

    def sample(self, state: Any, logits: Array, key: Array) -> tuple[Array, Any]:
        def one(sampler, *arguments):
            return sampler.sample(*arguments)

        token, state = self._map(one, state, self._split(logits), self._split(key))
        return token.reshape(-1), state

    def _split(self, rows: Array) -> Array:
        return rows.reshape(self.groups, -1, *rows.shape[1:])

    def _map(self, function, *arguments):
        def one(leaves, *arguments):
            return function(self.structure.unflatten(leaves), *arguments)

        in_axes = (self.axes, *(0 for _ in arguments))
        return jax.vmap(one, in_axes=in_axes, axis_size=self.groups)(self.leaves, *arguments)


def match_varying(tree: Any, *, like: Array) -> Any:
    """Marks every array as varying over the mesh axes that `like` varies over, as loops under `shard_map` require."""
    axes = _varying_axes(like)

    def mark(leaf):
        missing = tuple(axes - _varying_axes(leaf))
        return lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(mark, tree)


def _varying_axes(x: Array) -> frozenset[str]:
    return jax.typeof(x).manual_axis_type.varying  # pyright: ignore[reportAttributeAccessIssue]
