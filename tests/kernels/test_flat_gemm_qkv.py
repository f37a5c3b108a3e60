"""The fused query, key and value product: rotated, and appended to the cache, by the kernel that multiplies."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ptx.chain import Chain

from jaxdecode.aot import CompileError, Job, Program, compile_programs, compiler_installed
from pallas_kernels.flat_gemm import mosaic_gpu, reference
from pallas_kernels.flat_gemm.config import FlatGemmConfig
from pallas_kernels.interpret import interpret_params
from pallas_kernels.norm import Norm
from pallas_kernels.targets import find_target

INTERPRET = interpret_params()
TOLERANCE = {"float16": 2e-3, "bfloat16": 1.2e-2}  # of the largest result
BLOCKS = FlatGemmConfig(num_stages=3, block_k=64)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One decode step's product in front of attention."""

    batch: int = 8
    padding: int = 0  # rows of x beyond the batch
    k: int = 256
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 64
    rotary_dim: int = 64
    max_len: int = 9
    dtype: str = "float16"
    norm: bool = True
    bias: bool = False
    config: FlatGemmConfig | None = BLOCKS

    def shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        rows = (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
        cache = (self.batch, self.num_kv_heads, self.max_len, self.head_dim)
        m = self.batch + self.padding
        shapes = {"x": (m, self.k), "weight": (rows, self.k), "keys": cache, "values": cache}
        if self.norm:
            shapes["norm"] = (self.k,)
        if self.bias:
            shapes["bias"] = (rows,)
        angles = jax.ShapeDtypeStruct((m, self.rotary_dim // 2), jnp.float32)
        return (
            {name: jax.ShapeDtypeStruct(shape, self.dtype) for name, shape in shapes.items()}
            | ({"cos": angles, "sin": angles} if self.rotary_dim else {})
            | {"lengths": jax.ShapeDtypeStruct((self.batch,), jnp.int32)}
        )

    def arrays(self) -> dict[str, jax.Array]:
        random, shapes = np.random.default_rng(0), self.shapes()
        noise = {name: random.standard_normal(of.shape) for name, of in shapes.items()}
        angles = random.standard_normal((self.batch + self.padding, self.rotary_dim // 2))
        special = {
            "weight": noise["weight"] * self.k**-0.5,
            "cos": np.cos(angles),
            "sin": np.sin(angles),
            "lengths": random.permutation(self.batch) % self.max_len,
        }
        return {name: jnp.asarray((noise | special)[name], of.dtype) for name, of in shapes.items()}

    def run(self, arrays: dict[str, jax.Array], launch: mosaic_gpu.Launch) -> tuple[jax.Array, ...]:
        """Query, keys and values."""
        caches = {name: jax.new_ref(arrays[name]) for name in ("keys", "values")}
        rest = {"cos": None, "sin": None} | {name: a for name, a in (arrays | caches).items() if name != "norm"}
        norm = Norm(weight=arrays["norm"]) if self.norm else None
        query = mosaic_gpu.qkv_linear(**rest, norm=norm, launch=launch)
        return query, jax.freeze(caches["keys"]), jax.freeze(caches["values"])

    def expected(self, arrays: dict[str, jax.Array]) -> tuple[np.ndarray, ...]:
        wide = {name: array.astype(jnp.float32) for name, array in arrays.items()}
        x = wide["x"]
        if self.norm:
            x = x / jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6) * wide["norm"]
        y = reference.linear(x, wide["weight"], wide.get("bias"), residual=None, out_dtype=jnp.float32)
        heads = y.reshape(self.batch + self.padding, -1, self.head_dim)
        query, key, value = jnp.split(heads, [self.num_heads, self.num_heads + self.num_kv_heads], axis=1)
        rows = np.arange(self.batch)
        keys = wide["keys"].at[rows, :, arrays["lengths"]].set(self.turned(key, wide)[: self.batch])
        values = wide["values"].at[rows, :, arrays["lengths"]].set(value[: self.batch])
        return self.turned(query, wide), keys, values

    def turned(self, x: jax.Array, wide: dict[str, jax.Array]) -> jax.Array:
        if not self.rotary_dim:
            return x
        half = self.rotary_dim // 2
        first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
        cos, sin = wide["cos"][:, None], wide["sin"][:, None]
        return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)


CASES = {
    "plain": Case(norm=False),
    "bias": Case(bias=True, dtype="bfloat16"),
    "unpadded": Case(batch=3, num_heads=2, num_kv_heads=1),
    "padded": Case(batch=3, padding=5, num_heads=2, num_kv_heads=1, dtype="bfloat16"),
    "not turned": Case(rotary_dim=0, num_heads=2, num_kv_heads=1),
    "two blocks a head": Case(head_dim=128, rotary_dim=128, num_heads=2, num_kv_heads=1),
    "half of a head": Case(head_dim=128, num_heads=2, num_kv_heads=1, dtype="bfloat16"),
    "wide block": Case(
        head_dim=128,
        rotary_dim=128,
        num_heads=1,
        num_kv_heads=1,
        batch=16,
        max_len=20,
        config=dataclasses.replace(BLOCKS, block_n=128),
    ),
    "split": Case(k=512, num_heads=2, num_kv_heads=1, config=dataclasses.replace(BLOCKS, split_k=3), bias=True),
}


def check(found, case: Case, arrays: dict[str, jax.Array]) -> None:
    for one, expected in zip(found, case.expected(arrays), strict=True):
        tolerance = TOLERANCE[case.dtype] * np.abs(expected).max()
        np.testing.assert_allclose(np.asarray(one, np.float32), expected, atol=tolerance, rtol=0)
    untouched = np.arange(case.max_len)[None] != np.asarray(arrays["lengths"])[:, None]
    for name, one in zip(("keys", "values"), found[1:], strict=True):
        before, after = (np.asarray(cache).swapaxes(1, 2)[untouched] for cache in (arrays[name], one))
        np.testing.assert_array_equal(after.view(np.uint16), before.view(np.uint16))


@pytest.mark.parametrize("name", CASES)
def test_interpreted(name):
    case = CASES[name]
    arrays = case.arrays()
    launch = mosaic_gpu.Launch(config=case.config, interpret=INTERPRET)
    check(jax.jit(lambda arrays: case.run(arrays, launch))(arrays), case, arrays)


def build(case: Case, card: str) -> Program:
    launch = mosaic_gpu.Launch(config=case.config, target=find_target(card))
    arrays = case.shapes()
    caches = {name: arrays.pop(name) for name in ("keys", "values")}

    def run(caches, arrays):
        return case.run(caches | arrays, launch)

    return Program(function=run, args=(caches, arrays), jit_options={"donate_argnums": 0})


LLAMA = Case(k=4096, num_heads=32, num_kv_heads=32, head_dim=128, rotary_dim=128, max_len=4096, config=None)
CHATGLM2 = Case(k=4096, num_heads=32, num_kv_heads=2, head_dim=128, bias=True, max_len=4096, config=None)
REAL = {
    f"{name} batch={batch} {card}": Job(
        build=build, target=find_target(card), args=(dataclasses.replace(case, batch=batch), card)
    )
    for card in ("a100-80g-sxm", "rtx-3090", "h100-sxm")
    for batch in (8, 64)
    for name, case in {"llama2": LLAMA, "chatglm2": CHATGLM2}.items()
}


@pytest.fixture(scope="module")
def compiled():
    jobs = {
        name: Job(build=build, target=find_target("a100-80g-sxm"), args=(c, "a100-80g-sxm"))
        for name, c in CASES.items()
    }
    jobs["bias 86"] = Job(build=build, target=find_target("rtx-3090"), args=(CASES["bias"], "rtx-3090"))
    jobs |= REAL
    outcomes = dict(zip(jobs, compile_programs(list(jobs.values())), strict=True))
    assert not (failed := {n: str(o) for n, o in outcomes.items() if isinstance(o, CompileError)}), failed
    return outcomes


needs_compiler = pytest.mark.skipif(not compiler_installed(), reason='needs pip install "jaxdecode[check]"')


@needs_compiler
@pytest.mark.parametrize("name", [*CASES, "bias 86"])
def test_executed_ptx(compiled, name):
    case = CASES[name.removesuffix(" 86")]
    arrays = case.arrays()
    caches = {name: arrays[name] for name in ("keys", "values")}
    rest = {name: array for name, array in arrays.items() if name not in caches}
    inputs = [np.asarray(array) for array in jax.tree.leaves((caches, rest))]
    for seed in (0, 1, 2) if case.config.split_k > 1 else (None,):
        check(Chain(compiled[name], inputs, seed=seed).outputs, case, arrays)


@needs_compiler
@pytest.mark.parametrize("name", REAL)
def test_compiled_for_real_shapes(compiled, name):
    program = compiled[name]
    [kernel] = [kernel for kernel in program.kernels.values() if kernel.kind == "mosaic"]
    report = kernel.report
    assert not (report.spill_store_bytes or report.spill_load_bytes or report.stack_bytes), report
    assert kernel.launch.shared_bytes <= program.target.shared_per_block
    case = REAL[name].args[0]
    cache_bytes = 2 * case.batch * case.num_kv_heads * case.max_len * case.head_dim
    assert program.memory.aliased == 2 * cache_bytes  # the caches stay where they are
    assert program.memory.temporaries < 32 << 20
    assert "mma.sync.aligned.m16n8k16" in kernel.ptx


def test_a_head_that_blocks_do_not_divide_is_named():
    case = Case(head_dim=96, rotary_dim=96)
    with pytest.raises(NotImplementedError, match="multiples of block_n = 64; got 96 and 96"):
        case.run(case.arrays(), mosaic_gpu.Launch(config=case.config, interpret=INTERPRET))
