"""The router of replicas, held to plain searches over everything that it was ever given."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from enginehouse.server.replicas.prefix_blocks import PrefixBlocks
from enginehouse.server.replicas.prefix_memory import PrefixMemory
from enginehouse.server.replicas.prefix_router import LeastLoaded, PrefixRouter, RoundRobin, Router

IDLE = dict.fromkeys("abcd", 0.0)


def ids(rng: random.Random, num_tokens: int) -> list[int]:
    return [rng.randrange(100, 50_000) for _ in range(num_tokens)]


def common(one: list[int], other: list[int]) -> int:
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


@pytest.mark.parametrize("block_tokens", [1, 4, 64])
def test_what_is_matched_is_what_comparing_all_prompts_token_by_token_finds(
    block_tokens: int,
) -> None:
    """In full blocks of any earlier prompt, and beyond them up to where one ended."""
    rng = random.Random(5)
    memory, before = PrefixMemory(100_000), list[list[int]]()
    for _ in range(300):
        start = rng.choice(before)[: rng.randrange(200)] if before and rng.random() < 0.8 else []
        prompt = start + [rng.randrange(3) for _ in range(rng.randrange(1, 150))]
        full = max((common(prompt, old) // block_tokens for old in before), default=0)
        ended = [
            len(old)
            for old in before
            if old == prompt[: len(old)] and len(old) // block_tokens == full
        ]
        blocks = PrefixBlocks(prompt, block_tokens, 512)
        assert memory.num_matched(blocks) == max([full * block_tokens, *ended])
        memory.remember(blocks)
        before.append(prompt)


def test_a_conversation_stays_where_it_began_and_conversations_are_spread() -> None:
    rng = random.Random(1)
    router = PrefixRouter()
    system = ids(rng, 700)
    talks = [system + ids(rng, 20) for _ in range(200)]
    homes = [router.choose(talk, IDLE) for talk in talks]
    assert min(Counter(homes).values()) > 20, Counter(homes)
    for _ in range(3):
        talks = [talk + ids(rng, 90) for talk in talks]
        assert [router.choose(talk, IDLE) for talk in talks] == homes


def test_no_replica_is_chosen_beyond_the_bound_and_some_replica_always_is() -> None:
    rng = random.Random(2)
    router = PrefixRouter(load_bound=1.25)
    talks = [ids(rng, 200) for _ in range(10)]
    for _ in range(500):
        loads = {name: float(rng.choice((0, 1, 5, 40))) for name in "abcde"[: rng.randrange(1, 6)]}
        name = router.choose(rng.choice(talks), loads)
        most = -(-5 * int(sum(loads.values()) + 1) // (4 * len(loads)))  # in whole numbers
        assert loads[name] + 1 <= most, loads


def test_workers_agree_without_talking_and_a_new_replica_moves_its_share_alone() -> None:
    rng = random.Random(3)
    talks = [ids(rng, 130) for _ in range(400)]
    homes = [PrefixRouter().choose(talk, IDLE) for talk in talks]
    assert homes == [PrefixRouter().choose(talk + ids(rng, 300), IDLE) for talk in talks]
    after = [PrefixRouter().choose(talk, {**IDLE, "e": 0.0}) for talk in talks]
    moved = [new for old, new in zip(homes, after, strict=True) if old != new]
    assert set(moved) == {"e"} and 40 < len(moved) < 120  # a fifth of 400


def test_a_replica_that_is_gone_is_forgotten_and_one_that_is_full_hands_over() -> None:
    router = PrefixRouter()
    talk = ids(random.Random(4), 300)
    home = router.choose(talk, IDLE)
    assert router.num_matched(talk, home) == 300
    others = {name: 0.0 for name in IDLE if name != home}
    second = router.choose(talk, {**others, home: 9.0})
    assert second != home and router.num_matched(talk, second) == 300
    router.forget(home)
    assert router.num_matched(talk, home) == 0
    assert router.choose(talk + [7], IDLE) == second


def test_memory_is_bounded_and_loses_the_ends_of_the_oldest_prompts_first() -> None:
    memory = PrefixMemory(10)
    old, new = list(range(64)), list(range(1000, 1032))
    memory.remember(PrefixBlocks(old, 8, 512))
    memory.remember(PrefixBlocks(new, 8, 512))
    assert len(memory) == 10
    assert memory.num_matched(PrefixBlocks(new, 8, 512)) == 32
    assert memory.num_matched(PrefixBlocks(old, 8, 512)) == 48  # 8 blocks and 4 are 2 too many


@pytest.mark.parametrize("router", [PrefixRouter(), RoundRobin(), LeastLoaded()])
def test_any_router_takes_a_prompt_of_any_length_and_says_when_there_is_no_replica(
    router: Router,
) -> None:
    for prompt in ([], [5], [5] * 63, [5] * 64, [2**32 - 1] * 100_000):
        assert router.choose(prompt, {"a": 3.0}) == "a"
    router.forget("a")
    router.forget("never seen")
    with pytest.raises(ValueError, match="no replica"):
        router.choose([1], {})


def test_what_it_is_compared_with() -> None:
    turns, least = RoundRobin(), LeastLoaded()
    assert [turns.choose([1], {"b": 9.0, "a": 0.0}) for _ in range(4)] == ["a", "b", "a", "b"]
    assert least.choose([1], {"a": 2.0, "b": 1.0, "c": 1.5}) == "b"
    assert {least.choose([1], IDLE) for _ in range(4)} == set(IDLE)


def test_bad_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="load_bound"):
        PrefixRouter(load_bound=0.9)
