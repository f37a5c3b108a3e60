"""`jaxdecode check` on tiny models: what the cells say is what was compiled, and bad input is one clear error."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from needs import needs_compiler
from tiny import tiny_model

import jaxdecode
from aot import programs
from jaxdecode.aot import compiler
from jaxdecode.aot.check import Cell, check, program
from jaxdecode.aot.check.fit import find_fit
from jaxdecode.aot.check.least import slot_bytes
from jaxdecode.aot.check.prefill import passes
from jaxdecode.aot.program import MemoryUse
from jaxdecode.models.known import KNOWN
from pallas_kernels.kernel_names import kernel_name, read_kernel_name
from pallas_kernels.targets import find_target

TINY = dataclasses.replace(KNOWN["llama2-7b"], vocab_size=512, embed_dim=256, mlp_dim=192, num_layers=3, num_heads=4,
                           num_kv_heads=2, head_dim=64, max_position=256)  # fmt: skip
LLAMA_7B = KNOWN["llama2-7b"]
A100 = find_target("a100-80gb")


def test_kernel_names():
    name = kernel_name("flat_gemm", n=64, k=128, stages=4)
    assert name == "flat_gemm_n64_k128_stages4"
    assert read_kernel_name(f"{name}_mosaic_gpu_kernel") == ("flat_gemm", {"n": 64, "k": 128, "stages": 4})
    assert read_kernel_name("decode_attention") == ("decode_attention", {})


def test_bytes_of_a_fit():
    assert slot_bytes(LLAMA_7B, "float16") == 512 << 10
    compiled = MemoryUse(arguments=2 * 6_738_415_616, outputs=0, aliased=0, temporaries=(4 << 30) + (1 << 28))
    fit = find_fit(LLAMA_7B, "float16", batch=8, context=1024, target=A100, compiled=compiled)
    assert (fit.weight_bytes, fit.cache_bytes, fit.temporary_bytes) == (2 * 6_738_415_616, 4 << 30, 1 << 28)
    assert fit.fits and fit.memory_fraction is None


def test_what_does_not_fit_says_by_how_much():
    fit = find_fit(LLAMA_7B, "float16", batch=8, context=8192, target=find_target("rtx3090"))
    assert not fit.fits and fit.temporary_bytes is None
    assert fit.total_bytes - fit.memory_bytes == 2 * 6_738_415_616 + 8 * 8192 * (512 << 10) - 25_300_000_000
    tight = find_fit(LLAMA_7B, "float16", batch=8, context=2048, target=find_target("rtx3090"))
    assert tight.fits and tight.memory_fraction == 0.88  # 22.07 of 25.3 GB


@needs_compiler
@pytest.mark.parametrize(("batch", "context"), [(16, 100), (2, 512)])
def test_the_most_that_is_said_to_fit_fits(batch, context):
    """Compiled: also where the longer prompt is read in longer chunks, which need eight times the activations."""
    card = dataclasses.replace(A100, memory_bytes=40_000_000)
    config = dataclasses.replace(TINY, max_position=1 << 16)

    def one(batch: int, context: int) -> Cell:
        [cell] = check(config, gpus=[card], batches=[batch], contexts=[context], workers=1)
        return cell

    fit = one(batch, context).fit
    assert fit.fits and fit.largest_batch >= batch and fit.largest_context >= context // 32 * 32
    for cell in (one(fit.largest_batch, context), one(batch, fit.largest_context)):
        assert cell.fit.temporary_bytes is not None and cell.fit.fits


@pytest.mark.parametrize(
    ("prompt", "expected"), [(960, {256: 3, 32: 6}), (64, {32: 2}), (33, {32: 2}), (256, {256: 1, 32: 0})]
)
def test_passes_over_a_prompt(prompt, expected):
    assert passes(prompt) == expected


def tiny_cell(**changes) -> Cell:
    [cell] = check(dataclasses.replace(TINY, **changes), gpus=["a100-80gb"], batches=[3], contexts=[160], workers=1)
    assert cell.error is None, cell.error
    return cell


@needs_compiler
def test_a_cell_says_what_was_compiled():
    cell = tiny_cell()
    assert cell.program is not None and cell.modelled is not None
    assert cell.program.kernels_per_layer == 5 and cell.program.graphs == cell.program.round_trips == 1
    assert cell.program.captured == cell.program.kernels_per_token == sum(use.launches for use in cell.kernels)
    assert cell.faults == () and list(cell.program.prefill_kernels) == [32]
    ours = {use.weight or use.op: use for use in cell.kernels if use.kind == "mosaic"}
    assert {name: (use.shape, use.launches) for name, use in ours.items()} == {
        "layers.*.attention.qkv.weight": ((512, 256), 3),
        "decode_attention": ((3, 2, 160, 64), 3),
        "layers.*.attention.out.weight": ((256, 256), 3),
        "layers.*.mlp.gate_up.weight": ((384, 256), 3),
        "layers.*.mlp.down.weight": ((256, 192), 3),
        "head.weight": ((512, 256), 1),
    }
    assert sum(use.launches * use.least_bytes for use in cell.kernels) == cell.bytes_per_token
    weights = 2 * (3 * (512 * 256 + 256 * 256 + 384 * 256 + 256 * 192) + 512 * 256)
    assert cell.bytes_per_token == weights + 3 * 2 * 3 * 2 * 160 * 64 * 2
    modelled = cell.modelled
    assert modelled.roofline_seconds == cell.bytes_per_token / 2039e9
    assert modelled.seconds_per_token == pytest.approx([sum(modelled.spent_seconds.values())] * 2)
    assert modelled.tokens_per_second == pytest.approx([3 / modelled.seconds_per_token[0]] * 2)
    assert modelled.prefill_seconds[0] < modelled.prefill_seconds[1]
    json.dumps(cell.to_dict())


@needs_compiler
def test_a_card_with_tma():
    [cell] = check(TINY, gpus=["h100"], batches=[3], contexts=[160], workers=1)
    assert cell.error is None and cell.faults == () and cell.program is not None
    assert cell.program.kernels_per_layer == 5
    assert sum(use.launches * use.least_bytes for use in cell.kernels) == cell.bytes_per_token


@needs_compiler
def test_windows_norms_and_other_families():
    windowed = tiny_cell(layer_windows=(None, 64, 64))
    attentions = [use for use in windowed.kernels if use.op == "decode_attention"]
    assert [(use.launches, use.least_bytes) for use in attentions] == [
        (1, 2 * 3 * 2 * 160 * 64 * 2),
        (2, 2 * 3 * 2 * 64 * 64 * 2),
    ]
    opt = tiny_cell(model_type="opt", rope=None, norm="layer", gated_mlp=False, activation="relu", num_kv_heads=4,
                    qkv_bias=True, out_bias=True, mlp_bias=True, tied_embeddings=True, position_offset=2)  # fmt: skip
    assert opt.program is not None and opt.program.kernels_per_layer == 5
    assert {use.weight for use in opt.kernels if use.kind == "mosaic"} >= {"layers.*.mlp.up.weight", "embed.weight"}


@needs_compiler
@pytest.mark.parametrize(("dtype", "batch"), [("float32", 1), ("float32", 8), ("float16", 65)])
def test_xlas_own_products_and_attention(dtype, batch):
    config = dataclasses.replace(TINY, num_layers=2, tied_embeddings=True)
    [cell] = check(config, gpus=["rtx3090"], batches=[batch], contexts=[192], dtype=dtype, workers=1)
    assert cell.program is not None and cell.modelled is not None and cell.bytes_per_token is not None
    products = [use for use in cell.kernels if use.weight]
    assert products and all(use.kind != "mosaic" for use in products)
    size = {"float32": 4, "float16": 2}[dtype]
    weights = size * (2 * (512 * 256 + 256 * 256 + 384 * 256 + 256 * 192) + 512 * 256)
    read = sum(use.launches * use.least_bytes for use in products)
    # no lookup is taken for a product; for one row XLA reads a layer's qkv in two kernels
    assert weights <= read <= weights + (size * 512 * 256 if batch == 1 else 0)
    assert cell.bytes_per_token == weights + batch * 192 * slot_bytes(config, dtype)
    fewest, most = cell.modelled.seconds_per_token
    assert fewest < most and cell.modelled.roofline_seconds < fewest
    operations = 2 * batch * weights / size
    assert sum(use.launches * use.modelled_seconds[0] for use in products) > operations / 71e12
    if dtype == "float32":
        assert cell.program.kernels_per_layer == 0


@needs_compiler
def test_a_crash_is_the_error_of_its_own_cell(monkeypatch):
    monkeypatch.setattr(program, "generation", programs.generation_that_may_abort)
    cells = check(TINY, gpus=["a100-80gb"], batches=[1, 2], contexts=[64], workers=2)
    assert cells[0].error is None and cells[0].modelled is not None
    assert cells[1].error is not None and "ended the process" in cells[1].error and cells[1].modelled is None


def test_without_the_compiler_one_line_says_what_to_install(run, monkeypatch):
    monkeypatch.setattr(compiler, "missing_packages", lambda: ["jax-cuda12-plugin"])
    code, out, err = run("check", "llama2-7b", "--gpu", "a100-80gb")
    assert (code, out) == (1, "")
    assert err.strip() == (
        'error: compiling for an NVIDIA card needs jax-cuda12-plugin: pip install "jaxdecode[check]"'
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("llama2-8b", "--gpu", "l4"), "no model 'llama2-8b' (did you mean 'llama2-7b'?): neither a checkpoint nor"),
        (("llama2-7b", "--gpu", "a100"), "no card 'a100' (did you mean a100-80gb or a100-40gb or"),
        (("llama2-7b", "--gpu", "none.toml"), "cannot read a card from none.toml"),
        (("llama2-7b", "--gpu", "l4", "--batch", "1;2"), "--batch takes whole numbers with commas between them"),
        (("llama2-7b", "--gpu", "l4", "--batch", "0"), "batch must be at least 1; got 0"),
        (("llama2-7b", "--gpu", "l4", "--context", "1"), "context must be at least 2"),
        (("llama2-7b", "--gpu", "l4", "--dtype", "fp8"), "dtype must be one of float16, bfloat16, float32; got 'fp8'"),
    ],
)
def test_bad_input(run, arguments, message):
    code, out, err = run("check", *arguments)
    assert (code, out) == (1, "") and message in " ".join(err.split())


def test_learned_positions_are_refused_or_extended(run):
    code, out, _ = run("check", "opt-6.7b", "--gpu", "rtx3090", "--context", "4k", "--batch", "8", "--json")
    assert code == 1 and not json.loads(out)["cells"][0]["fit"]["fits"]
    assert "has 2048 learned positions; 4096 were asked for (--extend" in json.loads(out)["cells"][0]["error"]
    code, out, _ = run("check", "opt-6.7b", "--gpu", "rtx3090", "--context", "4k", "--batch", "8", "--extend-positions")
    assert code == 0 and "opt-6.7b with 4096 positions" in out and "does not fit, at least" in out


@needs_compiler
def test_the_command(run, tmp_path):
    params, config = tiny_model(vocab_size=300, num_layers=1, max_position=256)
    jaxdecode.save(tmp_path / "mine", params, config)
    card = tmp_path / "card.toml"
    card.write_text('like = "rtx3090"\nname = "half a 3090"\nbandwidth = 468')
    picture = tmp_path / "roof.png"
    whole = ["--gpu", str(card), "--gpu", "L4", "--batch", "1,2", "--context", "64", "--dtype", "bfloat16"]
    code, out, err = run("check", tmp_path / "mine", *whole, "--plot", picture)
    assert code == 0, err
    for part in ("mine in bfloat16 on half a 3090", "on l4, 23.6 GB", "All times are modelled, none is measured"):
        assert part in out
    assert "compiling: 4 of 4" in err and picture.read_bytes().startswith(b"\x89PNG")
    code, out, _ = run("check", tmp_path / "mine", *whole, "--json", "--strict")
    answer = json.loads(out)
    assert [(c["card"], c["batch"]) for c in answer["cells"]] == [
        ("half a 3090", 1), ("half a 3090", 2), ("l4", 1), ("l4", 2),
    ]  # fmt: skip
    assert "jaxlib" in answer["versions"] and answer["assumed"]["dram_share"] == 0.92
    _, _, err = run("check", tmp_path / "mine", *whole, "--plot", tmp_path / "no" / "x.png")
    assert "takes the name of a .png file" in err


def test_a_config_json_is_enough(run, tmp_path, monkeypatch):
    fields = {"model_type": "llama", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
              "num_hidden_layers": 32, "num_attention_heads": 32, "torch_dtype": "bfloat16"}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(fields))
    large = ["--gpu", "rtx3090", "--batch", "64", "--context", "8k"]
    code, out, _ = run("check", tmp_path / "config.json", *large, "--json")
    [cell] = json.loads(out)["cells"]
    assert code == 0 and cell["dtype"] == "bfloat16" and not cell["fit"]["fits"]
    assert cell["fit"]["weight_bytes"] == 2 * 6_738_415_616
    folder = tmp_path / "Qwen2.5-0.5B"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(fields))
    _, out, _ = run("check", folder, *large)
    assert "Qwen2.5-0.5B in bfloat16 on rtx3090" in out
    (tmp_path / "config.json").write_text("{")
    assert "is not readable JSON" in run("check", tmp_path / "config.json", "--gpu", "l4")[2]


@needs_compiler
@pytest.mark.parametrize(("batch", "context", "column"), [(1, 1024, 1), (8, 8192, 2)])
def test_the_hand_calculations_of_the_docs(batch, context, column):
    text = (Path(__file__).parents[2] / "docs" / "check.md").read_text()
    rows = {row.split("|")[1].strip(): row.split("|")[column + 1].strip() for row in text.splitlines() if "|" in row}
    assert rows[""] == f"batch {batch}, context {context}"
    [cell] = check("llama2-7b", gpus=["a100-80gb"], batches=[batch], contexts=[context], workers=1)
    assert cell.bytes_per_token is not None and cell.modelled is not None
    assert cell.bytes_per_token == pytest.approx(int(rows["bytes a step"].replace(",", "")), rel=0.01)
    assert f"{1e3 * cell.modelled.roofline_seconds:.3f} ms" == rows["roofline"]
    assert cell.fit.cache_bytes == int(rows["cache"].rpartition("= ")[2].replace(",", ""))
