"""The block pool against a model of it that is too simple to be wrong."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from enginehouse.runtime.batching.kv_cache import ROOT_HASH, BlockHash, BlockPool, hash_block


def test_a_released_block_is_found_again_until_it_is_needed() -> None:
    pool = BlockPool(2)
    name = hash_block(ROOT_HASH, [1, 2, 3])
    (block,) = pool.allocate(1)
    pool.remember(block, name)
    pool.release([block])
    assert pool.num_free == 2
    assert pool.find_prefix([name]) == [block]
    pool.allocate(2)
    assert pool.find_prefix([name]) == []


def test_the_tail_of_a_sequence_is_evicted_before_its_head() -> None:
    pool = BlockPool(3)
    blocks = pool.allocate(3)
    names = [hash_block(ROOT_HASH, [i]) for i in range(3)]
    for block, name in zip(blocks, names, strict=True):
        pool.remember(block, name)
    pool.release(blocks)
    pool.allocate(1)
    assert pool.find_prefix(names) == blocks[:2]


def test_a_prefix_ends_at_the_first_unknown_block() -> None:
    pool = BlockPool(4)
    blocks = pool.allocate(3)
    names = [hash_block(ROOT_HASH, [i]) for i in range(3)]
    pool.remember(blocks[0], names[0])
    pool.remember(blocks[2], names[2])
    assert pool.find_prefix(names) == [blocks[0]]


def test_a_block_is_named_by_all_that_comes_before_it() -> None:
    first, other = hash_block(ROOT_HASH, [1, 2]), hash_block(ROOT_HASH, [2, 1])
    assert first != other
    assert hash_block(first, [3, 4]) != hash_block(other, [3, 4])
    assert hash_block(first, [3, 4]) == hash_block(first, [3, 4])


class PoolMachine(RuleBasedStateMachine):
    """Random holders allocate, share and release; counts must always add up."""

    NUM_BLOCKS = 7

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(self.NUM_BLOCKS)
        self.held: list[list[int]] = []
        self.names: dict[int, BlockHash] = {}
        self.next_name = 0

    @rule(count=st.integers(1, 3))
    def allocate(self, count: int) -> None:
        if count <= self.pool.num_free:
            blocks = self.pool.allocate(count)
            in_use = {block for holder in self.held for block in holder}
            assert not in_use & set(blocks) and len(set(blocks)) == count
            self.held.append(blocks)
            for block in blocks:
                self.names.pop(block, None)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        self.pool.release(self.held.pop(data.draw(st.integers(0, len(self.held) - 1))))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def remember(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(self.held[-1]))
        if block not in self.names:
            self.next_name += 1
            self.names[block] = hash_block(ROOT_HASH, [self.next_name])
            self.pool.remember(block, self.names[block])

    @precondition(lambda self: self.names)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(sorted(self.names)))
        found = self.pool.find_prefix([self.names[block]])
        assert found == [block], "a block not handed out since is still known by its name"
        self.pool.share(found)
        self.held.append(found)

    @invariant()
    def free_and_held_make_up_all(self) -> None:
        in_use = {block for holder in self.held for block in holder}
        assert self.pool.num_free == self.NUM_BLOCKS - len(in_use)
        assert self.pool.num_remembered == len(self.names.keys() - in_use)

    @invariant()
    def each_block_says_what_it_is(self) -> None:
        def state(block: int) -> int:
            held = sum(block in holder for holder in self.held)
            return min(held + 1, 3) if held else int(block in self.names)

        wanted = [state(block) for block in range(self.NUM_BLOCKS)]
        assert list(self.pool.states(1000)) == wanted
        some = [wanted[0], wanted[self.NUM_BLOCKS // 3], wanted[2 * self.NUM_BLOCKS // 3]]
        assert list(self.pool.states(3)) == some


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
