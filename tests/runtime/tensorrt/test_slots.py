"""Slots and steps without a model: every row is where its sequence looks for it, whatever happens.

A slot is a list of the token ids whose keys would be there; moves and steps are done to those lists
as a GPU would do them to its memory, pads and passed-over slots included.
"""

from __future__ import annotations

from collections.abc import Sequence as Several
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from enginehouse.runtime.batching.kv_cache import LONG_ROOT_HASH
from enginehouse.runtime.batching.sampling_state import SamplingState
from enginehouse.runtime.batching.scheduler import Scheduler
from enginehouse.runtime.batching.sequence import Chunk, Sequence
from enginehouse.runtime.errors import EngineError
from enginehouse.runtime.request import Request, SamplingParams
from enginehouse.runtime.tensorrt.commands import CopyRows, Move, Step, SwapRows, step_layout
from enginehouse.runtime.tensorrt.executor import share_slots
from enginehouse.runtime.tensorrt.manifest import PlanRecord
from enginehouse.runtime.tensorrt.slots import Place, SlotMemory, batch_bucket
from enginehouse.runtime.tensorrt.steps import PlannedStep, StepPlanner

GARBAGE = -1


class PlainRotary:
    """Positions turn by themselves."""

    pretrained = None

    def rows(self, positions: Tensor, contexts: Tensor) -> Tensor:
        assert contexts.shape == (len(positions), 1)
        return positions.to(torch.int32)


class Machine:
    """A scheduler over slots, and the rows that its steps would have written."""

    def __init__(
        self,
        contexts: Several[int],
        counts: Several[int],
        chunk: int = 8,
        budget: int = 24,
        prompts: int = 1,
    ) -> None:
        self.memory = SlotMemory(contexts, counts, contexts[-1])
        self.records = [PlanRecord(c, max(counts), min(chunk, c), prompts, c, []) for c in contexts]
        rotary: Any = PlainRotary()
        self.planner = StepPlanner(self.records, self.memory, rotary)
        self.scheduler = Scheduler(
            self.memory,
            max_batch_size=sum(counts),
            max_num_tokens=max(budget, sum(counts)),
            max_seq_len=contexts[-1],
        )
        self.rows = [
            [[GARBAGE] * context for _ in range(count)]
            for context, count in zip(contexts, counts, strict=True)
        ]
        self.moves: list[Move] = []
        self.steps: list[Step] = []

    def add(self, number: int, prompt: list[int], max_tokens: int, **more: Any) -> Sequence:
        params = SamplingParams(max_tokens, ignore_eos=True, **more)
        state = SamplingState(params, prompt)
        sequence = Sequence(Request(number, prompt, params), state, list(prompt))
        self.scheduler.add(sequence)
        return sequence

    def poll(self) -> list[Chunk]:
        """One iteration; the next token of a sequence is the number of its tokens plus 100."""
        chunks = self.scheduler.schedule()
        for move in self.memory.moves():
            self.moves.append(move)
            self._move(move)
        wanted: list[Chunk] = []
        for planned in self.planner.steps(chunks):
            self._step(planned)
            wanted += [chunk for chunk, _ in planned.wanted]
        assert sorted(map(id, wanted)) == sorted(id(c) for c in chunks if c.completes)
        for chunk in chunks:
            token = 100 + len(chunk.sequence.token_ids) if chunk.completes else None
            self.scheduler.settle(chunk, token, stops=False)
        for sequence in self.scheduler.running:
            known = sequence.token_ids[: sequence.num_computed]
            assert self.held(sequence)[: len(known)] == known, "a row was lost"
        return chunks

    def held(self, sequence: Sequence) -> list[int]:
        place = self.memory.place(sequence)
        return self.rows[place.plan][place.slot]

    def _move(self, move: Move) -> None:
        pool = self.rows[move.plan]
        if isinstance(move, CopyRows):
            target = self.rows[move.to_plan][move.to_slot]
            target[: move.num_rows] = pool[move.slot][: move.num_rows]
        else:
            assert isinstance(move, SwapRows)
            one, other, n = pool[move.slot], pool[move.other], move.num_rows
            one[:n], other[:n] = other[:n], one[:n]

    def _step(self, planned: PlannedStep) -> None:
        step = planned.step
        self.steps.append(step)
        limits, pool = self.records[step.plan], self.rows[step.plan]
        if step.prefill:
            assert step.batch <= limits.prefill_batch
            assert step.batch * step.tokens <= limits.chunk
        else:
            assert step.tokens == 1
        assert step.first_slot + step.batch <= len(pool) and step.looked_at <= limits.context
        fields, size = step_layout(step.batch, step.tokens)
        data = torch.frombuffer(bytearray(step.data), dtype=torch.int32)
        assert len(data) == size
        fed = {n: data[f.offset :][: f.shape[0] * (f.shape + (1,))[1]] for n, f in fields.items()}
        ids, positions = (
            fed[name].view(step.batch, step.tokens) for name in ("input_ids", "position_ids")
        )
        for row in range(step.batch):
            first = int(fed["write_indices"][row])
            assert first + step.tokens <= limits.context, "rows beyond the slot"
            slot = pool[step.first_slot + row]
            slot[first : first + step.tokens] = ids[row].tolist()
        for chunk, row in planned.wanted:
            last = int(fed["last_token_ids"][row])
            end = chunk.start + chunk.num_tokens
            assert int(positions[row, last]) == end - 1 < step.looked_at
            assert int(ids[row, last]) == chunk.sequence.token_ids[end - 1]
            assert self.memory.place(chunk.sequence) == (step.plan, step.first_slot + row)


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_every_row_is_where_its_sequence_looks_for_it(data: st.DataObject) -> None:
    """Arrivals, ends and cancels in any order, prompts that begin alike, few slots."""
    counts = data.draw(st.integers(0, 3)), data.draw(st.integers(1, 5))
    chunk, budget, prompts = data.draw(st.sampled_from([(8, 24, 1), (48, 96, 2), (80, 120, 4)]))
    machine = Machine((16, 80), counts, chunk, budget, prompts)
    stems = [list(range(n, n + 30)) for n in (200, 300)]
    number = 0
    for _ in range(data.draw(st.integers(5, 40))):
        for _ in range(data.draw(st.integers(0, 2))):
            stem = data.draw(st.sampled_from(stems))
            prompt = stem[: data.draw(st.integers(1, 30))] + data.draw(
                st.lists(st.integers(1, 9), max_size=8)
            )
            seed = data.draw(st.sampled_from([None, None, 3]))
            machine.add(number, prompt, data.draw(st.integers(1, 9)), seed=seed)
            number += 1
        running = machine.scheduler.running
        if running and data.draw(st.integers(0, 4)) == 0:
            machine.scheduler.remove(data.draw(st.sampled_from(running)))
        machine.poll()
    for _ in range(1000):
        if not machine.scheduler.running and not machine.scheduler.waiting:
            break
        assert machine.poll(), "everybody gets on"
    assert machine.memory.num_free == machine.memory.num_blocks


def test_short_prompts_of_neighbours_go_together() -> None:
    """Padded they are at most a chunk, of as many as the plan takes."""
    machine = Machine((64,), (8,), chunk=64, budget=256, prompts=4)
    lengths = [9, 16, 3, 5, 20, 2, 33, 12]
    for number, length in enumerate(lengths):
        machine.add(number, [200 + number] * length, 9)
    machine.poll()
    shapes = [(step.first_slot, step.batch, step.tokens) for step in machine.steps]
    assert shapes == [(0, 4, 16), (4, 2, 32), (6, 1, 64), (7, 1, 16)]


def test_a_prompt_whose_pads_would_leave_its_slot_goes_alone() -> None:
    machine = Machine((56,), (2,), chunk=56, budget=48, prompts=2)
    machine.add(1, [5] * 55, 1)
    machine.add(2, [6] * 16, 1)
    machine.poll()
    machine.poll()
    shapes = [(step.first_slot, step.batch, step.tokens) for step in machine.steps]
    assert shapes == [(0, 1, 56), (0, 1, 7), (1, 1, 16)]


def test_a_prefix_is_copied_and_a_continued_text_goes_on_in_its_slot() -> None:
    machine = Machine((64,), (3,))
    machine.add(1, list(range(200, 230)), 4)
    while machine.scheduler.running or machine.scheduler.waiting:
        machine.poll()
    again = machine.add(2, [*range(200, 225), 7], 2)
    machine.poll()
    assert again.num_cached_tokens == 25
    wanted = [CopyRows(0, 0, 0, 1, 25), SwapRows(0, 1, 0, 33)]
    assert machine.moves == wanted, "the first text stays; slot 0 is for what runs alone"
    longer = machine.add(3, [*range(200, 230), 130, 131, 132, 5, 6], 2)
    machine.poll()
    assert longer.num_cached_tokens == 33 and machine.memory.place(longer) == (0, 1)
    assert machine.moves == wanted


def test_the_least_recently_used_slot_is_taken() -> None:
    machine = Machine((64,), (2,))
    texts = [list(range(n, n + 20)) for n in (200, 300)]
    for number in (0, 1, 0):  # the first text was used last
        machine.add(number, texts[number], 1)
        machine.poll()
    machine.add(2, [5] * 20, 1)
    machine.poll()
    found = []
    for number, text in enumerate(texts):
        sequence = machine.add(10 + number, [*text, 9], 1)
        machine.poll()
        found.append(sequence.num_cached_tokens)
    assert found == [20, 0]


def test_keys_of_another_rotation_and_seeded_ones_are_not_reused() -> None:
    machine = Machine((64,), (4,))
    prompt = list(range(200, 230))
    for number, seed in ((1, 5), (2, None), (3, 5)):
        sequence = machine.add(number, prompt, 1, seed=seed)
        machine.poll()
        assert sequence.num_cached_tokens == 0
    longrope = machine.add(4, prompt, 1)
    longrope.root_hash = LONG_ROOT_HASH
    machine.poll()
    assert longrope.num_cached_tokens == 0


def test_a_short_request_takes_a_short_slot_and_a_long_one_waits_for_a_long() -> None:
    machine = Machine((16, 64), (1, 1))
    short = machine.add(1, [1] * 10, 6)
    second = machine.add(2, [2] * 10, 6)
    third = machine.add(3, [3] * 10, 7)
    machine.poll()
    assert machine.memory.place(short) == (0, 0)
    assert machine.memory.place(second) == (1, 0), "the long one serves when the short is taken"
    assert machine.scheduler.waiting == [third]


def test_sequences_move_together_when_a_smaller_batch_takes_them() -> None:
    machine = Machine((64,), (8,), chunk=32, budget=64)
    sequences = [machine.add(n, [200 + n] * 3, 3 if n < 4 else 30) for n in range(5)]
    machine.poll()
    assert [machine.memory.place(s).slot for s in sequences] == [0, 1, 2, 3, 4]
    for _ in range(3):
        machine.poll()
    last = sequences[4]
    assert machine.memory.place(last) == (0, 0) and machine.steps[-1].batch == 1
    assert isinstance(machine.moves[-1], SwapRows), "what slot 0 keeps is not lost"


def test_what_a_slot_keeps_makes_way_in_one_copy() -> None:
    machine = Machine((64,), (2,))
    machine.add(1, list(range(200, 220)), 1)
    machine.poll()
    machine.add(2, list(range(300, 320)), 1)
    machine.poll()
    assert machine.moves == [CopyRows(0, 0, 0, 1, 20)] and machine.steps[-1].first_slot == 0


def test_fields_of_a_step_begin_where_256_bytes_do() -> None:
    for batch, tokens in ((1, 1), (1, 512), (7, 1), (64, 1), (3, 65)):
        fields, size = step_layout(batch, tokens)
        ends = [0]
        for field in fields.values():
            assert field.offset % 64 == 0 and field.offset >= ends[-1]
            ends.append(field.offset + int(torch.Size(field.shape).numel()))
        assert size >= ends[-1]


@pytest.mark.parametrize(
    ("memory", "batch", "counts"),
    [(10_000, 64, [26, 6]), (10_000, 4, [4, 4]), (900, 64, [0, 1]), (10**6, 16, [16, 16])],
)
def test_memory_is_shared_between_contexts(memory: int, batch: int, counts: list[int]) -> None:
    """Rows of one byte and contexts of 200 and 800; a batch bounds both."""
    found = share_slots([200, 800], 1, memory, [batch, batch])
    assert found == counts
    assert sum(n * size for n, size in zip(found, (200, 800), strict=True)) <= memory


def test_each_context_has_no_more_slots_than_its_batch() -> None:
    assert share_slots([200, 800], 1, 100_000, [8, 2]) == [8, 2]
    assert share_slots([200, 800], 1, 100_000, [2, 8]) == [2, 8]


def test_too_little_memory_for_one_sequence_is_refused() -> None:
    with pytest.raises(EngineError, match="one sequence of 800 tokens needs .* lower max_seq_len"):
        share_slots([200, 800], 1, 799, [8, 8])


def test_batches_are_powers_of_two_up_to_the_slots() -> None:
    assert [batch_bucket(n, 12) for n in (1, 2, 3, 5, 8, 9, 12)] == [1, 2, 4, 8, 8, 12, 12]
    assert Place(0, 3) == (0, 3)
