"""The kernels of a decode step: what each is, what it asks of memory, and what it would take."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from jaxdecode.aot.check.loop import Launches, slices
from jaxdecode.aot.cost import Assumptions, Work, blocks_per_sm, kernel_seconds
from jaxdecode.aot.traffic import attention_traffic, product_traffic
from jaxdecode.config import ModelConfig
from pallas_kernels.flat_gemm.config import FlatGemmConfig
from pallas_kernels.kernel_names import read_kernel_name
from pallas_kernels.targets import Target

_ITEMSIZE = {"f16": 2, "bf16": 2, "f32": 4}
_ROW_TILE = 8  # rows of activations, or query heads, that tensor cores pad to


@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelUse:
    """A kernel of the decode step, with everything known of one launch.

    Attributes:
      name: in profiles.
      kind: "mosaic" is ours; "xla", "triton" and "library" are XLA's.
      op: "gemv", "flat_gemm", "decode_attention", or XLA's name for it.
      weight: whose product it is, with * for the layer; "" if none.
      shape: of that weight [n, k], or of the cache's keys [batch, num_kv_heads, max_len, head_dim].
      launches: a token.
      captured: those of them that are part of a CUDA graph.
      grid, threads: blocks along x, y, z, and threads of a block.
      registers: a thread; None for a library's kernel.
      spill_bytes: of registers, a thread.
      shared_bytes: a block.
      blocks_per_sm: that fit a multiprocessor.
      waves: blocks over those that the card holds at a time.
      in_flight_bytes: that the busiest multiprocessor has asked for and not yet got; None if not known.
      least_bytes: weights, or keys and values that are valid.
      requested_bytes: asked for of those.
      activation_bytes: x or the queries, one reading by each block, mostly answered by the level-2 cache. The warps of
        a gemv each ask for x, which the multiprocessor's own cache answers; some norms read it once more.
      modelled_seconds: of one launch, fewest and most, the gap after it included; they differ for XLA's products.
      modelled_spent_seconds: the fewest, by what they are spent on: see `cost.kernel_seconds`.
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
    in_flight_bytes: int | None
    least_bytes: int
    requested_bytes: int
    activation_bytes: int
    modelled_seconds: tuple[float, float]
    modelled_spent_seconds: Mapping[str, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """A decode step at its end: `context` valid slots in every row."""

    config: ModelConfig
    target: Target
    dtype: str
    batch: int
    context: int
    assumed: Assumptions

    def use(self, launches: Launches) -> KernelUse:
        """Everything about one of its kernels.

        Raises:
          ValueError: the kernel's blocks do not fit the weight it seems to read.
        """
        kernel, sms = launches.kernel, self.target.num_sms
        ours = kernel is not None and kernel.kind == "mosaic"
        op, shape, work = self._work(launches)
        how = {"dtype": self.dtype, "captured": launches.captured == launches.count}
        shares = self.assumed.product_share if launches.matrix and not ours else (1.0, 1.0)
        slow, fast = (kernel_seconds(work, self.target, self.assumed.at(share), **how) for share in shares)
        report, launch = (kernel.report, kernel.launch) if kernel else (None, None)
        return KernelUse(
            name=kernel.name if kernel else launches.thunk.kind,
            kind=kernel.kind if kernel else "library",
            op=op,
            weight=launches.weight,
            shape=shape,
            launches=launches.count,
            captured=launches.captured,
            grid=launch.grid if launch else (0, 0, 0),
            threads=math.prod(launch.block) if launch else 0,
            registers=report.registers if report else None,
            spill_bytes=report.spill_store_bytes + report.spill_load_bytes if report else 0,
            shared_bytes=launch.shared_bytes + report.shared_bytes if launch and report else 0,
            blocks_per_sm=work.blocks_per_sm if report else None,
            waves=work.blocks / (work.blocks_per_sm * sms) if report else None,
            in_flight_bytes=work.in_flight * min(work.blocks_per_sm, -(-work.blocks // sms)) if ours else None,
            least_bytes=work.least,
            requested_bytes=work.requested,
            activation_bytes=work.activations,
            modelled_seconds=(sum(fast.values()), sum(slow.values())),
            modelled_spent_seconds=fast,
        )

    def _work(self, launches: Launches) -> tuple[str, tuple[int, ...], Work]:
        if launches.kernel is None or launches.kernel.kind != "mosaic":
            return self._others_work(launches)
        op, blocks = read_kernel_name(launches.kernel.name)
        if op == "decode_attention":
            return self._attention_work(launches, blocks)
        return op, *self._product_work(launches, op, blocks)

    def _product_work(self, launches: Launches, op: str, blocks: Mapping[str, int]) -> tuple[tuple[int, ...], Work]:
        """A product x [m, k] · weight [n, k]ᵀ; a grid of blocks along n and splits of k."""
        kernel, weight = launches.kernel, launches.matrix
        n, k = weight.shape if weight and weight.shape else (0, 0)
        assert kernel is not None
        along_n, split_k, _ = kernel.launch.grid
        if weight is None or not n <= along_n * blocks["n"] < n + 2 * blocks["n"]:
            raise ValueError(f"{kernel.name} with {along_n} blocks seems to read a weight of {n} rows, which cannot be")
        tiles = FlatGemmConfig(block_n=blocks["n"], block_k=blocks["k"])
        rows = self.batch if op == "gemv" else tiles.pad_m(-(-self.batch // _ROW_TILE) * _ROW_TILE)
        itemsize, multiplied = _ITEMSIZE[weight.dtype], along_n * blocks["n"] * k
        sizes: dict[str, int] = {"n": n, "k": k, "itemsize": itemsize}
        traffic = product_traffic(blocks=along_n, block_rows=blocks["n"], rows_of_x=rows, **sizes)
        return (n, k), Work(
            blocks=along_n * split_k,
            blocks_per_sm=blocks_per_sm(kernel, self.target),
            in_flight=(blocks["stages"] - 1) * blocks["n"] * blocks["k"] * itemsize,
            tensor_operations=2 * multiplied * rows if op != "gemv" else 0,
            # a weight is unpacked, converted, and multiplied with each row
            instructions=multiplied * (2 + rows) if op == "gemv" else 0,
            split=split_k > 1,
            **dataclasses.asdict(traffic),
        )

    def _attention_work(self, launches: Launches, blocks: Mapping[str, int]) -> tuple[str, tuple[int, ...], Work]:
        """One block for a split of the slots of a row's KV head; a grid of splits, KV heads and rows."""
        config, kernel = self.config, launches.kernel
        # among the buffers: from sm_90 on the kernel's own parameters are descriptors
        keys = next(buffer.slice for buffer in launches.thunk.buffers if buffer.name == "operand_1")
        assert kernel is not None and keys is not None
        itemsize = _ITEMSIZE[keys.dtype]
        traffic, busy = attention_traffic(
            [self.context] * self.batch,
            block_kv=blocks["kv"],
            split_kv=kernel.launch.grid[0],
            num_kv_heads=config.num_kv_heads,
            num_heads=config.num_heads,
            head_dim=config.head_dim,
            itemsize=itemsize,
            window=launches.window,
        )
        queries = -(-config.num_heads // config.num_kv_heads // _ROW_TILE) * _ROW_TILE
        work = Work(
            blocks=busy,
            blocks_per_sm=blocks_per_sm(kernel, self.target),
            in_flight=(blocks["stages"] - 1) * 2 * blocks["kv"] * config.head_dim * itemsize,
            tensor_operations=2 * traffic.requested / itemsize * queries,
            split=busy > self.batch * config.num_kv_heads,
            **dataclasses.asdict(traffic),
        )
        return "decode_attention", keys.shape or (), work

    def _others_work(self, launches: Launches) -> tuple[str, tuple[int, ...], Work]:
        """One of XLA's: an ideal product, or an ideal loop over its results that reads as much as it writes."""
        kernel, buffers, weight = launches.kernel, launches.thunk.buffers, launches.matrix
        written = sum(part.size for part in slices(buffers, written=True))
        read = sum(part.size for part in slices(buffers, written=False)) - launches.table_bytes
        least, shape = launches.product_bytes, weight.shape if weight and weight.shape else ()
        picks = not weight and any(word in launches.thunk.name for word in ("loop_", "gather", "dynamic"))
        blocks = math.prod(kernel.launch.grid) if kernel else self.target.num_sms
        sizes: dict[str, Any] = {"least": least, "requested": least}
        work = Work(
            blocks=blocks,
            blocks_per_sm=max(1, blocks_per_sm(kernel, self.target)) if kernel and kernel.report else 1,
            in_flight=max(1, (read + written) // blocks),
            activations=(min(read, written) if picks else read - least) + written,
            tensor_operations=2 * self.batch * least / _ITEMSIZE[weight.dtype] if weight else 0,
            **sizes,
        )
        return launches.thunk.name or launches.thunk.kind, shape, work
