"""What every test shares: JAX on the CPU, split into two simulated devices."""

from __future__ import annotations

import io
import os
import sys

import pytest

# Read when JAX is first imported, so set before any test module is. Most of a test's time is LLVM's: the programs
# are those that users run, only the machine code inside each is not optimised.
os.environ["JAX_PLATFORMS"] = "cpu"
# A model loaded by one test must not switch the cache on for the tests that come after it.
os.environ["JAXDECODE_CACHE_DIR"] = "off"
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=2",
        "--xla_backend_optimization_level=0",
    ]
).strip()


@pytest.fixture
def as_users_call_it():
    """Without the shape checks that only tests run: our own error messages are what is asked for."""
    import jaxtyping

    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs `jaxdecode` with arguments, in process; returns exit code, stdout and stderr."""
    from jaxdecode.cli import main

    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments, stdin=""):
        monkeypatch.setattr(sys, "argv", ["jaxdecode", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        try:
            code = main()
        except SystemExit as exit:
            code = exit.code
        captured = capsys.readouterr()
        return code or 0, captured.out, captured.err

    return call
