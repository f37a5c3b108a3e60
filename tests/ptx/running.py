"""Fixtures' launches on the emulator."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np

from ptx.faults import Fault
from ptx.fixtures.launches import Program, Unwritten
from ptx.launch import DeviceMemory, Launch
from ptx.parser import Module, parse

FIXTURES = Path(__file__).parent / "fixtures"


@cache
def module(file: str) -> Module:
    return parse((FIXTURES / file).read_text())


def run(program: Program, seed: int | None = None) -> dict[str, np.ndarray]:
    """Launches a fixture; the buffers' contents by name.

    Raises:
      Fault: also when a buffer that the kernel is to write keeps a byte nobody wrote.
    """
    arguments = program.make()
    buffers = {name: a for name, a in arguments.items() if not isinstance(a, np.generic)}
    shapes = {name: (a.shape, np.dtype(a.dtype)) for name, a in buffers.items()}
    device = DeviceMemory([int(np.prod(shape)) * dtype.itemsize for shape, dtype in shapes.values()])
    place = {name: i for i, name in enumerate(buffers)}
    for name, a in buffers.items():
        if not isinstance(a, Unwritten):
            device.write(place[name], a)
    Launch(
        module(program.file),
        program.kernel,
        program.grid,
        program.block,
        [device.addresses[place[name]] if name in place else a for name, a in arguments.items()],
        device.memory,
        dynamic_shared=program.dynamic_shared,
        seed=seed,
    )
    for name in program.results():
        if device.unwritten(place[name]):
            raise Fault("never-written", f"{device.unwritten(place[name])} bytes of {name}")
    return {name: device.read(i, shapes[name][1], shapes[name][0]) for name, i in place.items()}
