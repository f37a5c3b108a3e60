"""What a product of a decode step is tested with: its operands, what it should give, and how it is compiled."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import tolerance

from jaxdecode.aot import Program
from pallas_kernels.flat_gemm import mosaic_gpu, reference
from pallas_kernels.flat_gemm.config import FlatGemmConfig
from pallas_kernels.norm import Norm
from pallas_kernels.targets import find_target

BLOCKS = FlatGemmConfig(num_stages=3)
NORMS = ("rms", "layer", "layer bias")


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
    offset = 0.7 if kind.endswith("offset") else 0.0
    return Norm(weight=arrays["gain"], bias=arrays.get("shift"), centered=kind.startswith("layer"), offset=offset)


def close(found, expected: np.ndarray, dtype: str) -> None:
    found = np.asarray(found, np.float32)
    np.testing.assert_allclose(found, expected, atol=tolerance.PRODUCT[dtype] * np.abs(expected).max(), rtol=0)


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
