"""Inputs that once broke a law, and hostile ones of great size."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

if not Path("/proc/self/clear_refs").exists():
    pytest.skip("peak memory is read from Linux's /proc", allow_module_level=True)
pytest.importorskip("hypothesis")
import run as fuzz
from corpus import CASES


@pytest.fixture(scope="module")
def outcomes():
    """What came of every case, in one process whose memory is limited."""
    return fuzz.run_kind("corpus", 0, "fixed")


@pytest.mark.parametrize("name", CASES)
def test_case(name, outcomes):
    _, phrases = CASES[name]
    assert name in outcomes, outcomes["broken"]
    outcome = outcomes[name]
    assert not outcome["broken"], outcome["broken"]
    assert outcome["converted"] == (not phrases), outcome["message"]
    for phrase in phrases:
        assert phrase in outcome["message"], f"{phrase!r} is not in: {outcome['message']}"


@pytest.mark.parametrize("program", ["import os; os.system('true')", "open('elsewhere', 'w')", "bytearray(1 << 30)",
                                     "while True: pass"])  # fmt: skip
def test_a_broken_law_is_seen(program, tmp_path):
    """The harness itself: a converter that does one of these is caught."""
    code = (
        "import sys; from pathlib import Path; import worker, laws, convert; from corpus import directory\n"
        "worker.prepare()\n"
        f"convert.convert = lambda *_, **__: exec({program!r})\n"
        "try: laws.observe(directory(), Path(sys.argv[1]), seconds=1.0)\n"
        "except laws.LawBroken as error: print('broken:', error)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(fuzz.HERE.parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=fuzz.HERE, env=environment, capture_output=True, text=True
    )
    assert "broken:" in done.stdout, done.stdout + done.stderr
