"""What happens before what, between the warps of a launch, as vector clocks."""

from __future__ import annotations

import numpy as np


class Clocks:
    """`seen[a, b]`: the last epoch of agent b whose accesses agent a knows to be over.

    Agents count from 1. A barrier passes on what its warps did and know; between blocks it takes a fence (or a
    release), an atomic on both sides, and a fence (or an acquire). Fences for one block only order nothing here.
    """

    def __init__(self, agents: int) -> None:
        self.seen = np.zeros((agents + 1, agents + 1), np.int32)
        self.epoch = np.ones(agents + 1, np.int32)
        self.epoch[0] = 0
        self.released = np.zeros_like(self.seen)
        self.flagged = np.zeros_like(self.seen)
        self.flags: dict[int, np.ndarray] = {}

    def arrive(self, agents: np.ndarray) -> np.ndarray:
        """What `agents` did and know so far, for those who wait for them at a barrier."""
        self.seen[agents, agents] = self.epoch[agents]
        self.epoch[agents] += 1
        return self.seen[agents].max(axis=0)

    def learn(self, agents: np.ndarray, known: np.ndarray) -> None:
        self.seen[agents] = np.maximum(self.seen[agents], known)

    def release(self, agents: np.ndarray) -> None:
        """What was done and known so far is ready to be passed on by the next atomic or volatile write."""
        self.seen[agents, agents] = self.epoch[agents]
        self.epoch[agents] += 1
        self.released[agents] = self.seen[agents]

    def acquire(self, agents: np.ndarray) -> None:
        """What the flags read so far passed on is now known."""
        self.seen[agents] = np.maximum(self.seen[agents], self.flagged[agents])

    def write_flag(self, agent: int, address: int) -> None:
        self.flags[address] = np.maximum(self.flags.get(address, 0), self.released[agent])

    def read_flag(self, agent: int, address: int) -> None:
        if address in self.flags:
            self.flagged[agent] = np.maximum(self.flagged[agent], self.flags[address])
