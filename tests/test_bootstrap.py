"""The scripts behind `make`: which Python they pick, and that a broken environment is made anew."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"
PYTHON = Path(sys.executable)


def find_python(folder, *versions, **variables):
    env = {"PATH": f"{folder}:/usr/bin:/bin", "HOME": str(folder), "PYENV_ROOT": str(folder / "pyenv")}
    script = [shutil.which("bash") or "bash", str(ROOT / "scripts/find_python.sh"), *versions]
    return subprocess.run(script, env=env | variables, capture_output=True, text=True)


def command(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


@pytest.mark.parametrize("place", ["python3.99", "pyenv/versions/3.99.1/bin/python"])
def test_finds_python_on_the_path_and_in_pyenv(tmp_path, place):
    # Pretends to be 3.99: the version is asked for in one -c, and everything else runs the real Python.
    command(tmp_path / place, f'case "$2" in *"%d.%d"*) echo 3.99;; *) exec {PYTHON} "$@";; esac')
    done = find_python(tmp_path, "3.98", "3.99")
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).exists()


def test_a_shim_that_fails_is_passed_over(tmp_path):
    command(tmp_path / "python3.99", "echo 'pyenv: python3.99: command not found' >&2; exit 127")
    done = find_python(tmp_path, "3.99")
    assert done.returncode == 1
    assert done.stdout == ""


def test_says_what_to_install_when_there_is_none(tmp_path):
    done = find_python(tmp_path, "3.97", "3.98")
    assert done.returncode == 1
    for words in ("No suitable Python", "3.97 3.98", "apt install", "brew install", "pyenv install", "uv python"):
        assert words in done.stderr


def test_says_when_venv_is_what_is_missing(tmp_path):
    text = f'case "$2" in *"%d.%d"*) echo 3.99;; *ensurepip*) exit 1;; *) exec {PYTHON} "$@";; esac'
    command(tmp_path / "python3.99", text)
    done = find_python(tmp_path, "3.99")
    assert done.returncode == 1
    assert "apt install python3.99-venv" in done.stderr


def test_the_override_is_taken_or_refused(tmp_path):
    assert find_python(tmp_path, VERSION, JAXDECODE_PYTHON=str(PYTHON)).returncode == 0
    done = find_python(tmp_path, "3.99", JAXDECODE_PYTHON=str(PYTHON))
    assert done.returncode == 1
    assert f"JAXDECODE_PYTHON={PYTHON}" in done.stderr


# Makes "environments" that hold a copy of itself and install anything but a package called missing, at once.
FAKE_PYTHON = f"""
case "$*" in
  "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
  *"pip install"*missing*) exit 1 ;;
  *"pip install"*) ;;
  *sys.executable*) echo "$0" ;;
  *) exec {PYTHON} "$@" ;;
esac"""


@pytest.fixture
def checkout(tmp_path):
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    command(tmp_path / "python", FAKE_PYTHON)
    return tmp_path


def bootstrap(checkout, package):
    arguments = ["scripts/bootstrap.sh", ".venv", VERSION, package]
    env = os.environ | {"JAXDECODE_PYTHON": str(checkout / "python")}
    return subprocess.run(arguments, cwd=checkout, env=env, capture_output=True, text=True)


def is_made(checkout, package="present"):
    """Runs the script; True if it made the environment anew."""
    done = bootstrap(checkout, package)
    assert done.returncode == 0, done.stderr
    return "Making .venv" in done.stderr


def test_an_environment_is_made_once_and_anew_when_incomplete_or_outdated(checkout):
    venv = checkout / ".venv"
    assert is_made(checkout)
    assert not is_made(checkout)
    (venv / ".complete").unlink()  # as if interrupted
    (venv / "half").touch()
    assert is_made(checkout)
    assert not (venv / "half").exists()
    with (checkout / "constraints.txt").open("a") as file:
        file.write("# changed\n")
    assert is_made(checkout)
    (venv / "bin/python").unlink()  # as if the interpreter had been removed
    assert is_made(checkout)
    assert is_made(checkout, "another")
    assert not is_made(checkout, "another")


def test_an_install_that_fails_leaves_nothing_complete(checkout):
    assert is_made(checkout)
    assert bootstrap(checkout, "missing").returncode != 0
    assert not (checkout / ".venv/.complete").exists()
    assert is_made(checkout)
