"""Kernels compiled from CUDA C++ by NVIDIA's compiler give what numpy gives, in any order of their blocks."""

import numpy as np
import pytest

from ptx.faults import KINDS, Fault
from ptx.fixtures.programs import FAULTS, PROGRAMS
from ptx.running import run

SEEDS = [None, 0, 1]


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.name)
@pytest.mark.parametrize("seed", SEEDS)
def test_a_program_agrees_with_numpy(program, seed):
    found = run(program, seed)
    for name, expected in program.results().items():
        assert found[name].dtype == np.asarray(expected).dtype or program.rtol or program.atol, name
        if program.rtol or program.atol:
            np.testing.assert_allclose(
                found[name].astype(np.float64), expected.astype(np.float64), program.rtol, program.atol, err_msg=name
            )
        else:
            np.testing.assert_array_equal(found[name], expected, err_msg=name)


@pytest.mark.parametrize("pair", FAULTS, ids=lambda pair: pair.name)
@pytest.mark.parametrize("seed", SEEDS)
def test_a_planted_fault_is_found_and_its_sound_twin_passes(pair, seed):
    found = run(pair.sound, seed)
    for name, expected in pair.sound.results().items():
        np.testing.assert_array_equal(found[name], expected, err_msg=name)
    with pytest.raises(Fault) as caught:
        run(pair.faulty, seed)
    assert caught.value.kind == pair.kind


def test_every_kind_of_fault_is_planted():
    assert {pair.kind for pair in FAULTS} == set(KINDS)
