"""What the emulator reports: faults of the program that runs, and instructions it does not know."""

from __future__ import annotations


class Fault(Exception):
    """The program did what a GPU must not be asked to do.

    Attributes:
      kind: a short slug, one of `KINDS`.
      where: the instruction at fault as written in the PTX, None outside any.
    """

    def __init__(self, kind: str, message: str, where: str | None = None) -> None:
        assert kind in KINDS, kind
        self.kind, self.message, self.where = kind, message, where
        super().__init__(f"{kind}: {message}" + (f"\n  at: {where}" if where else ""))


class UnknownInstruction(Exception):
    """PTX the emulator has no rule for. It is never skipped."""


KINDS = {
    "out-of-bounds": "an access outside every allocation",
    "misaligned": "an address that is not a multiple of the access's size",
    "uninitialised": "a read of bytes nobody has written",
    "in-flight": "an access to bytes that a cp.async is still writing",
    "race": "two warps touch one byte, one of them writes, and nothing orders the two",
    "never-written": "output bytes left untouched at the end of the launch",
    "deadlock": "threads that wait for what can no longer happen",
    "barrier": "a barrier whose count or convergence rule is broken",
    "trap": "the program stopped itself",
    "divergent": "an instruction for whole warps executed by a part of one",
}
