"""Every command and program of the README, run as printed, on SmolLM2."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
GGUF = ROOT / ".cache" / "smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"  # `make weights` puts it there


def blocks(language: str, section: str) -> list[str]:
    text = README.split(f"## {section}\n")[1].split("\n## ")[0]
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def run(arguments: list[str], folder: Path, stdin: str = "") -> str:
    # Real programs on real weights: compiled as for users, and kept for the next command.
    env = {**os.environ, "XLA_FLAGS": "", "JAXDECODE_CACHE_DIR": str(folder / "programs")}
    done = subprocess.run(arguments, cwd=folder, env=env, input=stdin, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def outputs(tmp_path_factory) -> dict[str, str]:
    """What each line of "The command line" prints, in order, in one folder; and the folder."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / GGUF.name).symlink_to(GGUF)
    (folder / "prompts.txt").write_text("The sky is\nOne, two,\n")
    outputs = {"folder": str(folder)}
    (block,) = blocks("bash", "The command line")
    for line in block.splitlines():
        program, *arguments = shlex.split(line, comments=True)
        assert program == "jaxdecode"
        stdin = "Say hello.\n/exit\n" if arguments[0] == "chat" else ""
        outputs[arguments[0] + (" batch" if "--prompts-file" in arguments else "")] = run(
            [str(Path(sys.executable).with_name(program)), *arguments], folder, stdin
        )
    return outputs


def test_the_commands(outputs):
    assert "Paris" in outputs["generate"]
    assert outputs["generate batch"].count('"text"') == 8
    assert outputs["chat"].strip()
    assert "perplexity" in outputs["score"]
    assert (Path(outputs["folder"]) / "smollm2-hf" / "model.safetensors").exists()
    assert "jaxlib" in outputs["env"]


@pytest.mark.parametrize("section", ["Python", "Inside your own program"])
def test_the_programs(outputs, section):
    (program,) = blocks("python", section)
    printed = run([sys.executable, "-c", program], Path(outputs["folder"]))
    assert printed.strip()


def test_the_make_targets_exist():
    (block,) = blocks("bash", "Try it")
    for line in block.splitlines():
        target = shlex.split(line, comments=True)[1]
        subprocess.run(["make", "--dry-run", target], cwd=ROOT, check=True, capture_output=True)


def test_the_readme_is_short():
    assert len(README.splitlines()) < 200
