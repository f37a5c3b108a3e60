"""The flat GEMM kernel against its definition: interpreted as Hopper runs it, and its PTX for older cards executed.

Faults that were put into the kernel, and what turned red:

    wait for one copy less (`plan.copies * newer + 1`)       test_executed_ptx: "in-flight"
    copy into the wrong slot (`i + ahead + 1`)               test_executed_ptx: "in-flight"; test_interpreted: race
    no barrier in `arrive` before the count is read          test_executed_ptx[split]: "race"
    `relaxed` instead of `acq_rel` in `arrive`                test_executed_ptx[split]: "race"
    the first split one step short                           test_executed_ptx[split]; test_interpreted[split norm]
    counters not reset                                       test_products_share_counters_and_leave_them_at_zero
    mean of squares over a step instead of k                 test_executed_ptx[norm]; test_interpreted[norm]
    gate without up                                          test_interpreted[gated]
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ptx.chain import Chain

from jaxdecode.aot import CompileError, Job, Program, compile_programs, compiler_installed
from pallas_kernels.flat_gemm import mosaic_gpu, reference
from pallas_kernels.flat_gemm.config import FlatGemmConfig, choose_config
from pallas_kernels.interpret import interpret_params
from pallas_kernels.norm import Norm
from pallas_kernels.targets import TARGETS, find_target

INTERPRET = interpret_params()
TOLERANCE = {"float16": 2e-3, "bfloat16": 1.2e-2}  # of the largest result
BLOCKS = FlatGemmConfig(num_stages=3)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A product; m, n, k as of the result, so a gated weight has 2 * n rows."""

    m: int = 8
    n: int = 64
    k: int = 512
    dtype: str = "float16"
    norm: bool = False
    bias: bool = False
    residual: bool = False
    activation: str | None = None
    gated: bool = False
    size: float = 1.0  # of x
    config: FlatGemmConfig | None = BLOCKS

    def shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        rows = self.n * (2 if self.gated else 1)
        shapes = {"x": (self.m, self.k), "weight": (rows, self.k)}
        if self.bias:
            shapes["bias"] = (rows,)
        if self.residual:
            shapes["residual"] = (self.m, self.n)
        if self.norm:
            shapes["norm"] = (self.k,)
        return {name: jax.ShapeDtypeStruct(shape, self.dtype) for name, shape in shapes.items()}

    def arrays(self) -> dict[str, jax.Array]:
        random = np.random.default_rng(0)
        scale, mean = {"x": self.size, "weight": self.k**-0.5, "norm": 0.2}, {"norm": 1.0}
        return {
            name: jnp.asarray(mean.get(name, 0.0) + scale.get(name, 1.0) * random.standard_normal(of.shape), of.dtype)
            for name, of in self.shapes().items()
        }

    def run(self, arrays: dict[str, jax.Array], launch: mosaic_gpu.Launch) -> jax.Array:
        function = mosaic_gpu.gated_linear if self.gated else mosaic_gpu.linear
        if self.norm:
            arrays = arrays | {"norm": Norm(weight=arrays["norm"])}
        return function(**arrays, **({"activation": self.activation} if self.activation else {}), launch=launch)

    def expected(self, arrays: dict[str, jax.Array]) -> np.ndarray:
        wide = {name: array.astype(jnp.float32) for name, array in arrays.items()}
        x = wide["x"]
        if self.norm:
            x = x / jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6) * wide["norm"]
        y = reference.linear(x, wide["weight"], wide.get("bias"), residual=None, out_dtype=jnp.float32)
        if self.gated:
            y = reference.gate(y, self.activation or "silu")
        elif self.activation:
            y = reference.ACTIVATIONS[self.activation](y)
        return np.asarray(y + wide.get("residual", 0.0))


def check(found, expected: np.ndarray, dtype: str) -> None:
    found = np.asarray(found, np.float32)
    np.testing.assert_allclose(found, expected, atol=TOLERANCE[dtype] * np.abs(expected).max(), rtol=0)


OPTIONS = {
    "plain": {},
    "bias": {"bias": True, "activation": "relu"},
    "residual": {"residual": True, "n": 96, "config": dataclasses.replace(BLOCKS, block_n=32, block_k=64)},
    "gelu": {"bias": True, "activation": "gelu"},
    "gelu_tanh": {"activation": "gelu_tanh", "residual": True},
    "norm": {"norm": True, "k": 192, "config": dataclasses.replace(BLOCKS, block_k=64)},
    "gated": {"gated": True, "bias": True, "norm": True, "k": 160, "config": dataclasses.replace(BLOCKS, block_k=32)},
    "split": {"k": 640, "config": dataclasses.replace(BLOCKS, split_k=2), "residual": True},
    "split norm": {"k": 640, "config": dataclasses.replace(BLOCKS, block_k=64, split_k=4), "norm": True, "n": 128},
}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("m", [1, 9, 40])
@pytest.mark.parametrize("options", OPTIONS)
def test_interpreted(options, m, dtype):
    case = Case(m=m, dtype=dtype, **OPTIONS[options])
    arrays = case.arrays()
    found = case.run(arrays, mosaic_gpu.Launch(config=case.config, interpret=INTERPRET))
    assert found.shape == (m, case.n) and found.dtype == dtype
    check(found, case.expected(arrays), dtype)


@pytest.mark.parametrize("m", [8, 64])
@pytest.mark.parametrize("size", [1e-3, 3e3])
def test_a_norm_bears_small_and_large_activations(m, size):
    """x times the gain alone would leave float16, and its squares do so by far."""
    case = Case(m=m, norm=True, size=size)
    arrays = case.arrays() | {"norm": jnp.full(case.k, 60.0, case.dtype)}
    found = case.run(arrays, mosaic_gpu.Launch(config=case.config, interpret=INTERPRET))
    check(found, case.expected(arrays), case.dtype)


EXECUTED = {
    "plain": Case(n=128, k=512, config=FlatGemmConfig(num_stages=4)),
    "bfloat16": Case(m=16, dtype="bfloat16", bias=True, activation="gelu"),
    "one step": Case(k=128, config=FlatGemmConfig(num_stages=2), bias=True, activation="relu"),
    "unpadded": Case(m=3, residual=True, activation="gelu_tanh"),
    "narrow": Case(m=16, n=96, k=320, residual=True, config=OPTIONS["residual"]["config"]),
    "narrow bias": Case(m=5, n=32, k=96, bias=True, config=FlatGemmConfig(num_stages=4, block_n=32, block_k=32)),
    "norm": Case(norm=True, k=640),
    "norm wide": Case(m=64, n=128, norm=True, dtype="bfloat16", config=FlatGemmConfig(block_n=128, num_stages=2)),
    "gated": Case(gated=True, norm=True, dtype="bfloat16"),
    "gated gelu": Case(m=40, n=96, gated=True, activation="gelu", bias=True),
    "split": Case(n=128, k=896, residual=True, config=dataclasses.replace(BLOCKS, split_k=3)),
    "split norm": Case(m=16, k=640, norm=True, config=dataclasses.replace(BLOCKS, block_k=64, split_k=4)),
    "split gated": Case(k=512, gated=True, norm=True, config=dataclasses.replace(BLOCKS, split_k=2), dtype="bfloat16"),
}
CARDS = {name: "a100-80g-sxm" for name in EXECUTED} | {
    "plain 86": "rtx-3090",
    "gated 86": "rtx-3090",
    "split norm 86": "rtx-3090",
    "norm 89": "rtx-4090",
    "split 89": "rtx-4090",
}
REAL = {  # of Llama2-7B: attention output, gate and up, down; and its vocabulary
    f"{name} m={m} {card}": (case, m, card)
    for card in ("a100-80g-sxm", "rtx-3090", "h100-sxm")
    for m in (8, 64)
    for name, case in {
        "out": Case(n=4096, k=4096, residual=True, config=None),
        "gate_up": Case(n=11008, k=4096, norm=True, gated=True, config=None),
        "down": Case(n=4096, k=11008, residual=True, dtype="bfloat16", config=None),
        "logits": Case(n=32000, k=4096, norm=True, config=None),
    }.items()
}


def build(case: Case, card: str) -> Program:
    launch = mosaic_gpu.Launch(config=case.config, target=find_target(card))
    return Program(function=lambda arrays: case.run(arrays, launch), args=(case.shapes(),))


def build_chain(case: Case, card: str) -> Program:
    """Two products that count with the same counters, which are kept."""

    def run(counters, arrays):
        ref = jax.new_ref(counters)
        launch = mosaic_gpu.Launch(config=case.config, target=find_target(card), counters=ref)
        first = case.run(arrays, launch)
        second = case.run(arrays | {"residual": first}, launch)
        return second, jax.freeze(ref)

    counters = jax.ShapeDtypeStruct((case.n // case.config.block_n + 1,), jnp.int32)
    return Program(function=run, args=(counters, case.shapes()), jit_options={"donate_argnums": 0})


def case_of(name: str) -> Case:
    return EXECUTED.get(name) or EXECUTED[name.rpartition(" ")[0]]


def compile_all(jobs: dict[str, Job]) -> dict:
    outcomes = dict(zip(jobs, compile_programs(list(jobs.values())), strict=True))
    assert not (failed := {n: str(o) for n, o in outcomes.items() if isinstance(o, CompileError)}), failed
    return outcomes


@pytest.fixture(scope="module")
def executed():
    jobs = {n: Job(build=build, target=find_target(c), args=(case_of(n), c)) for n, c in CARDS.items()}
    a100 = CARDS["split"]
    jobs["chain"] = Job(build=build_chain, target=find_target(a100), args=(EXECUTED["split"], a100))
    return compile_all(jobs)


needs_compiler = pytest.mark.skipif(not compiler_installed(), reason='needs pip install "jaxdecode[check]"')


@needs_compiler
@pytest.mark.parametrize("name", CARDS)
def test_executed_ptx(executed, name):
    case = case_of(name)
    arrays = case.arrays()
    seeds = (0, 1, 2) if case.config.split_k > 1 else (None,)
    found = [Chain(executed[name], [np.asarray(a) for a in jax.tree.leaves(arrays)], seed=s).outputs[0] for s in seeds]
    check(found[0], case.expected(arrays), case.dtype)
    for other in found[1:]:  # whoever arrives last adds in the same order
        np.testing.assert_array_equal(other, found[0])


@needs_compiler
def test_products_share_counters_and_leave_them_at_zero(executed):
    case = EXECUTED["split"]
    arrays = case.arrays()
    zeros = np.zeros(case.n // case.config.block_n + 1, np.int32)
    for seed in (0, 1):
        chain = Chain(executed["chain"], [zeros, *(np.asarray(a) for a in jax.tree.leaves(arrays))], seed=seed)
        assert len(chain.launched) == 2  # nothing but the two products
        np.testing.assert_array_equal(chain.outputs[1], zeros)
        residual = jnp.asarray(case.expected(arrays), case.dtype)
        check(chain.outputs[0], case.expected(arrays | {"residual": residual}), case.dtype)


@needs_compiler
@pytest.mark.parametrize("name", ["plain", "norm", "gated"])
def test_a_product_of_padded_rows_is_one_kernel(executed, name):
    assert [thunk.kind for thunk in executed[name].thunks] == ["custom_call"]


@needs_compiler
def test_compiled_for_real_shapes():
    jobs = {
        name: Job(build=build, target=find_target(card), args=(dataclasses.replace(case, m=m), card))
        for name, (case, m, card) in REAL.items()
    }
    for name, program in compile_all(jobs).items():
        [kernel] = [kernel for kernel in program.kernels.values() if kernel.kind == "mosaic"]
        report = kernel.report
        assert not (report.spill_store_bytes or report.spill_load_bytes or report.stack_bytes), (name, report)
        assert kernel.launch.shared_bytes <= program.target.shared_per_block, name
        assert "mma.sync.aligned.m16n8k16" in kernel.ptx, name
        asynchronous = "cp.async.bulk.tensor" if program.target.compute_capability >= (9, 0) else "cp.async.cg"
        assert asynchronous in kernel.ptx, name
        assert "ld.global.v4" not in kernel.ptx, name  # operands only come through the ring


@pytest.mark.parametrize("card", TARGETS)
@pytest.mark.parametrize("m", [1, 8, 17, 32, 64])
@pytest.mark.parametrize(("n", "k"), [(4096, 4096), (4096, 11008), (50272, 4096), (576, 1536), (4608, 4096), (64, 32)])
def test_a_chosen_config_fits(card, m, n, k):
    target = find_target(card)
    config = choose_config(m, n, k, "bfloat16", target)
    config.check(m, n, k, "bfloat16")
    assert config.shared_bytes(m, "bfloat16") <= target.shared_per_block


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (Case(m=65), "1 to 64 rows of x; got m = 65"),
        (Case(dtype="float32"), "takes float16 or bfloat16; got float32"),
        (Case(n=80), "n as a multiple of block_n; got n = 80, block_n = 64"),
        (Case(k=200), "k as a multiple of block_k; got k = 200, block_k = 128"),
        (Case(gated=True, n=48, config=FlatGemmConfig(block_n=32)), "2 segments of 32 rows need block_n >= 64"),
        (Case(n=40, config=None), "needs n as a multiple of 32 and k of 32; got 40 and 512"),
    ],
    ids=lambda value: None if isinstance(value, Case) else value,
)
def test_what_it_does_not_take_is_named(case, message):
    arrays = case.arrays()
    with pytest.raises(NotImplementedError, match=message):
        case.run(arrays, mosaic_gpu.Launch(config=case.config, target=find_target("a10"), interpret=INTERPRET))


def test_blocks_that_cannot_be_are_refused():
    for wrong in ({"block_n": 48}, {"block_k": 96}, {"num_stages": 1}, {"split_k": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            FlatGemmConfig(**wrong)
    with pytest.raises(ValueError, match="too few for split_k = 2"):
        FlatGemmConfig(split_k=2).check(8, 64, 512, "float16")
