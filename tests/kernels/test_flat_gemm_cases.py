"""What a product of a decode step is tested with: its operands, what it should give, and how it is compiled."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdecode.aot import CompileError, Job, Program, compile_programs, compiler_installed
from pallas_kernels.flat_gemm import mosaic_gpu, reference
from pallas_kernels.flat_gemm.config import FlatGemmConfig
from pallas_kernels.norm import Norm
from pallas_kernels.targets import find_target

TOLERANCE = {"float16": 2e-3, "bfloat16": 1.2e-2}  # of the largest result
BLOCKS = FlatGemmConfig(num_stages=3)
NORMS = ("rms", "layer", "layer bias")

needs_compiler = pytest.mark.skipif(not compiler_installed(), reason='needs pip install "jaxdecode[check]"')


def blocks(**changes) -> FlatGemmConfig:
    return dataclasses.replace(BLOCKS, **changes)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A product; m, n, k as of the result, so a gated weight has 2 * n rows.

    Attributes:
      padding: rows of x beyond m.
      norm: one of NORMS, or None.
      size, mean: of x.
    """

    implementation: str = "flat_gemm"
    m: int = 8
    padding: int = 0
    n: int = 64
    k: int = 512
    dtype: str = "float16"
    norm: str | None = None
    bias: bool = False
    residual: bool = False
    activation: str | None = None
    gated: bool = False
    size: float = 1.0
    mean: float = 0.0
    config: FlatGemmConfig | None = BLOCKS

    def shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        rows, m = self.n * (2 if self.gated else 1), self.m + self.padding
        shapes = {"x": (m, self.k), "weight": (rows, self.k)}
        if self.bias:
            shapes["bias"] = (rows,)
        if self.residual:
            shapes["residual"] = (m, self.n)
        return {name: jax.ShapeDtypeStruct(of, self.dtype) for name, of in (shapes | self.norm_shapes()).items()}

    def norm_shapes(self) -> dict[str, tuple[int, ...]]:
        names = () if self.norm is None else ("gain", "shift") if self.norm == "layer bias" else ("gain",)
        return dict.fromkeys(names, (self.k,))

    def arrays(self) -> dict[str, jax.Array]:
        random = np.random.default_rng(0)
        scale, mean = {"x": self.size, "weight": self.k**-0.5, "gain": 0.2}, {"gain": 1.0, "x": self.mean}
        return {
            name: jnp.asarray(mean.get(name, 0.0) + scale.get(name, 1.0) * random.standard_normal(of.shape), of.dtype)
            for name, of in self.shapes().items()
        }

    def run(self, arrays: dict[str, jax.Array], **launch) -> jax.Array:
        function = mosaic_gpu.gated_linear if self.gated else mosaic_gpu.linear
        operands = {name: array for name, array in arrays.items() if name not in ("gain", "shift")}
        return function(
            **operands,
            **({"activation": self.activation} if self.activation else {}),
            norm=norm_of(self.norm, arrays),
            valid_m=self.m,
            launch=mosaic_gpu.Launch(implementation=self.implementation, config=self.config, **launch),
        )

    def expected(self, arrays: dict[str, jax.Array]) -> np.ndarray:
        """Of the rows that are not padding, in float32."""
        wide = {name: array.astype(jnp.float32) for name, array in arrays.items()}
        operands = [wide.get(name) for name in ("x", "weight", "bias")]
        options = {"norm": norm_of(self.norm, wide), "out_dtype": jnp.float32}
        if self.gated:
            y = reference.gate(reference.linear(*operands, **options), self.activation or "silu")
        else:
            options |= {"activation": self.activation, "residual": wide.get("residual")}
            y = reference.linear(*operands, **options)
        return np.asarray(y)[: self.m]

    def check(self, found, arrays: dict[str, jax.Array]) -> None:
        assert found.shape == (self.m + self.padding, self.n) and found.dtype == self.dtype
        found = np.asarray(found, np.float32)
        close(found[: self.m], self.expected(arrays), self.dtype)
        if self.implementation == "gemv":
            assert not found[self.m :].any()


def norm_of(kind: str | None, arrays: dict[str, jax.Array]) -> Norm | None:
    if kind is None:
        return None
    return Norm(weight=arrays["gain"], bias=arrays.get("shift"), centered=kind.startswith("layer"))


def close(found, expected: np.ndarray, dtype: str) -> None:
    found = np.asarray(found, np.float32)
    np.testing.assert_allclose(found, expected, atol=TOLERANCE[dtype] * np.abs(expected).max(), rtol=0)


def build(case: Case, card: str) -> Program:
    """The product alone; its counters, if k may be split, are an operand and a result."""
    target = find_target(card)
    if case.config is not None and case.config.split_k == 1:
        return Program(function=lambda arrays: case.run(arrays, target=target), args=(case.shapes(),))

    def run(counters, arrays):
        ref = jax.new_ref(counters)
        return case.run(arrays, target=target, counters=ref), jax.freeze(ref)

    counters = jax.ShapeDtypeStruct((1024,), jnp.int32)
    return Program(function=run, args=(counters, case.shapes()), jit_options={"donate_argnums": 0})


def compile_all(jobs: dict[str, Job]) -> dict:
    outcomes = dict(zip(jobs, compile_programs(list(jobs.values())), strict=True))
    assert not (failed := {n: str(o) for n, o in outcomes.items() if isinstance(o, CompileError)}), failed
    return outcomes


def check_compiled(program, *, tensor_cores: bool) -> None:
    """One kernel; nothing in local memory; the weights come asynchronously, 16 bytes at a time."""
    [kernel] = [kernel for kernel in program.kernels.values() if kernel.kind == "mosaic"]
    report = kernel.report
    assert not (report.spill_store_bytes or report.spill_load_bytes or report.stack_bytes), report
    assert "ld.local" not in kernel.ptx and "st.local" not in kernel.ptx
    assert kernel.launch.shared_bytes <= program.target.shared_per_block
    assert ("mma.sync.aligned.m16n8k16" in kernel.ptx) == tensor_cores
    assert tensor_cores or not ("mma.sync" in kernel.ptx or "wgmma" in kernel.ptx)
    tma = program.target.compute_capability >= (9, 0)
    assert ("cp.async.bulk.tensor" if tma else "cp.async.cg.shared.global") in kernel.ptx
