"""From an iteration's chunks to the slots, block tables and masks that its attention reads."""

from __future__ import annotations

from collections.abc import Collection
from itertools import accumulate

import torch

from enginehouse.runtime.batching.sequence import Chunk
from enginehouse.runtime.checkpoint.traits import Chunked
from enginehouse.runtime.machine.device import index_tensor, to_device
from enginehouse.runtime.torch.attention import (
    DecodeGroup,
    PagedKVCache,
    PrefillChunk,
    StepAttention,
    visible,
)
from enginehouse.runtime.torch.linear_attention import StateCache, StateRun


def plan_attention(
    cache: PagedKVCache,
    states: StateCache,
    chunks: list[Chunk],
    windows: Collection[int | Chunked | None],
) -> StepAttention:
    """Slots, block tables and masks of one iteration; a mask for each of the layers' windows.

    Neighbouring decodes whose lengths are within a factor of two share one padded product.
    """
    size, device = cache.block_size, cache.device
    slots: list[int] = []
    decodes: list[tuple[int, Chunk]] = []
    prefills: list[PrefillChunk] = []
    for chunk in chunks:
        blocks, end = chunk.sequence.blocks, chunk.start + chunk.num_tokens
        first_row = len(slots)
        slots += [blocks[p // size] * size + p % size for p in range(chunk.start, end)]
        if chunk.num_tokens == 1:
            decodes.append((first_row, chunk))
            continue
        used = blocks[: -(-end // size)]
        queries = torch.arange(chunk.start, end, device=device)
        keys = torch.arange(len(used) * size, device=device)
        masks = {window: visible(queries, keys, window) for window in windows}
        rows = slice(first_row, len(slots))
        prefills.append(PrefillChunk(rows, index_tensor(used, device), masks))
    groups = [_decode_group(cache, group, windows) for group in _by_length(decodes, size)]
    runs = state_runs(states, chunks)
    return StepAttention(cache, index_tensor(slots, device), groups, prefills, states, runs)


def _by_length(decodes: list[tuple[int, Chunk]], size: int) -> list[list[tuple[int, Chunk]]]:
    """Decodes in groups whose longest has at most twice the blocks of its shortest."""
    groups: list[list[tuple[int, Chunk]]] = []
    shortest = 0
    for row, chunk in sorted(decodes, key=lambda item: item[1].start):
        blocks = chunk.start // size + 1
        if not groups or blocks > 2 * shortest:
            groups.append([])
            shortest = blocks
        groups[-1].append((row, chunk))
    return groups


def _decode_group(
    cache: PagedKVCache, group: list[tuple[int, Chunk]], windows: Collection[int | Chunked | None]
) -> DecodeGroup:
    size, device = cache.block_size, cache.device
    width = max(chunk.start // size + 1 for _, chunk in group)
    table = torch.zeros(len(group), width, dtype=torch.int64)
    for i, (_, chunk) in enumerate(group):
        used = chunk.sequence.blocks[: chunk.start // size + 1]
        table[i, : len(used)] = torch.tensor(used)
    starts = index_tensor([chunk.start for _, chunk in group], device)
    positions = torch.arange(width * size, device=device)
    masks: dict[tuple[int | Chunked | None, int], torch.Tensor] = {}
    for window in windows:
        hidden = ~visible(starts, positions, window)  # [sequences, positions]
        mask = torch.zeros(hidden.shape, dtype=cache.dtype, device=device)
        mask.masked_fill_(hidden, float("-inf"))
        for kv_heads in cache.kv_heads:
            masks[window, kv_heads] = mask.repeat(kv_heads, 1).unsqueeze(1)
    rows = index_tensor([row for row, _ in group], device)
    return DecodeGroup(rows, to_device(table.flatten(), device), masks)


def state_runs(cache: StateCache, chunks: list[Chunk]) -> list[StateRun]:
    """All decodes at once, and each other chunk by itself; none where no layer has a state."""
    if not cache.layers:
        return []
    ends = accumulate((chunk.num_tokens for chunk in chunks), initial=0)
    placed = list(zip(ends, chunks, strict=False))
    decodes = [each for each in placed if each[1].num_tokens == 1]
    others = [[each] for each in placed if each[1].num_tokens > 1]
    return [_run(cache, group) for group in (decodes, *others) if group]


def _run(cache: StateCache, group: list[tuple[int, Chunk]]) -> StateRun:
    device = cache.device
    rows = [list(range(first, first + chunk.num_tokens)) for first, chunk in group]
    return StateRun(
        torch.tensor(rows, device=device),
        index_tensor([chunk.sequence.slot for _, chunk in group], device),
        torch.tensor([chunk.start == 0 for _, chunk in group], device=device),
    )
