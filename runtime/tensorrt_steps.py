"""From an iteration's chunks to the steps of TensorRT's plans: batches, buckets, padding.

Sequences that decode go together, one step for each plan that has any; then each prompt's chunk
goes by itself, in pieces that the plan takes. Sizes come from few buckets, as every shape has
kernels of its own to be made. Knows no TensorRT and no device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from enginehouse.runtime.sequence import Chunk
from enginehouse.runtime.tensorrt_commands import Step, step_layout
from enginehouse.runtime.tensorrt_inputs import RotaryInputs
from enginehouse.runtime.tensorrt_manifest import PlanRecord
from enginehouse.runtime.tensorrt_slots import Place, SlotMemory, batch_bucket

_LEAST_TOKENS = 16
_LEAST_ROWS = 256


class PlannedStep(NamedTuple):
    """wanted: the chunks that this step completes, each with its row of the step's logits."""

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
        for chunk in prompts:
            yield from self._prefill(chunk)

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
            last=tokens - 1,
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
            last=0,
            contexts=torch.tensor(contexts).unsqueeze(1),
            looked_at=looked_at,
            prefill=False,
        )
        wanted = [(chunk, slot - first) for slot, chunk in by_slot.items() if chunk.completes]
        return PlannedStep(step, wanted)

    def _prefill(self, chunk: Chunk) -> Iterator[PlannedStep]:
        place = self.memory.place(chunk.sequence)
        token_ids, end = chunk.sequence.token_ids, chunk.start + chunk.num_tokens
        limits = self.plans[place.plan]
        for start in range(chunk.start, end, limits.chunk):
            count = min(limits.chunk, end - start)
            tokens = min(limits.chunk, max(_LEAST_TOKENS, 1 << (count - 1).bit_length()))
            if start + tokens > limits.context:
                tokens = count  # pads behind the last row would be written nowhere
            ids = torch.zeros(1, tokens, dtype=torch.int64)
            ids[0, :count] = torch.tensor(token_ids[start : start + count])
            step = self._step(
                place,
                ids=ids,
                positions=torch.arange(start, start + tokens).unsqueeze(0),
                starts=torch.tensor([start]),
                last=count - 1,
                contexts=torch.tensor([[len(token_ids)]]),
                looked_at=self._rows(place.plan, start + count),
                prefill=True,
            )
            completes = chunk.completes and start + count == end
            yield PlannedStep(step, [(chunk, 0)] if completes else [])

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
        last: int,
        contexts: Tensor,
        looked_at: int,
        prefill: bool,
    ) -> Step:
        """ids, positions: [B, T]; starts: [B], the row of each first token; contexts: [B, 1]."""
        batch, tokens = ids.shape
        fields, size = step_layout(batch, tokens)
        values = {
            "input_ids": ids,
            "position_ids": positions,
            "rotary_ids": self.rotary.rows(positions, contexts),
            "write_indices": starts,
            "last_token_ids": torch.full((batch, 1), last),
        }
        data = torch.zeros(size, dtype=torch.int32)
        for name, (offset, shape) in fields.items():
            data[offset : offset + values[name].numel()].view(shape).copy_(values[name])
        raw = data.numpy().tobytes()
        return Step(place.plan, prefill, place.slot, batch, tokens, looked_at, raw)
