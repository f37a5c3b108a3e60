"""Plants faults in the kernels, one at a time in a copy of the project, and watches a named test turn red.

    python tests/mutations.py            # all of them: about half a minute each
    python tests/mutations.py fp16 mask  # those whose names hold one of the words

A fault is found if the test fails and says what `shows`: a wrong result, or for faults that only execution sees their
kind in `ptx/faults.py`. The tests are run unchanged first.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("pallas_kernels", "jaxdecode", "convert", "tests", "pyproject.toml")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mutation:
    """`before`, which stands once in `file`, becomes `after`; then `test` fails, and its output holds `shows`."""

    name: str
    file: str
    before: str
    after: str
    test: str
    shows: str = "AssertionError"


_DECODE = "tests/kernels/test_decode_attention.py"
_PREFILL = "tests/kernels/test_prefill_attention.py"
_PTX = "tests/kernels/test_flat_gemm_ptx.py"
MUTATIONS = (
    Mutation(
        name="mask one slot too long",
        file="flash.py",
        before="visible = (row >= low) & (row < high)",
        after="visible = (row >= low) & (row <= high)",
        test=f"{_DECODE}::test_interpreted[mha-online]",
    ),
    Mutation(
        name="causal mask one slot too short",
        file="flash.py",
        before="visible &= row <= newest",
        after="visible &= row < newest",
        test=f"{_PREFILL}::test_interpreted",
    ),
    Mutation(
        name="a split ends one block late",
        file="decode_attention/mosaic_gpu.py",
        before="last=jnp.minimum(first + each, span.last)",
        after="last=jnp.minimum(first + each + 1, span.last)",
        test=f"{_DECODE}::test_interpreted[mha-unified]",
    ),
    Mutation(
        name="fp16 weights of the values under a low unified maximum",
        file="decode_attention/mosaic_gpu.py",
        before="weights_dtype=query.dtype if unified_max is None else jnp.dtype(jnp.bfloat16)",
        after="weights_dtype=query.dtype",
        test=f"{_DECODE}::test_interpreted_maximum_at_the_lower_end_does_not_overflow[float16]",
    ),
    Mutation(
        name="heads of another KV head",
        file="decode_attention/mosaic_gpu.py",
        before="heads = pl.ds(kv_head * plan.q_per_kv, plan.q_per_kv)",
        after="heads = pl.ds((1 - kv_head) * plan.q_per_kv, plan.q_per_kv)",
        test=f"{_DECODE}::test_interpreted[gqa3-online]",
    ),
    Mutation(
        name="no rescale in the online softmax",
        file="flash.py",
        before="out = out * along(to_out(flash, shared, kept), out.shape)",
        after="pass",
        test=f"{_DECODE}::test_interpreted[mha-online]",
    ),
    Mutation(
        name="all rows written again after an overflow",
        file="flash.py",
        before="shared.wanted[...] = unsound",
        after="shared.wanted[...] = real",
        test=f"{_DECODE}::test_interpreted_only_overflowed_rows_are_recomputed[1-float16]",
    ),
    Mutation(
        name="overflow not looked for",
        file="flash.py",
        before="added = jnp.where(scores > flash.safe_end, math.inf, added)",
        after="pass",
        test=f"{_DECODE}::test_interpreted_only_overflowed_rows_are_recomputed[1-bfloat16]",
    ),
    Mutation(
        name="attention waits for one step less",
        file="flash.py",
        before="plgpu.wait_gmem_to_smem(2 * (flash.num_stages - 2))",
        after="plgpu.wait_gmem_to_smem(2 * (flash.num_stages - 1))",
        test="tests/kernels/test_decode_attention_ptx.py::test_executed_ptx[llama-online]",
        shows="in-flight",
    ),
    Mutation(
        name="stale ring slot",
        file="flat_gemm/ring.py",
        before="_fetch(plan, refs, first + i + ahead, lax.rem(i + ahead, config.num_stages))",
        after="_fetch(plan, refs, first + i + ahead, lax.rem(i + ahead + 1, config.num_stages))",
        test=f"{_PTX}::test_executed_ptx[plain]",
        shows="in-flight",
    ),
    Mutation(
        name="product waits for one copy less",
        file="flat_gemm/ring.py",
        before="plgpu.wait_gmem_to_smem(plan.copies * newer)",
        after="plgpu.wait_gmem_to_smem(plan.copies * newer + 1)",
        test=f"{_PTX}::test_executed_ptx[plain]",
        shows="in-flight",
    ),
    Mutation(
        name="missing barrier after an arrival is told",
        file="last_arriver.py",
        before="    bar.sync 1, 128;\n    ld.shared.u32",
        after="    ld.shared.u32",
        test=f"{_PTX}::test_executed_ptx[split]",
        shows="race",
    ),
    Mutation(
        name="an arrival orders nothing",
        file="last_arriver.py",
        before="atom.add.acq_rel.gpu",
        after="atom.add.relaxed.gpu",
        test=f"{_PTX}::test_executed_ptx[split]",
        shows="race",
    ),
    Mutation(
        name="norm over one step instead of k",
        file="flat_gemm/tensor_cores.py",
        before="optimized=False) / plan.k",
        after="optimized=False) / plan.config.block_k",
        test=f"{_PTX}::test_executed_ptx[norm wide]",  # bfloat16: float16 takes another way
    ),
    Mutation(
        name="gemv drops its last row",
        file="flat_gemm/cuda_cores.py",
        before="results[row] if row < plan.valid else nothing",
        after="results[row] if row < plan.valid - 1 else nothing",
        test=f"{_PTX}::test_executed_ptx[gemv 2]",
    ),
    Mutation(
        name="a key goes to the slot of another row",
        file="flat_gemm/epilogue.py",
        before="kv_head, refs.lengths[row], pl.ds",
        after="kv_head, refs.lengths[0], pl.ds",
        test="tests/kernels/test_flat_gemm_qkv.py::test_executed_ptx[plain flat_gemm]",
    ),
)


def main(words: list[str]) -> int:
    chosen = [m for m in MUTATIONS if not words or any(word in m.name for word in words)]
    with tempfile.TemporaryDirectory(prefix="jaxdecode-mutations-") as folder:
        copy = Path(folder)
        for part in PARTS:
            source = ROOT / part
            shutil.copytree(source, copy / part) if source.is_dir() else shutil.copy(source, copy / part)
        missed = [test for test in dict.fromkeys(m.test for m in chosen) if not _passes(copy, test)]
        for test in missed:
            print(f"RED BEFORE ANY FAULT  {test}")
        for mutation in chosen:
            found, why = _find(copy, mutation)
            print(f"{'found' if found else 'NOT FOUND'}  {mutation.name}: {why}", flush=True)
            missed += [] if found else [mutation.name]
    print(f"{len(chosen)} faults, {len(missed)} problems")
    return 1 if missed else 0


def _passes(copy: Path, test: str) -> bool:
    return _run(copy, test).returncode == 0


def _find(copy: Path, mutation: Mutation) -> tuple[bool, str]:
    file = copy / "pallas_kernels" / mutation.file
    text = file.read_text()
    if text.count(mutation.before) != 1:
        return False, f"`{mutation.before}` stands {text.count(mutation.before)} times in {mutation.file}"
    file.write_text(text.replace(mutation.before, mutation.after))
    try:
        run = _run(copy, mutation.test)
    finally:
        file.write_text(text)
    if run.returncode != 1:  # 1: tests ran and some failed
        return False, f"pytest ended with {run.returncode}, not with a failed test"
    if mutation.shows not in run.stdout:
        return False, f"{mutation.test} failed, but not with {mutation.shows!r}"
    return True, f"{mutation.test} {mutation.shows}"


def _run(copy: Path, test: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-x", "--no-header", test]
    environment = {**os.environ, "PYTHONPATH": str(copy)}
    return subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, check=False)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
