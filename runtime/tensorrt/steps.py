"""From an iteration's chunks to the steps of TensorRT's plans: batches, buckets, padding.

Sequences that decode go together, one step for each plan that has any; then the prompts' chunks:
short ones of neighbouring slots together, others by themselves, in pieces that the plan takes.
Sizes come from few buckets, as every shape has kernels of its own to be made. Knows no TensorRT and
no device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from enginehouse.runtime.batching.sequence import Chunk
from enginehouse.runtime.tensorrt.commands import Step, step_layout
from enginehouse.runtime.tensorrt.inputs import RotaryInputs
from enginehouse.runtime.tensorrt.manifest import PlanRecord
from enginehouse.runtime.tensorrt.slots import Place, SlotMemory, batch_bucket

_LEAST_TOKENS = 16
_LEAST_ROWS = 256


class PlannedStep(NamedTuple):
    """wanted: the chunks behind whose last token logits are wanted, each with its row of them.

    Those complete their sequence, or are of one token and score a prompt's next.
    """

    step: Step
    wanted: list[tuple[Chunk, int]]


class StepPlanner:
    """Turns chunks into steps over the slots where their sequences are."""

    def __init__(
        self, plans: Sequence[PlanRecord], memory: SlotMemory, rotary: RotaryInputs
    ) -> None:
        self.plans = plans
        self.memory = memory
        self.rotary = rotary

    def steps(self, chunks: Sequence[Chunk]) -> Iterator[PlannedStep]:
        """Every step of an iteration. A slot that a step only passes over gets one row written
        behind its own, which whoever has the slot writes over.
        """
        decodes: dict[int, list[Chunk]] = {}
        prompts = []
        for chunk in chunks:
            if chunk.num_tokens == 1:
                decodes.setdefault(self.memory.place(chunk.sequence).plan, []).append(chunk)
            else:
                prompts.append(chunk)
        for plan, together in decodes.items():
            yield self._decode(plan, together)
        prompts.sort(key=lambda chunk: self.memory.place(chunk.sequence))
        while prompts:
            count = self._num_together(prompts)
            yield from self._prefill(prompts[:count])
            del prompts[:count]

    def warm_up(self) -> Iterator[Step]:
        """A step of each decode batch and of a whole chunk, over slots that hold nothing: kernels
        are made, and what cannot run shows, before there is a request.
        """
        for plan, limits in enumerate(self.plans):
            num_slots, batch = self.memory.num_slots(plan), 0
            while batch < num_slots:
                batch = batch_bucket(batch + 1, num_slots)
                yield self._idle(plan, batch, 1)
            if num_slots:
                yield self._idle(plan, 1, limits.chunk)

    def _idle(self, plan: int, batch: int, tokens: int) -> Step:
        return self._step(
            Place(plan, 0),
            ids=torch.zeros(batch, tokens, dtype=torch.int64),
            positions=torch.arange(tokens).expand(batch, tokens),
            starts=torch.zeros(batch, dtype=torch.int64),
            last=torch.full((batch, 1), tokens - 1),
            contexts=torch.ones(batch, 1, dtype=torch.int64),
            looked_at=self._rows(plan, tokens),
            prefill=tokens > 1,
        )

    def _decode(self, plan: int, chunks: list[Chunk]) -> PlannedStep:
        by_slot = {self.memory.place(chunk.sequence).slot: chunk for chunk in chunks}
        num_slots = self.memory.num_slots(plan)
        batch = batch_bucket(max(by_slot) - min(by_slot) + 1, num_slots)
        first = min(min(by_slot), num_slots - batch)
        ids, starts, contexts = [], [], []
        positions = []
        for slot in range(first, first + batch):
            chunk = by_slot.get(slot)
            if chunk is None:
                ids.append(0)
                positions.append(0)
                starts.append(self.memory.num_rows(Place(plan, slot)))
                contexts.append(1)
            else:
                ids.append(chunk.sequence.token_ids[chunk.start])
                positions.append(chunk.start)
                starts.append(chunk.start)
                contexts.append(len(chunk.sequence.token_ids))
        looked_at = self._rows(plan, max(chunk.start for chunk in chunks) + 1)
        step = self._step(
            Place(plan, first),
            ids=torch.tensor(ids).unsqueeze(1),
            positions=torch.tensor(positions).unsqueeze(1),
            starts=torch.tensor(starts),
            last=torch.zeros(batch, 1),
            contexts=torch.tensor(contexts).unsqueeze(1),
            looked_at=looked_at,
            prefill=False,
        )
        wanted = [
            (chunk, slot - first)
            for slot, chunk in by_slot.items()
            if chunk.chooses or chunk.scored
        ]
        return PlannedStep(step, wanted)

    def _num_together(self, prompts: Sequence[Chunk]) -> int:
        """How many of the prompts, by their slots, one step takes: a power of two of neighbours,
        who padded to the longest are no more tokens than one chunk. A step reads all weights, which
        is what takes long where there are few tokens.
        """
        first, count = self.memory.place(prompts[0].sequence), 1
        limits = self.plans[first.plan]
        while 2 * count <= min(len(prompts), limits.prefill_batch):
            more = prompts[: 2 * count]
            tokens = _token_bucket(max(chunk.num_tokens for chunk in more))
            beside = [Place(first.plan, first.slot + i) for i in range(2 * count)]
            neighbours = [self.memory.place(chunk.sequence) for chunk in more] == beside
            fit = all(chunk.start + tokens <= limits.context for chunk in more)
            if not neighbours or not fit or len(more) * tokens > limits.chunk:
                break
            count = len(more)
        return count

    def _prefill(self, chunks: Sequence[Chunk]) -> Iterator[PlannedStep]:
        """Chunks of neighbours: one of any length, or several that fit into a step."""
        place = self.memory.place(chunks[0].sequence)
        limits = self.plans[place.plan]
        for done in range(0, max(chunk.num_tokens for chunk in chunks), limits.chunk):
            starts = [chunk.start + done for chunk in chunks]
            counts = [min(limits.chunk, chunk.num_tokens - done) for chunk in chunks]
            ends = [start + count for start, count in zip(starts, counts, strict=True)]
            tokens = min(limits.chunk, _token_bucket(max(counts)))
            if max(starts) + tokens > limits.context:
                tokens = max(counts)  # pads behind the last row would be written nowhere
            ids = torch.zeros(len(chunks), tokens, dtype=torch.int64)
            for row, (chunk, start, end) in enumerate(zip(chunks, starts, ends, strict=True)):
                ids[row, : end - start] = torch.tensor(chunk.sequence.token_ids[start:end])
            step = self._step(
                place,
                ids=ids,
                positions=torch.tensor(starts).unsqueeze(1) + torch.arange(tokens),
                starts=torch.tensor(starts),
                last=torch.tensor(counts).unsqueeze(1) - 1,
                contexts=torch.tensor([[len(chunk.sequence.token_ids)] for chunk in chunks]),
                looked_at=self._rows(place.plan, max(ends)),
                prefill=True,
            )
            wanted = [
                (chunk, row)
                for row, (chunk, end) in enumerate(zip(chunks, ends, strict=True))
                if chunk.chooses and end == chunk.start + chunk.num_tokens
            ]
            yield PlannedStep(step, wanted)

    def _rows(self, plan: int, num_rows: int) -> int:
        """How many rows of the caches to look at for so many."""
        return batch_bucket(max(num_rows, _LEAST_ROWS), self.plans[plan].context)

    def _step(
        self,
        place: Place,
        *,
        ids: Tensor,
        positions: Tensor,
        starts: Tensor,
        last: Tensor,
        contexts: Tensor,
        looked_at: int,
        prefill: bool,
    ) -> Step:
        """ids, positions: [B, T]; starts: [B], the row of each first token; last: [B, 1], which
        token gives logits; contexts: [B, 1].
        """
        batch, tokens = ids.shape
        fields, size = step_layout(batch, tokens)
        values = {
            "input_ids": ids,
            "position_ids": positions,
            "rotary_ids": self.rotary.rows(positions, contexts),
            "write_indices": starts,
            "last_token_ids": last,
        }
        data = torch.zeros(size, dtype=torch.int32)
        for name, (offset, shape) in fields.items():
            data[offset : offset + values[name].numel()].view(shape).copy_(values[name])
        raw = data.numpy().tobytes()
        return Step(place.plan, prefill, place.slot, batch, tokens, looked_at, raw)


def _token_bucket(count: int) -> int:
    """How many tokens a sequence takes in a step of prompts, pads included."""
    return max(_LEAST_TOKENS, 1 << (count - 1).bit_length())
