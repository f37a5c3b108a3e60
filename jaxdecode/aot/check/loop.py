"""The decode loop of a compiled `generate`: what runs in it, on which weights, and in which graphs."""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Iterable, Mapping

from jaxdecode.aot.inspection import find_faults
from jaxdecode.aot.program import Argument, CompiledProgram, GraphNode, Kernel, Slice, Thunk, walk
from jaxdecode.cache import cache_slots
from jaxdecode.config import ModelConfig

_TABLES = ("embed.weight", "positions.weight")
_LARGE_COPY = 1 << 20  # bytes, of whatever


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProgramFacts:
    """The program of a cell.

    Attributes:
      kernels_per_token: launches in the decode loop's body.
      kernels_per_layer: of ours, one layer's.
      captured: launches that are part of a CUDA graph.
      graphs: that are launched a token.
      round_trips: waits of the host for the device a token.
      inner_loops: loops inside the step, of which one pass is counted: how often they run is data.
      prefill_kernels: launches of each pass over a chunk of the prompt, by the chunk's tokens a row.
    """

    kernels_per_token: int
    kernels_per_layer: float
    captured: int
    graphs: int
    round_trips: int
    inner_loops: int
    prefill_kernels: Mapping[int, int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Launches:
    """Launches of one kernel in a step, alike in all but the layer.

    Attributes:
      thunk: the first.
      kernel: None for a library call.
      weight: the matrix that is multiplied, the largest if there are several, with * for the layer; "" for none.
      matrix: where it is and its shape.
      product_bytes: of all matrices that are multiplied.
      table_bytes: of those that are only looked up in.
      window: of an attention, in tokens.
      count: how many.
      captured: those of them in a CUDA graph.
    """

    thunk: Thunk
    kernel: Kernel | None
    weight: str
    matrix: Slice | None
    product_bytes: int
    table_bytes: int
    window: int | None
    count: int
    captured: int


class DecodeLoop:
    """Reads the last loop of a program.

    Args:
      weights: the name of each parameter among the program's arguments: see `program.weight_names`.
    """

    def __init__(
        self, program: CompiledProgram, config: ModelConfig, weights: list[str], *, batch: int, context: int
    ) -> None:
        self.program, self._config, self._batch = program, config, batch
        self._keys_shape = (batch, config.num_kv_heads, cache_slots(context), config.head_dim)
        loops = [thunk for thunk in program.thunks if thunk.kind == "while"]
        self._passes, loop = loops[:-1], loops[-1]
        self._body = list(walk(loop.children["body"]))
        self._weights = {
            parameter.slice.allocation: (weights[parameter.index], parameter.slice)
            for parameter in program.parameters
            if parameter.index < len(weights)
        }
        [node] = [node for node in program.graphs if node.id == loop.id]
        self._graphs = list(_graphs(node.children["body"]))
        self._captured = {node.id for graph in self._graphs for node in _nodes(graph.children)}

    def facts(self, chunks: Iterable[int]) -> ProgramFacts:
        """`chunks`: tokens a row of each prefill loop, in the order in which they run."""
        kinds = collections.Counter(thunk.kind for thunk in self._body)
        launches = self.launches()
        ours = sum(part.count for part in launches if part.kernel and part.kernel.kind == "mosaic")
        outside = sum(part.count for part in launches if part.weight and "*" not in part.weight)
        return ProgramFacts(
            kernels_per_token=sum(part.count for part in launches),
            kernels_per_layer=max(0, ours - outside) / self._config.num_layers,
            captured=sum(part.captured for part in launches),
            graphs=len(self._graphs),
            round_trips=1 + kinds["while"] + kinds["conditional"],
            inner_loops=kinds["while"],
            prefill_kernels={
                chunk: sum(map(_runs, walk(loop.children["body"])))
                for chunk, loop in zip(chunks, self._passes, strict=True)
            },
        )

    def launches(self) -> list[Launches]:
        """What runs, in order of first use."""
        groups: dict[tuple, list[Thunk]] = {}
        attentions = 0
        for thunk in filter(_runs, self._body):
            name, window = self._largest(thunk)[0], None
            if thunk.kernel and thunk.kernel.startswith("decode_attention"):  # one a layer, in order
                window, attentions = self._config.window(attentions), attentions + 1
            groups.setdefault((thunk.kernel or thunk.kind, _any_layer(name), window), []).append(thunk)
        return [
            Launches(
                thunk=thunks[0],
                kernel=self.program.kernels[thunks[0].kernel] if thunks[0].kernel else None,
                weight=weight,
                matrix=self._largest(thunks[0])[1],
                product_bytes=sum(where.size for _, where in self._matrices(thunks[0], multiplied=True)),
                table_bytes=sum(where.size for _, where in self._matrices(thunks[0], multiplied=False)),
                window=window,
                count=len(thunks),
                captured=sum(thunk.id in self._captured for thunk in thunks),
            )
            for (_, weight, window), thunks in groups.items()
        ]

    def faults(self) -> Iterable[str]:
        """What is wrong with the whole program's kernels of ours, and with the loop; nothing if all is well."""
        for kernel in self.program.kernels.values():
            if kernel.kind == "mosaic":
                yield from (f"{kernel.name} {fault}" for fault in find_faults(kernel, self.program.target))
        shapes = {where.shape for _, where in self._weights.values() if where.shape and len(where.shape) == 2}
        shapes.add(self._keys_shape)  # pyright: ignore[reportArgumentType]
        for thunk in filter(_runs, self._body):
            if thunk.kernel and self.program.kernels[thunk.kernel].kind == "mosaic":
                continue
            places = collections.Counter((part.allocation, part.offset) for part in slices(thunk.buffers))
            for part in slices(thunk.buffers, written=True):
                copied = thunk.kind == "device_to_device_copy" and part.size >= _LARGE_COPY
                in_place = places[part.allocation, part.offset] > 1
                if (part.shape in shapes or copied) and not in_place:
                    yield f"{thunk.name or thunk.kind} copies {part.size:,} bytes of weights or caches a token"

    def _largest(self, thunk: Thunk) -> tuple[str, Slice | None]:
        """The largest matrix that a thunk multiplies with."""
        found = self._matrices(thunk, multiplied=True)
        return max(found, key=lambda pair: pair[1].size) if found else ("", None)

    def _matrices(self, thunk: Thunk, *, multiplied: bool) -> list[tuple[str, Slice]]:
        """Weights that a thunk reads, by name: to multiply with them, or to look rows up in them.

        The embedding table is multiplied with where it is the output head, whose results have vocab_size columns.
        """
        config = self._config
        found = {part.allocation: self._weights.get(part.allocation) for part in slices(thunk.buffers)}
        scores = any(config.vocab_size in (part.shape or ()) for part in slices(thunk.buffers, written=True))
        return [
            (name, where)
            for name, where in filter(None, found.values())
            if where.shape and len(where.shape) == 2
            if multiplied == (name not in _TABLES or (name == "embed.weight" and config.tied_embeddings and scores))
        ]


def _any_layer(name: str) -> str:
    return re.sub(r"^layers\.\d+", "layers.*", name)


def _runs(thunk: Thunk) -> bool:
    """Whether it is work of its own for the device, not what holds other thunks."""
    return not thunk.children


def slices(arguments: Iterable[Argument], written: bool | None = None) -> Iterable[Slice]:
    """The places in memory among a thunk's arguments; those it writes, or does not, or all."""
    for argument in arguments:
        if argument.slice is not None and written in (None, argument.written):
            yield argument.slice


def _graphs(nodes: Iterable[GraphNode]) -> Iterable[GraphNode]:
    """The CUDA graphs among nodes and what they hold."""
    for node in nodes:
        if node.kind == "command_buffer":
            yield node
        else:
            for children in node.children.values():
                yield from _graphs(children)


def _nodes(children: Mapping[str, tuple[GraphNode, ...]]) -> Iterable[GraphNode]:
    for nodes in children.values():
        for node in nodes:
            yield node
            yield from _nodes(node.children)
