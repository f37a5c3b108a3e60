"""What happens before what, between the warps of a launch, as vector clocks."""

from __future__ import annotations

from collections.abc import Hashable

import numpy as np


class Clocks:
    """`seen[a, b]`: the last epoch of agent b whose accesses agent a knows to be over.

    Agents are warps, counted from 1. A barrier passes on what its warps did and know. Elsewhere it takes a flag: a
    fence or release, an atomic or volatile write, one that reads it, a fence or acquire. What is for one block only
    (`.cta`), the fence or the flag, orders nothing between blocks.

    `released[w]` is what an agent has made ready to pass on, `flagged[w]` what it has read but not acquired yet;
    w = 0: for everyone, w = 1: for its own block.
    """

    def __init__(self, agents: int, warps: int) -> None:
        self.seen = np.zeros((agents + 1, agents + 1), np.int32)
        self.epoch = np.ones(agents + 1, np.int32)
        self.epoch[0] = 0
        self.released = np.zeros((2, agents + 1, agents + 1), np.int32)
        self.flagged = np.zeros((2, agents + 1, agents + 1), np.int32)
        self.block = (np.arange(agents + 1) - 1) // warps
        self.flags: dict[Hashable, np.ndarray] = {}

    def arrive(self, agents: np.ndarray) -> np.ndarray:
        """What `agents` did, know and have ready so far, for those who wait for them at a barrier."""
        self._close(agents)
        parts = [self.seen[agents], *self.released[:, agents], *self.flagged[:, agents]]
        return np.stack([part.max(axis=0) for part in parts])

    def learn(self, agents: np.ndarray, known: np.ndarray) -> None:
        self.seen[agents] = np.maximum(self.seen[agents], known[0])
        self.released[:, agents] = np.maximum(self.released[:, agents], known[1:3, None])
        self.flagged[:, agents] = np.maximum(self.flagged[:, agents], known[3:5, None])

    def release(self, agents: np.ndarray, wide: bool) -> None:
        """What was done and is known so far is ready to be passed on by the next flag."""
        self._close(agents)
        for scope in (0, 1) if wide else (1,):
            self.released[scope, agents] = self.seen[agents]

    def acquire(self, agents: np.ndarray, wide: bool) -> None:
        """What the flags read so far passed on is now known."""
        for scope in (0, 1) if wide else (1,):
            self.seen[agents] = np.maximum(self.seen[agents], self.flagged[scope, agents])

    def write_flag(self, agent: int, flag: Hashable, wide: bool) -> None:
        if wide:
            self._raise((flag, None), self.released[0, agent])
        self._raise((flag, self.block[agent]), self.released[1, agent])

    def read_flag(self, agent: int, flag: Hashable, wide: bool) -> None:
        for scope, block in ((0, None), (1, self.block[agent])):
            passed_on = self.flags.get((flag, block))
            if passed_on is not None and (wide or scope):
                self.flagged[scope, agent] = np.maximum(self.flagged[scope, agent], passed_on)

    def _close(self, agents: np.ndarray) -> None:
        """What comes next belongs to a new epoch."""
        self.seen[agents, agents] = self.epoch[agents]
        self.epoch[agents] += 1

    def _raise(self, key: Hashable, known: np.ndarray) -> None:
        self.flags[key] = np.maximum(self.flags.get(key, 0), known)
