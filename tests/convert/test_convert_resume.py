"""A conversion that dies anywhere leaves nothing at its destination, and the next run finishes the same bytes."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import made
import pytest
from made import tiny_hf

from convert import ConversionError, convert
from jaxdecode import checkpoint

ROOT = Path(__file__).resolve().parents[2]
STEPS = ("fsync", "replace", "rename")  # every call of these in a conversion is a place to die


class Killed(BaseException):
    """Ends a conversion where a signal would."""


@pytest.fixture
def source(tmp_path):
    return made.write_sharded(tmp_path / "hf", tiny_hf.CASES["llama"])


def hashes(folder: Path) -> dict[str, str]:
    return {name: row["sha256"] for name, row in checkpoint.load_manifest(folder)["tensors"].items()}


def die_at(monkeypatch, step: int | None) -> list[str]:
    """Makes the `step`-th call that touches the disk die instead; returns the calls made."""
    calls: list[str] = []

    def counting(name, original):
        def call(*args, **kwargs):
            calls.append(name)
            if len(calls) - 1 == step:
                raise Killed
            return original(*args, **kwargs)

        return call

    for name in STEPS:
        monkeypatch.setattr(os, name, counting(name, getattr(os, name)))
    return calls


def test_dying_at_every_step(tmp_path, monkeypatch):
    source = made.write_directory(tmp_path / "hf")
    with monkeypatch.context() as patch:
        calls = die_at(patch, None)
        convert(source, tmp_path / "whole")
    expected, continued = hashes(tmp_path / "whole"), set()
    finishing = len(calls) - 1 - calls[::-1].index("rename")
    assert finishing > 20
    for step in range(len(calls)):
        target = tmp_path / "ours"
        with monkeypatch.context() as patch:
            die_at(patch, step)
            with pytest.raises(Killed):
                convert(source, target)
        assert target.exists() == (step > finishing)
        if step <= finishing:
            continued.add(convert(source, target).continued_items)
        assert hashes(target) == expected
        checkpoint.verify_hashes(target)
        shutil.rmtree(target)
        shutil.rmtree(tmp_path / "ours.partial", ignore_errors=True)
    assert continued == {0, 1, 2, 3, 4}, "each number of finished items is continued from"


def test_many_deaths_in_a_row(source, tmp_path, monkeypatch):
    convert(source, tmp_path / "whole")
    deaths = 0
    while not (tmp_path / "ours").exists():
        with monkeypatch.context() as patch:
            die_at(patch, 5 + deaths)  # enough to take over and to finish about one item
            try:
                convert(source, tmp_path / "ours")
            except Killed:
                deaths += 1
        assert deaths < 60
    assert deaths > 4 and hashes(tmp_path / "ours") == hashes(tmp_path / "whole")


@pytest.mark.parametrize("step", [5, 14, 23])
def test_a_killed_process(step, source, tmp_path):
    script = f"""
        import os, sys
        calls = 0
        def deadly(original):
            def call(*args, **kwargs):
                global calls
                calls += 1
                if calls == {step}:
                    os.kill(os.getpid(), 9)
                return original(*args, **kwargs)
            return call
        for name in {STEPS}:
            setattr(os, name, deadly(getattr(os, name)))
        from convert import convert
        convert(*sys.argv[1:])
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(source), str(tmp_path / "ours")]
    died = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert died.returncode == -9, died.stderr
    assert not (tmp_path / "ours").exists() and (tmp_path / "ours.partial").exists()
    with pytest.raises(ValueError, match="not a jaxdecode checkpoint"):
        checkpoint.load_params(tmp_path / "ours.partial")
    result = convert(source, tmp_path / "ours")
    assert result.continued_items == {5: 0, 14: 3, 23: 5}[step] and not (tmp_path / "ours.partial").exists()
    convert(source, tmp_path / "whole")
    assert hashes(tmp_path / "ours") == hashes(tmp_path / "whole")


def die(source, target, monkeypatch, **options):
    with monkeypatch.context() as patch:
        die_at(patch, 13)
        with pytest.raises(Killed):
            convert(source, target, **options)


def test_finished_items_are_not_written_again(source, tmp_path, monkeypatch):
    die(source, tmp_path / "ours", monkeypatch)
    before = {
        f.name: f.stat().st_mtime_ns for f in (tmp_path / "ours.partial/checkpoint/weights").glob("*.safetensors")
    }
    result = convert(source, tmp_path / "ours")
    after = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "ours" / "weights").iterdir()}
    kept = [name for name in before if after[name] == before[name]]
    assert len(kept) == result.continued_items > 0 and len(after) > len(kept)


def test_another_source_dtype_or_config_starts_afresh(source, tmp_path, monkeypatch):
    other = made.write_directory(tmp_path / "other", tiny_hf.CASES["llama_tied"])
    die(source, tmp_path / "ours", monkeypatch)
    result = convert(source, tmp_path / "ours", dtype="bfloat16")
    assert result.restarted and not result.continued_items and result.dtype == "bfloat16"
    die(source, tmp_path / "ours2", monkeypatch)
    result = convert(other, tmp_path / "ours2")
    assert result.restarted and not result.continued_items
    convert(other, tmp_path / "whole")
    assert hashes(tmp_path / "ours2") == hashes(tmp_path / "whole")
    die(source, tmp_path / "ours3", monkeypatch)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.1}))
    assert convert(source, tmp_path / "ours3").restarted


def test_a_changed_shard_starts_afresh(source, tmp_path, monkeypatch):
    die(source, tmp_path / "ours", monkeypatch)
    shard = next(source.glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(bytes(data))
    assert convert(source, tmp_path / "ours").restarted
    convert(source, tmp_path / "whole")
    assert hashes(tmp_path / "ours") == hashes(tmp_path / "whole")


def test_a_damaged_item_is_written_again(source, tmp_path, monkeypatch):
    die(source, tmp_path / "ours", monkeypatch)
    item = sorted((tmp_path / "ours.partial/checkpoint/weights").glob("*.safetensors"))[0]
    item.write_bytes(item.read_bytes()[:-5])
    convert(source, tmp_path / "ours")
    checkpoint.verify_hashes(tmp_path / "ours")


def test_two_writers_at_once(source, tmp_path):
    (tmp_path / "ours.partial").mkdir()
    with (tmp_path / "ours.partial" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ConversionError, match="another process is writing"):
            convert(source, tmp_path / "ours")
    convert(source, tmp_path / "ours")


def test_destination_that_appears_meanwhile(source, tmp_path):
    def appear(*_):
        (tmp_path / "ours").mkdir(exist_ok=True)

    with pytest.raises(ConversionError, match="exists already"):
        convert(source, tmp_path / "ours", progress=appear)
    assert not any((tmp_path / "ours").iterdir())
