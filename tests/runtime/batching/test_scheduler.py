"""In-flight batching without a model: who computes what, and that everybody ends."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from enginehouse.runtime.batching.block_memory import BlockMemory
from enginehouse.runtime.batching.drafts import Speculation
from enginehouse.runtime.batching.kv_cache import BlockPool
from enginehouse.runtime.batching.prefill_budget import PrefillBudget
from enginehouse.runtime.batching.sampling_state import SamplingState
from enginehouse.runtime.batching.scheduler import Scheduler
from enginehouse.runtime.batching.sequence import Chunk, Sequence
from enginehouse.runtime.request import GIVES_WAY, FinishReason, Request, SamplingParams

BLOCK = 4


def make_scheduler(
    num_blocks: int = 64,
    max_batch_size: int = 4,
    max_num_tokens: int = 16,
    max_seq_len: int = 64,
    speculation: Speculation | None = None,
) -> Scheduler:
    return Scheduler(
        BlockMemory(BlockPool(num_blocks), BLOCK),
        max_batch_size=max_batch_size,
        max_num_tokens=max_num_tokens,
        max_seq_len=max_seq_len,
        prefill=None if speculation is None else PrefillBudget(),
        speculation=speculation,
    )


def make_sequence(
    number: int,
    prompt: list[int],
    max_tokens: int = 4,
    priority: int = 0,
    seed: int | None = None,
) -> Sequence:
    params = SamplingParams(max_tokens, seed=seed)
    request = Request(number, prompt, params, priority)
    return Sequence(request, SamplingState(params, prompt), list(prompt))


def step(scheduler: Scheduler, token: Callable[[Chunk], int] = lambda chunk: 7) -> list[Chunk]:
    chunks = scheduler.schedule()
    for chunk in chunks:
        scheduler.settle(chunk, token(chunk) if chunk.completes else None, stops=False)
    return chunks


def shape(chunks: list[Chunk]) -> list[tuple[int, int, int]]:
    return [(c.sequence.request.request_id, c.start, c.num_tokens) for c in chunks]


def drafts_of(chunks: list[Chunk]) -> list[tuple[int, ...]]:
    return [chunk.draft for chunk in chunks if chunk.draft]


def test_a_new_sequence_joins_while_another_decodes() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_sequence(1, [1, 2, 3]))
    assert shape(step(scheduler)) == [(1, 0, 3)]
    scheduler.add(make_sequence(2, [4, 5]))
    assert shape(step(scheduler)) == [(1, 3, 1), (2, 0, 2)]
    assert shape(step(scheduler)) == [(1, 4, 1), (2, 2, 1)]


def test_a_long_prompt_is_cut_so_that_running_streams_go_on() -> None:
    scheduler = make_scheduler(max_num_tokens=8)
    scheduler.add(make_sequence(1, [1, 2], max_tokens=20))
    step(scheduler)
    scheduler.add(make_sequence(2, list(range(100, 120))))
    assert shape(step(scheduler)) == [(1, 2, 1), (2, 0, 7)]
    assert shape(step(scheduler)) == [(1, 3, 1), (2, 7, 7)]
    assert shape(step(scheduler)) == [(1, 4, 1), (2, 14, 6)]
    assert shape(step(scheduler)) == [(1, 5, 1), (2, 20, 1)]


def test_a_finished_sequence_makes_room_in_the_next_iteration() -> None:
    scheduler = make_scheduler(max_batch_size=1)
    scheduler.add(make_sequence(1, [1], max_tokens=1))
    scheduler.add(make_sequence(2, [2], max_tokens=1))
    assert shape(step(scheduler)) == [(1, 0, 1)]
    assert shape(step(scheduler)) == [(2, 0, 1)]
    assert not scheduler.running and not scheduler.waiting


def test_a_shared_prefix_is_computed_once() -> None:
    scheduler = make_scheduler()
    prompt = list(range(10))
    scheduler.add(make_sequence(1, prompt))
    step(scheduler)
    second = make_sequence(2, prompt[:9] + [99])
    scheduler.add(second)
    assert shape(step(scheduler))[1] == (2, 8, 2), "two full blocks of four were there already"
    assert second.num_cached_tokens == 8


def test_choices_of_one_request_share_the_prefix_within_one_iteration() -> None:
    scheduler = make_scheduler(max_num_tokens=64)
    for number in (1, 2, 3):
        scheduler.add(make_sequence(number, list(range(9))))
    assert shape(step(scheduler)) == [(1, 0, 9), (2, 8, 1), (3, 8, 1)]


def test_the_last_prompt_token_is_always_computed() -> None:
    scheduler = make_scheduler()
    for number in (1, 2):
        scheduler.add(make_sequence(number, list(range(8))))
        chunks = step(scheduler)
    assert shape(chunks)[-1] == (2, 4, 4)


def test_the_youngest_is_preempted_and_computed_again() -> None:
    scheduler = make_scheduler(num_blocks=4, max_num_tokens=32, max_seq_len=16)
    old, young = make_sequence(1, [1] * 7, 9), make_sequence(2, [2] * 4, 9)
    scheduler.add(old)
    scheduler.add(young)
    assert scheduler.preempted() == (), "they wait, and have not run"
    assert len(step(scheduler)) == 2
    reasons, waiting = [], []
    for _ in range(30):
        for chunk in scheduler.schedule():
            token = len(chunk.sequence.token_ids) if chunk.completes else None
            reasons.append(scheduler.settle(chunk, token, stops=False))
        waiting.append(scheduler.preempted())
    assert scheduler.num_preemptions > 0
    assert waiting[0] == waiting[-1] == () and set(waiting) == {(), (2,)}
    assert reasons.count(FinishReason.LENGTH) == 2
    assert old.token_ids[7:] == [7, *range(8, 16)]
    assert young.token_ids[4:] == [7, *range(5, 13)], "nothing was lost or sampled twice"
    assert scheduler.memory.num_free == 4


def test_the_lower_priority_runs_first_and_equals_in_their_order() -> None:
    scheduler = make_scheduler(max_batch_size=1)
    for number, priority in ((1, 5), (2, 0), (3, -1), (4, 0)):
        scheduler.add(make_sequence(number, [number], max_tokens=1, priority=priority))
    order = [shape(step(scheduler))[0][0] for _ in range(4)]
    assert order == [3, 2, 4, 1]


def test_the_victim_is_of_the_lowest_priority_and_among_those_the_latest() -> None:
    scheduler = make_scheduler(num_blocks=6, max_num_tokens=32, max_seq_len=16)
    for number, priority in ((1, 3), (2, 0), (3, 3)):
        scheduler.add(make_sequence(number, [number] * 6, 10, priority))
    finished = []
    for _ in range(60):
        for chunk in scheduler.schedule():
            token = 7 if chunk.completes else None
            if scheduler.settle(chunk, token, stops=False):
                finished.append(chunk.sequence.request.request_id)
    assert scheduler.num_preemptions > 0
    assert finished == [2, 1, 3]
    assert scheduler.memory.num_free == 6


def test_a_sequence_with_a_seed_shares_no_blocks() -> None:
    scheduler = make_scheduler()
    prompt = list(range(10))
    for number, seed in ((1, None), (2, 5), (3, 5), (4, None)):
        scheduler.add(make_sequence(number, prompt, seed=seed))
        chunks = step(scheduler)
        wanted = (number, 8, 2) if number == 4 else (number, 0, 10)
        assert shape(chunks)[-1] == wanted


def test_deterministic_chunks_do_not_depend_on_neighbours() -> None:
    def chunks_of_seven(crowd: int) -> list[tuple[int, int, int]]:
        scheduler = Scheduler(
            BlockMemory(BlockPool(64), BLOCK, shares=False),
            max_batch_size=4,
            max_num_tokens=16,
            max_seq_len=64,
            deterministic=True,
        )
        for number in range(crowd):
            scheduler.add(make_sequence(number, [number] * (3 + number), 6))
        scheduler.add(make_sequence(7, list(range(30)), 5))
        seen = []
        for _ in range(60):
            seen += [chunk for chunk in shape(step(scheduler)) if chunk[0] == 7]
        return seen

    alone = chunks_of_seven(0)
    assert alone[:3] == [(7, 0, 12), (7, 12, 12), (7, 24, 6)]
    assert all(chunks_of_seven(crowd) == alone for crowd in (1, 2, 3))


class Fixed(PrefillBudget):
    def tokens(self, num_decodes: int) -> int:
        return 3 * num_decodes


@pytest.mark.parametrize("deterministic", [False, True])
def test_prompts_are_bounded_beside_decodes_alone(deterministic: bool) -> None:
    scheduler = Scheduler(
        BlockMemory(BlockPool(64), 4),
        max_batch_size=4,
        max_num_tokens=16,
        max_seq_len=64,
        prefill=Fixed(),
        deterministic=deterministic,
    )
    scheduler.add(make_sequence(1, [1, 2], max_tokens=30))
    scheduler.add(make_sequence(2, list(range(100, 109))))
    assert shape(step(scheduler)) == [(1, 0, 2), (2, 0, 9)], "nothing decoded yet"
    scheduler.add(make_sequence(3, list(range(200, 210))))
    scheduler.add(make_sequence(4, list(range(300, 310))))
    found = [shape(step(scheduler)) for _ in range(3)]
    if deterministic:
        assert found[0] == [(1, 2, 1), (2, 9, 1), (3, 0, 10)]
    else:
        assert found[0] == [(1, 2, 1), (2, 9, 1), (3, 0, 6)]
        assert found[1] == [(1, 3, 1), (2, 10, 1), (3, 6, 4), (4, 0, 2)], "together"
        assert found[2] == [(1, 4, 1), (2, 11, 1), (3, 10, 1), (4, 2, 8)], "three decode now"


def test_a_cancelled_sequence_gives_its_blocks_back() -> None:
    scheduler = make_scheduler()
    running, waiting = make_sequence(1, [1] * 9), make_sequence(2, [2])
    scheduler.add(running)
    step(scheduler)
    scheduler.add(waiting)
    scheduler.remove(running)
    scheduler.remove(waiting)
    assert scheduler.memory.num_free == 64 and scheduler.schedule() == []


def test_the_context_ends_a_sequence() -> None:
    scheduler = make_scheduler(max_seq_len=6)
    scheduler.add(make_sequence(1, [1, 2, 3], max_tokens=50))
    for _ in range(2):
        step(scheduler)
    (chunk,) = scheduler.schedule()
    assert scheduler.settle(chunk, 7, stops=False) is FinishReason.LENGTH


@settings(max_examples=60, deadline=None)
@given(
    prompts=st.lists(st.integers(1, 30), min_size=1, max_size=9),
    max_tokens=st.integers(1, 12),
    num_blocks=st.integers(11, 30),
    max_num_tokens=st.integers(4, 40),
    join_every=st.integers(0, 5),
    speculation=st.sampled_from([None, Speculation(3, 2, 4), Speculation(40, 1, 2)]),
)
def test_everybody_ends_with_the_right_tokens_however_little_memory_there_is(
    prompts: list[int],
    max_tokens: int,
    num_blocks: int,
    max_num_tokens: int,
    join_every: int,
    speculation: Speculation | None,
) -> None:
    """Drafts, none of which is kept here, take room that nobody else wants and stay in bounds."""
    scheduler = make_scheduler(num_blocks, 4, max_num_tokens, 44, speculation)
    sequences = [make_sequence(n, [n % 3] * length, max_tokens) for n, length in enumerate(prompts)]
    todo, reasons = list(sequences), []
    for turn in range(4000):
        if todo and (join_every == 0 or turn % join_every == 0):
            scheduler.add(todo.pop(0))
        if not todo and not scheduler.running and not scheduler.waiting:
            break
        chunks = scheduler.schedule()
        assert sum(chunk.num_rows for chunk in chunks) <= max_num_tokens
        assert not speculation or len(chunks) <= speculation.batch_size or not drafts_of(chunks)
        assert len({id(chunk.sequence) for chunk in chunks}) == len(chunks)
        for chunk in chunks:
            held = len(chunk.sequence.blocks) * BLOCK
            assert chunk.start == chunk.sequence.num_computed
            assert chunk.start + chunk.num_rows <= min(held, scheduler.max_seq_len)
            left = max_tokens - chunk.sequence.num_generated
            assert len(chunk.draft) < left and (not chunk.draft or chunk.num_tokens == 1)
            token = 500 + len(chunk.sequence.token_ids) % 3 if chunk.completes else None
            reasons.append(scheduler.settle(chunk, token, stops=False))
    assert reasons.count(FinishReason.LENGTH) == len(prompts)
    for sequence, length in zip(sequences, prompts, strict=True):
        generated = sequence.token_ids[length:]
        assert generated == [500 + (length + i) % 3 for i in range(max_tokens)]
    assert scheduler.memory.num_free == num_blocks


def test_tokens_are_drafted_beside_few_and_never_beside_a_prompt() -> None:
    scheduler = make_scheduler(speculation=Speculation(3, 2, 2), max_num_tokens=16)
    for number in (1, 2):
        scheduler.add(make_sequence(number, [1, 2, 3] * 4, max_tokens=30))
    counted = {}
    for turn in range(20):
        if turn == 8:
            scheduler.add(make_sequence(3, [8] * 12, max_tokens=8))
        chunks = step(scheduler, lambda chunk: 1 + len(chunk.sequence.token_ids) % 3)
        counted[turn] = len(drafts_of(chunks))
    assert [counted[turn] for turn in (7, 8, 12, 19)] == [2, 0, 0, 2]


def test_who_gives_way_is_computed_only_while_nobody_else_is_there() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_sequence(1, [1, 2, 3], max_tokens=8, priority=GIVES_WAY))
    assert shape(step(scheduler)) == [(1, 0, 3)]
    assert shape(step(scheduler)) == [(1, 3, 1)]
    scheduler.add(make_sequence(2, [4, 5], max_tokens=2, priority=GIVES_WAY - 1))
    scheduler.add(make_sequence(3, [6], priority=GIVES_WAY + 5))
    assert shape(step(scheduler)) == [(2, 0, 2)]
    assert shape(step(scheduler)) == [(2, 2, 1)]
    assert shape(step(scheduler)) == [(1, 4, 1), (3, 0, 1)], "it kept what it had computed"
    assert scheduler.num_preemptions == 0


def test_who_gives_way_leaves_the_batch_and_the_memory_to_others() -> None:
    scheduler = make_scheduler(num_blocks=17, max_batch_size=2)
    for number in (1, 2):
        scheduler.add(make_sequence(number, [1, 2, 3], max_tokens=8, priority=GIVES_WAY))
    assert len(step(scheduler)) == 2
    scheduler.add(make_sequence(3, [4, 5], max_tokens=2))
    assert shape(step(scheduler)) == [(3, 0, 2)]
    assert scheduler.num_preemptions == 1, "the batch was full"
    scheduler.add(make_sequence(4, list(range(60)), max_tokens=1))
    while any(sequence.request.request_id in (3, 4) for sequence in scheduler.running):
        assert {number for number, *_ in shape(step(scheduler))} <= {3, 4}
    while scheduler.running or scheduler.waiting:
        step(scheduler)
    assert scheduler.memory.num_free == 17
