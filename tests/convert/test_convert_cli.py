"""`jaxdecode convert` and `jaxdecode export` as they are typed."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import made
import pytest
from made import tiny_hf
from rich.console import Console

from convert import convert
from jaxdecode.checkpoint import load_config, load_manifest
from jaxdecode.cli import progress as cli_progress


@pytest.fixture
def source(tmp_path) -> Path:
    return made.write_sharded(tmp_path / "hf", tiny_hf.CASES["llama"])


def test_convert_and_export(run, source, tmp_path):
    code, out, _ = run("convert", source, tmp_path / "ours", "--dtype", "bfloat16")
    assert code == 0 and f"Wrote {tmp_path / 'ours'}" in out and "converting norm:" in out
    assert load_manifest(tmp_path / "ours")["dtype"] == "bfloat16"
    code, out, _ = run("export", tmp_path / "ours", tmp_path / "back")
    assert code == 0 and f"Wrote {tmp_path / 'back'}" in out
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert (config["torch_dtype"], config["model_type"]) == ("bfloat16", "llama")
    assert run("export", tmp_path / "ours", tmp_path / "wide", "--dtype", "float32")[0] == 0
    convert(tmp_path / "wide", tmp_path / "again")
    assert load_manifest(tmp_path / "again")["dtype"] == "float32"
    assert load_config(tmp_path / "again") == load_config(tmp_path / "ours")


def test_dry_run_prints_the_plan_and_writes_nothing(run, source, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    code, out, _ = run("convert", source, tmp_path / "ours", "--dry-run")
    assert code == 0 and sorted(tmp_path.rglob("*")) == before
    parameters = sum(array.size for array in tiny_hf.hf_weights(tiny_hf.CASES["llama"]).values())
    for word in ("tensors      15,", f"parameters   {parameters:,}", "dtype        float32", "disk", "peak memory"):
        assert word in out, (word, out)


def test_an_interrupted_run_is_mentioned(run, source, tmp_path):
    def stop(done, total, item):
        if item == "layer_00001":
            raise KeyboardInterrupt

    for target in ("ours", "other"):
        with pytest.raises(KeyboardInterrupt):
            convert(source, tmp_path / target, progress=stop)
    assert re.search(r"Continued an interrupted run: [1-4] weight files", run("convert", source, tmp_path / "ours")[1])
    assert "thrown away" in run("convert", source, tmp_path / "other", "--dtype", "float16")[1]


def test_verify_without_torch_fails_before_converting(run, source, tmp_path, monkeypatch):
    monkeypatch.setenv("JAXDECODE_HF_PYTHON", "/no/such/python")
    code, _, err = run("convert", source, tmp_path / "ours", "--verify")
    assert code == 1 and "--verify: JAXDECODE_HF_PYTHON names '/no/such/python'" in err
    assert not (tmp_path / "ours").exists() and not (tmp_path / "ours.partial").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing", "back"], "nothing is not a jaxdecode checkpoint: it does not exist"),
        (["hf", "back"], "run `jaxdecode convert` on it"),
        (["ours", "hf"], "exists already"),
        (["ours", "back", "--dtype", "int4"], "unknown dtype 'int4'"),
        (["damaged", "back"], "layer_00001.safetensors is missing"),
        (["wrong", "back"], "does not fit its config"),
    ],
)
def test_export_refuses(arguments, message, run, source, tmp_path):
    convert(source, tmp_path / "ours")
    convert(source, tmp_path / "damaged")
    convert(source, tmp_path / "wrong")
    (tmp_path / "damaged" / "weights" / "layer_00001.safetensors").unlink()
    config = tmp_path / "wrong" / "config" / "metadata"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_layers": 3}))
    before = sorted(tmp_path.rglob("*"))
    code, _, err = run("export", *[tmp_path / name for name in arguments[:2]], *arguments[2:])
    assert code == 1 and message in err and "Traceback" not in err, err
    assert sorted(tmp_path.rglob("*")) == before


def test_export_that_dies_leaves_nothing(source, tmp_path, run, monkeypatch):
    convert(source, tmp_path / "ours")
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr("os.rename", lambda *_: (_ for _ in ()).throw(OSError("the disk is gone")))
    code, _, err = run("export", tmp_path / "ours", tmp_path / "back")
    assert code == 1 and "the disk is gone" in err and sorted(tmp_path.rglob("*")) == before


def test_hub_snapshots_link_to_blobs(tmp_path):
    plain = made.write_directory(tmp_path / "plain")
    snapshot, blobs = tmp_path / "models--a--b/snapshots/rev", tmp_path / "models--a--b/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for index, file in enumerate(sorted(plain.iterdir())):
        (blobs / str(index)).write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(f"../../blobs/{index}")
    assert convert(snapshot, tmp_path / "ours").tensors == 9


def test_progress_on_a_terminal():
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    with cli_progress.transfer(console, "converting") as advance:
        advance(5_000_000, 10_000_000, "embed")
        advance(10_000_000, 10_000_000, "norm")
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "converting" in shown and "10.0/10.0 MB" in shown


def test_a_name_with_brackets_is_printed_as_it_is(run, source, tmp_path):
    for name in ("my[model]", "a[/b]", "[bold]x"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        code, out, err = run("convert", source, tmp_path / name)
        assert code == 0 and f"Wrote {tmp_path / name}\n" in out and not err
        code, out, err = run("export", tmp_path / name, tmp_path / f"{name}-back")
        assert code == 0 and f"Wrote {tmp_path / name}-back\n" in out and not err
