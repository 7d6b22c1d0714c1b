"""Which replica a request goes to: the one that has computed the longest part of its prompt.

    what it has computed     a conversation comes back to where it was, within a bound of the load
    what begins many prompts a system prompt draws no conversation: every replica will have it
    else                     rendezvous hashing of the conversation's own beginning, within the same
                             bound: workers that know nothing of each other agree

Pure: no I/O and no clock. RoundRobin and LeastLoaded are there to compare with.
Source: Mirrokni, Thorup, Zadimoghaddam, "Consistent Hashing with Bounded Loads", 2018; Ray Serve's
PrefixCacheAffinityRouter and the Gateway API inference extension's prefix scorer.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from xxhash import xxh3_64_intdigest

from enginehouse.server.replicas.prefix_blocks import PrefixBlocks
from enginehouse.server.replicas.prefix_memory import PrefixMemory, SharedPrefixes

_MIN_WAYS = 4  # on from a block that is no conversation's own


class Router(Protocol):
    """How requests are spread over replicas."""

    def choose(self, prompt_ids: Sequence[int], loads: Mapping[str, float]) -> str:
        """The name of the replica that is to run this prompt.

        loads: of each replica that is ready now, the sequences that it runs or that wait there.
        ValueError when there is none.
        """

    def forget(self, name: str) -> None:
        """A replica is gone, and its KV cache with it."""


class PrefixRouter:
    """Prefix-aware, with bounded loads.

    block_tokens: prompts are compared in blocks of so many. load_bound: a replica that would have
    more than load_bound times the mean load, rounded up, is passed over. max_blocks: remembered of
    each replica. max_prompt_blocks: looked at of a prompt.
    """

    def __init__(
        self,
        block_tokens: int = 64,
        load_bound: float = 1.25,
        max_blocks: int = 16_384,
        max_prompt_blocks: int = 512,
    ) -> None:
        if block_tokens < 1 or load_bound < 1 or max_blocks < 1 or max_prompt_blocks < 1:
            raise ValueError("wanted blocks of one token or more, and a load_bound of 1 or more")
        self._block_tokens, self._load_bound = block_tokens, load_bound
        self._max_blocks, self._max_prompt_blocks = max_blocks, max_prompt_blocks
        self._memories: dict[str, PrefixMemory] = {}
        self._shared = SharedPrefixes(max_blocks, _MIN_WAYS)

    def choose(self, prompt_ids: Sequence[int], loads: Mapping[str, float]) -> str:
        """See Router.choose. Where it is sent, the prompt counts as computed from now on."""
        blocks = PrefixBlocks(prompt_ids, self._block_tokens, self._max_prompt_blocks)
        name = self._choose(blocks, _within_bound(loads, self._load_bound))
        self._memories.setdefault(name, PrefixMemory(self._max_blocks)).remember(blocks)
        self._shared.remember(blocks)
        return name

    def forget(self, name: str) -> None:
        self._memories.pop(name, None)

    def num_matched(self, prompt_ids: Sequence[int], name: str) -> int:
        """Tokens at the prompt's start that this replica was sent before, as far as is known."""
        memory = self._memories.get(name)
        blocks = PrefixBlocks(prompt_ids, self._block_tokens, self._max_prompt_blocks)
        return 0 if memory is None else memory.num_matched(blocks)

    def _choose(self, blocks: PrefixBlocks, names: list[str]) -> str:
        """Of replicas that are within the bound."""
        shared = self._shared.depth(blocks)
        matched = {
            name: self._memories[name].num_matched(blocks)
            for name in names
            if name in self._memories
        }
        most = max(matched.values(), default=0)
        if most > shared * self._block_tokens:
            names = [name for name in names if matched.get(name) == most]
        own = blocks.hashes[shared] if shared < len(blocks.hashes) else blocks.last()
        key = blocks.parent(shared) if own is None else own
        return max(names, key=lambda name: (xxh3_64_intdigest(name.encode(), key), name))


class RoundRobin:
    """Each in turn, whatever the load or the prompt."""

    def __init__(self) -> None:
        self._turn = itertools.count()

    def choose(self, prompt_ids: Sequence[int], loads: Mapping[str, float]) -> str:
        names = _names(loads)
        return names[next(self._turn) % len(names)]

    def forget(self, name: str) -> None:
        """It keeps nothing."""


class LeastLoaded:
    """The one with the least to do; of equals each in turn."""

    def __init__(self) -> None:
        self._turn = itertools.count()

    def choose(self, prompt_ids: Sequence[int], loads: Mapping[str, float]) -> str:
        names = _names(loads)
        least = min(loads.values())
        equals = [name for name in names if loads[name] == least]
        return equals[next(self._turn) % len(equals)]

    def forget(self, name: str) -> None:
        """It keeps nothing."""


ROUTERS: dict[str, Callable[[], Router]] = {
    "prefix": PrefixRouter,
    "round_robin": RoundRobin,
    "least_loaded": LeastLoaded,
}


def _names(loads: Mapping[str, float]) -> list[str]:
    if not loads:
        raise ValueError("there is no replica to choose from")
    return sorted(loads)


def _within_bound(loads: Mapping[str, float], load_bound: float) -> list[str]:
    """Those that may take one more: load_bound times the mean that there is then, rounded up. Those
    with the least always may.
    """
    names = _names(loads)
    most = math.ceil(load_bound * (sum(loads.values()) + 1) / len(names))
    least = min(loads.values())
    return [name for name in names if loads[name] + 1 <= most or loads[name] == least]
