"""A share of the fuzzed inputs, the same ones each time; `make fuzz` runs more."""

from __future__ import annotations

from pathlib import Path

import pytest

if not Path("/proc/self/clear_refs").exists():
    pytest.skip("peak memory is read from Linux's /proc", allow_module_level=True)
pytest.importorskip("hypothesis")
import run as fuzz

INPUTS = 60  # of each kind


@pytest.mark.parametrize("kind", fuzz.KINDS)
def test_every_input_is_converted_or_refused(kind):
    summary = fuzz.run_kind(kind, INPUTS, "fixed")
    print(fuzz.show([summary]))
    assert not summary["broken"], fuzz.show([summary])
    assert summary["inputs"] >= INPUTS and summary["converted"] and summary["refused"]
