"""Reads a compiled `generate`: its decode loop, what each kernel in it is, and what it does to the hardware."""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Iterable, Mapping

from jaxdecode.aot.cost import Assumptions, Work, blocks_per_sm, kernel_seconds
from jaxdecode.aot.inspection import find_faults
from jaxdecode.aot.program import Argument, CompiledProgram, GraphNode, Kernel, Slice, Thunk, walk
from jaxdecode.aot.traffic import Traffic, attention_traffic, product_traffic
from jaxdecode.config import ModelConfig
from pallas_kernels.kernel_names import read_kernel_name

_ITEMSIZE = {"f16": 2, "bf16": 2, "f32": 4}
_LARGE_COPY = 1 << 20  # bytes, of whatever
_MOST_BYTES = 1.02  # times the least that a product may ask for
_ROW_TILE = 8  # rows of activations, or query heads, that tensor cores pad to


@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelUse:
    """A kernel of the decode step, with everything known of one launch; bytes are those of one launch.

    Attributes:
      name: in profiles.
      kind: "mosaic" is ours; "xla", "triton" and "library" are XLA's.
      op: "gemv", "flat_gemm", "decode_attention", or XLA's name for it.
      weight: whose product it is, with * for the layer; "" if none.
      shape: of that weight [n, k], or of the cache's keys [batch, num_kv_heads, max_len, head_dim].
      launches: a token.
      captured: those of them that are part of a CUDA graph.
      registers: a thread; None for a library's kernel.
      spill_bytes: of registers, a thread.
      shared_bytes: a block.
      blocks_per_sm: that fit a multiprocessor.
      waves: blocks over those that the card holds at a time.
      in_flight: bytes that a multiprocessor has asked for and not yet got; None if not known.
      least_bytes: weights, or keys and values that are valid.
      requested_bytes: asked for of those, bytes that two blocks ask for counted twice.
      activation_bytes: asked for of activations, mostly of the level-2 cache.
      modelled_seconds: of one launch, fewest and most, the gap after it included; they differ for XLA's products.
      spent: the fewest, by what they are spent on: see `cost.kernel_seconds`.
    """

    name: str
    kind: str
    op: str
    weight: str
    shape: tuple[int, ...]
    launches: int
    captured: int
    grid: tuple[int, int, int]
    threads: int
    registers: int | None
    spill_bytes: int
    shared_bytes: int
    blocks_per_sm: int | None
    waves: float | None
    in_flight: int | None
    least_bytes: int
    requested_bytes: int
    activation_bytes: int
    modelled_seconds: tuple[float, float]
    spent: Mapping[str, float]


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
class _Launch:
    thunk: Thunk
    kernel: Kernel | None
    weight: str
    window: int | None


class DecodeLoop:
    """The decode loop of a compiled `generate`.

    Args:
      weights: the name of each parameter among the program's arguments: see `program.weight_names`.
      context: valid slots of every row's cache.
    """

    def __init__(
        self, program: CompiledProgram, config: ModelConfig, weights: list[str], *, batch: int, context: int
    ) -> None:
        self._program, self._config, self._batch, self._context = program, config, batch, context
        loops = [thunk for thunk in program.thunks if thunk.kind == "while"]
        self._passes, self._loop = loops[:-1], loops[-1]
        self._weights = {
            parameter.slice.allocation: (weights[parameter.index], parameter.slice)
            for parameter in program.parameters
            if parameter.index < len(weights)
        }
        [self._node] = [node for node in program.graphs if node.id == self._loop.id]
        self._captured = {node.id for graph in _graphs(self._node) for node in _nodes(graph.children)}

    def facts(self, chunks: Iterable[int]) -> ProgramFacts:
        """`chunks`: tokens a row of each prefill loop, in the order in which they run."""
        body = list(walk(self._loop.children["body"]))
        launched, kinds = [thunk for thunk in body if _runs(thunk)], [thunk.kind for thunk in body]
        ours = [thunk for thunk in launched if thunk.kernel and self._program.kernels[thunk.kernel].kind == "mosaic"]
        in_layers = [thunk for thunk in ours if not self._weight(thunk)[0] or self._layer(thunk) is not None]
        return ProgramFacts(
            kernels_per_token=len(launched),
            kernels_per_layer=len(in_layers) / self._config.num_layers,
            captured=sum(thunk.id in self._captured for thunk in launched),
            graphs=len(list(_graphs(self._node))),
            round_trips=1 + kinds.count("while") + kinds.count("conditional"),
            inner_loops=kinds.count("while"),
            prefill_kernels={
                chunk: sum(map(_runs, walk(loop.children["body"])))
                for chunk, loop in zip(chunks, self._passes, strict=True)
            },
        )

    def faults(self, uses: Iterable[KernelUse]) -> Iterable[str]:
        """What is wrong with the whole program's kernels of ours, and with the loop; nothing if all is well."""
        for kernel in self._program.kernels.values():
            if kernel.kind == "mosaic":
                yield from (f"{kernel.name} {fault}" for fault in find_faults(kernel, self._program.target))
        for use in uses:
            if use.weight and use.requested_bytes > _MOST_BYTES * use.least_bytes:
                yield f"{use.name} asks for {use.requested_bytes / use.least_bytes:.3f} times the bytes there are"
        for name, size in self._copies():
            yield f"{name} copies {size:,} bytes of weights or caches a token"

    def uses(self, assumed: Assumptions) -> list[KernelUse]:
        """Its kernels, each with the number of its launches, in order of first use."""
        groups: dict[tuple, list[_Launch]] = {}
        attentions = 0
        for thunk in walk(self._loop.children["body"]):
            if not _runs(thunk):
                continue
            kernel = self._program.kernels[thunk.kernel] if thunk.kernel else None
            weight, window = re.sub(r"^layers\.\d+", "layers.*", self._weight(thunk)[0]), None
            if kernel and kernel.name.startswith("decode_attention"):  # one a layer, in order
                window, attentions = self._config.window(attentions), attentions + 1
            launch = _Launch(thunk=thunk, kernel=kernel, weight=weight, window=window)
            groups.setdefault((thunk.kernel or thunk.kind, weight, window), []).append(launch)
        return [self._use(launches, assumed) for launches in groups.values()]

    def _use(self, launches: list[_Launch], assumed: Assumptions) -> KernelUse:
        thunk, kernel = launches[0].thunk, launches[0].kernel
        op, shape, work = self._work(launches[0])
        captured = sum(launch.thunk.id in self._captured for launch in launches)
        is_xlas_product = len(shape) == 2 and work.least and (kernel is None or kernel.kind != "mosaic")
        shares = assumed.product_share if is_xlas_product else (1.0, 1.0)
        slow, spent = (
            kernel_seconds(work, self._program.target, assumed.at(share), captured=captured == len(launches))
            for share in shares
        )
        report, launch = (kernel.report, kernel.launch) if kernel else (None, None)
        known = kernel is not None and report is not None
        return KernelUse(
            name=kernel.name if kernel else thunk.kind,
            kind=kernel.kind if kernel else "library",
            op=op,
            weight=launches[0].weight,
            shape=shape,
            launches=len(launches),
            captured=captured,
            grid=launch.grid if launch else (0, 0, 0),
            threads=math.prod(launch.block) if launch else 0,
            registers=report.registers if report else None,
            spill_bytes=report.spill_store_bytes + report.spill_load_bytes if report else 0,
            shared_bytes=launch.shared_bytes + report.shared_bytes if launch and report else 0,
            blocks_per_sm=work.blocks_per_sm if known else None,
            waves=work.blocks / (work.blocks_per_sm * self._program.target.num_sms) if known else None,
            in_flight=work.in_flight * work.blocks_per_sm if kernel and kernel.kind == "mosaic" else None,
            least_bytes=work.least,
            requested_bytes=work.requested,
            activation_bytes=work.activations,
            modelled_seconds=(sum(spent.values()), sum(slow.values())),
            spent=spent,
        )

    def _work(self, launch: _Launch) -> tuple[str, tuple[int, ...], Work]:
        if launch.kernel is None or launch.kernel.kind != "mosaic":
            return self._others_work(launch)
        op, blocks = read_kernel_name(launch.kernel.name)
        if op == "decode_attention":
            return self._attention_work(launch, blocks)
        return op, *self._product_work(launch, op, blocks)

    def _product_work(self, launch: _Launch, op: str, blocks: Mapping[str, int]) -> tuple[tuple[int, ...], Work]:
        """A product x [m, k] · weight [n, k]ᵀ; a grid of blocks along n and splits of k."""
        assert launch.kernel is not None
        _, weight = self._weight(launch.thunk)
        n, k = weight.shape or (0, 0)
        along_n, split_k, _ = launch.kernel.launch.grid
        rows = self._batch if op == "gemv" else -(-self._batch // _ROW_TILE) * _ROW_TILE
        itemsize = _ITEMSIZE[weight.dtype]
        sizes = {"n": n, "k": k, "itemsize": itemsize}
        traffic = product_traffic(blocks=along_n, block_rows=blocks["n"], rows_of_x=rows, **sizes)
        multiplied = along_n * blocks["n"] * k
        return (n, k), Work(
            blocks=along_n * split_k,
            blocks_per_sm=blocks_per_sm(launch.kernel, self._program.target),
            in_flight=(blocks["stages"] - 1) * blocks["n"] * blocks["k"] * itemsize,
            tensor_operations=2 * multiplied * rows if op != "gemv" else 0,
            # a weight is unpacked, converted, and multiplied with each row
            instructions=multiplied * (2 + rows) if op == "gemv" else 0,
            split=split_k > 1,
            **_bytes(traffic),
        )

    def _attention_work(self, launch: _Launch, blocks: Mapping[str, int]) -> tuple[str, tuple[int, ...], Work]:
        """One block for a split of the slots of a row's KV head; a grid of splits, KV heads and rows."""
        assert launch.kernel is not None
        config, keys = self._config, launch.thunk.argument("operand_1")
        split_kv, itemsize = launch.kernel.launch.grid[0], _ITEMSIZE[keys.dtype]
        traffic, busy = attention_traffic(
            [self._context] * self._batch,
            block_kv=blocks["kv"],
            split_kv=split_kv,
            num_kv_heads=config.num_kv_heads,
            num_heads=config.num_heads,
            head_dim=config.head_dim,
            itemsize=itemsize,
            window=launch.window,
        )
        step = 2 * blocks["kv"] * config.head_dim * itemsize
        queries = -(-config.num_heads // config.num_kv_heads // _ROW_TILE) * _ROW_TILE
        work = Work(
            blocks=busy,
            blocks_per_sm=blocks_per_sm(launch.kernel, self._program.target),
            in_flight=(blocks["stages"] - 1) * step,
            tensor_operations=2 * traffic.requested / itemsize * queries,
            split=busy > self._batch * config.num_kv_heads,
            **_bytes(traffic),
        )
        return "decode_attention", keys.shape or (), work

    def _others_work(self, launch: _Launch) -> tuple[str, tuple[int, ...], Work]:
        """One of XLA's: an ideal kernel over its arguments; a loop over its results reads as much as it writes."""
        target, kernel = self._program.target, launch.kernel
        _, weight = self._weight(launch.thunk)
        written = sum(part.size for part in _slices(launch.thunk.buffers, written=True))
        picks = any(word in launch.thunk.name for word in ("loop_", "gather", "dynamic"))
        least = 0 if picks else weight.size
        read = sum(part.size for part in _slices(launch.thunk.buffers, written=False))
        others = min(read - least, written) if picks else read - least
        resident = blocks_per_sm(kernel, target) if kernel and kernel.report else 1
        blocks = math.prod(kernel.launch.grid) if kernel else target.num_sms
        return (
            launch.thunk.name,
            weight.shape or (),
            Work(
                blocks=blocks,
                blocks_per_sm=max(1, resident),
                in_flight=max(1, (least + others + written) // blocks),
                least=least,
                requested=least,
                activations=others + written,
            ),
        )

    def _weight(self, thunk: Thunk) -> tuple[str, Slice]:
        """The largest parameter that a thunk reads, and its name."""
        found = [self._weights[part.allocation] for part in _slices(thunk.buffers) if part.allocation in self._weights]
        return max(found, key=lambda pair: pair[1].size, default=("", Slice(allocation=-1, offset=0, size=0)))

    def _layer(self, thunk: Thunk) -> int | None:
        layer = re.match(r"layers\.(\d+)\.", self._weight(thunk)[0])
        return int(layer.group(1)) if layer else None

    def _copies(self) -> Iterable[tuple[str, int]]:
        """What is not ours and writes, not in place, an array shaped like a weight matrix or a layer's keys."""
        config, slots = self._config, -(-self._context // 32) * 32
        keys: tuple[int, ...] = (self._batch, config.num_kv_heads, slots, config.head_dim)
        shapes = {keys, *(part.shape for _, part in self._weights.values() if part.shape and len(part.shape) == 2)}
        for thunk in walk(self._loop.children["body"]):
            if thunk.kernel and self._program.kernels[thunk.kernel].kind == "mosaic":
                continue
            places = collections.Counter((part.allocation, part.offset) for part in _slices(thunk.buffers))
            for part in _slices(thunk.buffers, written=True):
                large = thunk.kind == "device_to_device_copy" and part.size >= _LARGE_COPY
                if (part.shape in shapes or large) and places[part.allocation, part.offset] == 1:
                    yield thunk.name or thunk.kind, part.size


def _runs(thunk: Thunk) -> bool:
    """Whether it is work of its own for the device, not what holds other thunks."""
    return not thunk.children


def _bytes(traffic: Traffic) -> dict[str, int]:
    return dataclasses.asdict(traffic)


def _slices(arguments: Iterable[Argument], written: bool | None = None) -> Iterable[Slice]:
    for argument in arguments:
        if argument.slice is not None and written in (None, argument.written):
            yield argument.slice


def _graphs(loop: GraphNode) -> Iterable[GraphNode]:
    """The CUDA graphs of a loop's body."""
    for node in loop.children["body"]:
        if node.kind == "command_buffer":
            yield node
        elif node.kind == "sequential":
            yield from _graphs(dataclasses.replace(node, children={"body": node.children["thunks"]}))


def _nodes(children: Mapping[str, tuple[GraphNode, ...]]) -> Iterable[GraphNode]:
    for nodes in children.values():
        for node in nodes:
            yield node
            yield from _nodes(node.children)
