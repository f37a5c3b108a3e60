"""The fused query, key and value product: normed, rotated, and appended to the cache, by the kernel that multiplies.

Faults that were put into the kernels, and the interpreted cases that turned red:

    norm of a head over half of it                           head norms
    queries' gain for keys                                   head norms
    values turned                                            plain, bias
    padding appended to the cache                            all with padding: race
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import check_kernel, compile_wanted
from needs import needs_compiler
from ptx.chain import Chain
from test_flat_gemm_cases import blocks, close, norm_of

from jaxdecode.aot import Job, Program
from pallas_kernels.flat_gemm import mosaic_gpu, reference
from pallas_kernels.flat_gemm.config import FlatGemmConfig
from pallas_kernels.interpret import interpret_params
from pallas_kernels.norm import Norm
from pallas_kernels.targets import find_target

INTERPRET = interpret_params()
BLOCKS = blocks(block_k=64)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One decode step's product in front of attention.

    Attributes:
      padding: rows of x beyond the batch.
      norm: before the product; see `test_flat_gemm_cases.NORMS`.
      head_norms: which of queries and keys have a norm of their own.
    """

    implementation: str = "flat_gemm"
    batch: int = 8
    padding: int = 0
    k: int = 256
    num_heads: int = 2
    num_kv_heads: int = 1
    head_dim: int = 64
    rotary_dim: int = 64
    max_len: int = 9
    dtype: str = "float16"
    norm: str | None = "rms"
    head_norms: tuple[str, ...] = ()
    bias: bool = False
    config: FlatGemmConfig | None = BLOCKS

    @property
    def m(self) -> int:
        return self.batch + self.padding

    def shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        rows = (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
        cache = (self.batch, self.num_kv_heads, self.max_len, self.head_dim)
        shapes = {"x": (self.m, self.k), "weight": (rows, self.k), "keys": cache, "values": cache}
        shapes |= {"bias": (rows,)} if self.bias else {}
        shapes |= {"gain": (self.k,)} if self.norm else {}
        shapes |= {"shift": (self.k,)} if self.norm == "layer bias" else {}
        shapes |= dict.fromkeys(self.head_norms, (self.head_dim,))
        angles = jax.ShapeDtypeStruct((self.m, self.rotary_dim // 2), jnp.float32)
        return (
            {name: jax.ShapeDtypeStruct(shape, self.dtype) for name, shape in shapes.items()}
            | ({"cos": angles, "sin": angles} if self.rotary_dim else {})
            | {"lengths": jax.ShapeDtypeStruct((self.batch,), jnp.int32)}
        )

    def arrays(self) -> dict[str, jax.Array]:
        random, shapes = np.random.default_rng(0), self.shapes()
        noise = {name: random.standard_normal(of.shape) for name, of in shapes.items()}
        angles = random.standard_normal((self.m, self.rotary_dim // 2))
        special = {
            "weight": noise["weight"] * self.k**-0.5,
            "cos": np.cos(angles),
            "sin": np.sin(angles),
            "lengths": random.permutation(self.batch) % self.max_len,
        }
        special |= {name: 1.0 + 0.2 * noise[name] for name in ("gain", "q_norm", "k_norm") if name in noise}
        return {name: jnp.asarray((noise | special)[name], of.dtype) for name, of in shapes.items()}

    def run(self, arrays: dict[str, jax.Array], **launch) -> tuple[jax.Array, ...]:
        """Query, keys and values."""
        caches = {name: jax.new_ref(arrays[name]) for name in ("keys", "values")}
        query = mosaic_gpu.qkv_linear(
            *(arrays.get(name) for name in ("x", "weight", "bias")),
            **{name: arrays.get(name) for name in ("cos", "sin", "lengths")},
            **caches,
            **self.norms(arrays),
            launch=mosaic_gpu.Launch(implementation=self.implementation, config=self.config, **launch),
        )
        return query, jax.freeze(caches["keys"]), jax.freeze(caches["values"])

    def norms(self, arrays: dict[str, jax.Array]) -> dict[str, Norm | None]:
        heads = {name: Norm(weight=arrays[name]) if name in arrays else None for name in ("q_norm", "k_norm")}
        return {"norm": norm_of(self.norm, arrays), **heads}

    def check(self, found, arrays: dict[str, jax.Array]) -> None:
        wide = {name: array.astype(jnp.float32) for name, array in arrays.items()} | {"lengths": arrays["lengths"]}
        expected = reference.qkv_linear(
            *(wide.get(name) for name in ("x", "weight", "bias")),
            rope=(wide["cos"], wide["sin"]) if self.rotary_dim else None,
            **{name: wide[name] for name in ("keys", "values", "lengths")},
            **self.norms(wide),
        )
        query, *caches = (np.asarray(part, np.float32) for part in found)
        assert query.shape == (self.m, self.num_heads, self.head_dim)
        close(query[: self.batch], np.asarray(expected[0])[: self.batch], self.dtype)
        assert self.implementation == "flat_gemm" or not query[self.batch :].any()
        untouched = np.arange(self.max_len)[None] != np.asarray(arrays["lengths"])[:, None]
        for name, cache, after in zip(("keys", "values"), caches, expected[1:], strict=True):
            close(cache, np.asarray(after), self.dtype)
            before = np.asarray(wide[name]).swapaxes(1, 2)[untouched]
            np.testing.assert_array_equal(cache.swapaxes(1, 2)[untouched], before)


OPTIONS = {
    "plain": {"norm": None, "num_heads": 4, "num_kv_heads": 2},
    "bias": {"bias": True, "dtype": "bfloat16"},
    "not turned": {"rotary_dim": 0, "norm": "layer bias", "bias": True},
    "two blocks a head": {"head_dim": 128, "rotary_dim": 128},
    "half of a head": {"head_dim": 128, "dtype": "bfloat16"},
    "wide block": {"head_dim": 128, "rotary_dim": 128, "num_heads": 1, "config": blocks(block_n=128, block_k=64)},
    "head norms": {"head_norms": ("q_norm", "k_norm"), "bias": True},
    "wide head norms": {
        "head_norms": ("q_norm", "k_norm"),
        "head_dim": 128,
        "rotary_dim": 128,
        "dtype": "bfloat16",
        "config": blocks(block_n=128, block_k=64),
    },
    "query norm": {"head_norms": ("q_norm",), "rotary_dim": 0},
    "split": {"k": 512, "config": blocks(block_k=64, split_k=3), "bias": True},
    "split layer norm": {"k": 512, "config": blocks(block_k=64, split_k=2), "norm": "layer"},
}
ROWS = {"flat_gemm": [(8, 0), (3, 5), (16, 0), (17, 0)], "gemv": [(1, 7), (2, 0), (3, 5), (4, 4)]}
CASES = {
    f"{name} {implementation}": Case(
        implementation=implementation, batch=rows[i % 4][0], padding=rows[i % 4][1], max_len=9 + i, **options
    )
    for implementation, rows in ROWS.items()
    for i, (name, options) in enumerate(OPTIONS.items())
}


@pytest.mark.parametrize("name", CASES)
def test_interpreted(name):
    case = CASES[name]
    arrays = case.arrays()
    case.check(jax.jit(lambda arrays: case.run(arrays, interpret=INTERPRET))(arrays), arrays)


def build(case: Case, card: str) -> Program:
    target = find_target(card)
    arrays = case.shapes()
    caches = {name: arrays.pop(name) for name in ("keys", "values")}
    split = case.config is None or case.config.split_k > 1
    caches["counters"] = jax.ShapeDtypeStruct((1024 if split else 8,), jnp.int32)

    def run(caches, arrays):
        counters = jax.new_ref(caches["counters"])
        found = case.run(caches | arrays, target=target, counters=counters if split else None)
        return *found, jax.freeze(counters)

    return Program(function=run, args=(caches, arrays), jit_options={"donate_argnums": 0})


QWEN3 = Case(
    k=4096, num_heads=32, num_kv_heads=8, head_dim=128, rotary_dim=128, head_norms=("q_norm", "k_norm"),
    dtype="bfloat16", config=None,
)  # fmt: skip
CARDS = {name: "a100-80gb" for name in CASES} | {
    "bias flat_gemm 86": "rtx3090",
    "bias gemv 86": "rtx3090",
    "plain flat_gemm 89": "rtx4090",
    "head norms gemv 89": "rtx4090",
}


def case_of(name: str) -> Case:
    return CASES.get(name) or CASES[name.rpartition(" ")[0]]


@pytest.fixture(scope="module")
def executed(request):
    jobs = {n: Job(build=build, target=find_target(c), args=(case_of(n), c)) for n, c in CARDS.items()}
    return compile_wanted(request, jobs)


@needs_compiler
@pytest.mark.parametrize("name", CARDS)
def test_executed_ptx(executed, name):
    case = case_of(name)
    arrays = case.arrays()
    caches = {name: np.asarray(arrays[name]) for name in ("keys", "values")}
    rest = {name: np.asarray(array) for name, array in arrays.items() if name not in caches}
    caches["counters"] = np.zeros(1024 if case.config.split_k > 1 else 8, np.int32)
    seeds = (0, 1, 2) if case.config.split_k > 1 else (None,)
    found = [Chain(executed[name], jax.tree.leaves((caches, rest)), seed=seed).outputs for seed in seeds]
    case.check(found[0][:3], arrays)
    for other in found[1:]:  # whoever arrives last adds in the same order
        for one, same in zip(other[:3], found[0][:3], strict=True):
            np.testing.assert_array_equal(one.view(np.uint16), same.view(np.uint16))
    check_kernel(executed[name], tensor_cores=case.implementation == "flat_gemm", narrow_copies=True)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (Case(head_dim=96, rotary_dim=96), "multiples of block_n = 64; got 96 and 96: use dense"),
        (
            Case(head_dim=128, rotary_dim=128, head_norms=("q_norm",)),
            "needs block_n = head_dim = rotary_dim; got block_n = 64, head_dim = 128, rotary_dim = 128: use dense",
        ),
        (Case(head_dim=96, rotary_dim=96, config=None), "common divisor 96: use dense"),
        (dataclasses.replace(QWEN3, batch=64, max_len=1), "m = 64 does not fit the 101376 bytes of .*: use dense"),
    ],
    ids=["blocks", "norm", "choice", "card"],
)
def test_a_head_that_blocks_do_not_suit_is_named(case, message):
    with pytest.raises(NotImplementedError, match=message):
        case.run(case.arrays(), target=find_target("a10"), interpret=INTERPRET)


def test_a_cache_with_more_rows_than_x_is_refused():
    arrays = Case().arrays()
    with pytest.raises(ValueError, match="each of the 8 rows of the cache; got 3"):
        Case().run(arrays | {"x": arrays["x"][:3]}, interpret=INTERPRET)
