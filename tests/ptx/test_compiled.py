"""Programs compiled for cards that are not here, on the emulator: XLA's kernels, Pallas kernels, whole chains."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from needs import needs_compiler

from jaxdecode.aot import CompileError, Job, compile_programs
from pallas_kernels.targets import find_target
from ptx.chain import Chain
from ptx.faults import Fault
from ptx.pallas_programs import flat_product, split_softmax_sum
from ptx.xla_programs import FUNCTIONS, TinyModel, build_function, build_step

pytestmark = needs_compiler

CARDS = ["a100-80gb", "rtx3090", "rtx4090"]  # sm_80, sm_86, sm_89
RANDOM = np.random.default_rng(0)
PRODUCTS = [(128, 1024, "float16"), (64, 4096, "bfloat16"), (192, 512, "bfloat16")]
SUMS = [(3, 96, 4), (2, 70, 7)]
LLAMA = TinyModel(model_type="llama", dtype="float32", num_kv_heads=2)
QWEN3 = TinyModel(model_type="qwen3", dtype="bfloat16", num_kv_heads=1)
STEPS = [(LLAMA, card) for card in CARDS] + [(QWEN3, CARDS[0])]


@pytest.fixture(scope="module")
def compiled():
    """Everything below, compiled in one process: by name and card."""
    jobs = {(name, CARDS[0]): (build_function, (name,)) for name in FUNCTIONS}
    for card in CARDS:
        jobs |= {(shape, card): (flat_product, shape) for shape in PRODUCTS}
        jobs |= {(shape, card): (split_softmax_sum, shape) for shape in SUMS}
    jobs |= {(model, card): (build_step, (model,)) for model, card in STEPS}
    found = compile_programs(
        [Job(build=build, target=find_target(card), args=args) for (_, card), (build, args) in jobs.items()]
    )
    return dict(zip(jobs, found, strict=True))


def program(compiled, name, card):
    found = compiled[name, card]
    if isinstance(found, CompileError):
        raise found
    return found


def close(found, expected, tolerance):
    found, expected = (np.asarray(x, np.float64) for x in (found, expected))
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= tolerance * max(1.0, np.abs(expected).max())


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("seed", [None, 0])
def test_kernels_xla_writes_agree_with_xla_on_the_cpu(compiled, name, seed):
    function, arrays, tolerance = FUNCTIONS[name]
    chain = Chain(program(compiled, name, CARDS[0]), arrays, seed=seed)
    assert chain.launched
    close(chain.outputs[0], jax.jit(function)(*arrays), tolerance)


@pytest.mark.parametrize("shape", PRODUCTS, ids=str)
@pytest.mark.parametrize("card", CARDS)
def test_a_flat_product_with_a_ring_of_copies(compiled, shape, card):
    n, k, dtype = shape
    x, w = (RANDOM.standard_normal((rows, k)).astype(jnp.dtype(dtype)) for rows in (8, n))
    found = program(compiled, shape, card)
    (kernel,) = found.kernels.values()
    assert kernel.report.spill_store_bytes == kernel.report.stack_bytes == 0
    assert "cp.async.cg.shared.global" in kernel.ptx and "mma.sync" in kernel.ptx
    close(Chain(found, [x, w]).outputs[0], w.astype(np.float64) @ x.astype(np.float64).T, 1e-5)


@pytest.mark.parametrize("shape", SUMS, ids=str)
@pytest.mark.parametrize("card", CARDS)
def test_splits_of_a_softmax_sum_combined_by_the_last_to_arrive(compiled, shape, card):
    rows, kv_len, _ = shape
    scores, values = RANDOM.standard_normal((rows, kv_len)), RANDOM.standard_normal((kv_len, 128))
    weights = np.exp(scores)
    arrays = [scores.astype(np.float32), values.astype(np.float32), np.zeros(rows, np.int32)]
    runs = [Chain(program(compiled, shape, card), arrays, seed=seed).outputs for seed in (None, 0, 1, 2, 3)]
    close(runs[0][0], weights @ values / weights.sum(1, keepdims=True), 1e-5)
    for result, counters in runs:
        np.testing.assert_array_equal(result, runs[0][0])  # whoever comes last, the same bits
        assert not counters.any()


def test_a_combine_without_its_fence_is_a_race(compiled):
    found = program(compiled, SUMS[0], CARDS[0])
    (kernel,) = found.kernels.values()
    weak = kernel.ptx.replace("atom.add.acq_rel.gpu", "atom.add.relaxed.gpu")
    assert weak != kernel.ptx
    broken = found.__class__(
        **{**vars(found), "kernels": {kernel.key: kernel.__class__(**{**vars(kernel), "ptx": weak})}}
    )
    arrays = [np.ones((3, 96), np.float32), np.ones((96, 128), np.float32), np.zeros(3, np.int32)]
    with pytest.raises(Fault, match="race"):
        Chain(broken, arrays, seed=0)


@pytest.mark.parametrize(("model", "card"), STEPS, ids=lambda x: getattr(x, "model_type", x))
def test_the_decode_step_of_a_tiny_model_as_a_chain(compiled, model, card):
    inputs = model.inputs()
    chain = Chain(program(compiled, model, card), [np.asarray(leaf) for leaf in jax.tree.leaves(inputs)])
    expected = jax.tree.leaves(jax.jit(model.function())(*inputs))
    tolerance = 3e-2 if model.dtype == "bfloat16" else 1e-4
    assert len(chain.outputs) == len(expected)
    for found, reference in zip(chain.outputs, expected, strict=True):
        close(found, reference, tolerance)


def test_a_block_of_the_flat_product_at_k_4096_runs_in_two_seconds(compiled):
    found = program(compiled, (64, 4096, "bfloat16"), CARDS[0])
    assert next(iter(found.kernels.values())).launch.grid == (1, 1, 1)
    arrays = [np.zeros((rows, 4096), jnp.bfloat16) for rows in (8, 64)]
    start = time.process_time()
    Chain(found, arrays)
    assert time.process_time() - start < 2
