"""Every load of a run: its prompts, and the turns of one server or of two. Judges nothing.

A prompt is new in each pair, so that no server knows its beginning, and the same for both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from enginehouse.regress.limits import Limits
from enginehouse.regress.speed.turn import Turn, take_turn
from enginehouse.regress.speed.turns import LoadTurns, Patience, take_turns
from enginehouse.regress.subject.api import COMPLETIONS
from enginehouse.regress.subject.scores import tokenize
from enginehouse.regress.subject.subject import Subject
from enginehouse.regress.suite.long_texts import ledger
from enginehouse.server.client.connection import ServerRefused

_PER_PAIR, _PER_CLIENT = 10_007, 101  # of the ledger's numbers, so that no two prompts share lines


class Load:
    """What a server is asked at each pair."""

    def __init__(self, subject: Subject, limits: Limits) -> None:
        self._subject = subject
        self._lines = limits.turns.prompt_lines
        room = subject.max_seq_len
        self.num_tokens = min(limits.turns.tokens, room // 4) if room else limits.turns.tokens
        self._prompt_room = room // 2 if room else None
        self._ignore_eos = subject.is_ours or self._takes_ignore_eos()

    def _takes_ignore_eos(self) -> bool:
        try:
            fields = {"prompt": "a", "max_tokens": 1, "ignore_eos": True}
            self._subject.api.ask(COMPLETIONS, **fields)
        except ServerRefused:
            return False
        return True

    def share_room(self, other: Load) -> None:
        """Ask both what the smaller context has room for."""
        self.num_tokens = other.num_tokens = min(self.num_tokens, other.num_tokens)
        rooms = [room for room in (self._prompt_room, other._prompt_room) if room is not None]
        self._prompt_room = other._prompt_room = min(rooms, default=None)

    def prompts(self, clients: int, pair: int) -> list[str | list[int]]:
        """Text; ids where a small context has to be kept."""
        texts = [
            ledger(self._lines, 1 + pair * _PER_PAIR + client * _PER_CLIENT)
            for client in range(clients)
        ]
        if self._prompt_room is None:
            return list(texts)
        ids = [tokenize(self._subject.api, prompt=text) for text in texts]
        room = self._prompt_room
        return [
            text if found is None else found[:room] for text, found in zip(texts, ids, strict=True)
        ]

    def turn(self, prompts: Sequence[str | list[int]]) -> Turn:
        return take_turn(self._subject.api, prompts, self.num_tokens, ignore_eos=self._ignore_eos)


def take_all_turns(
    old: Subject, new: Subject, limits: Limits, say: Callable[[str], None]
) -> list[LoadTurns]:
    """Of both servers, load by load."""
    ours, theirs = Load(old, limits), Load(new, limits)
    ours.share_room(theirs)
    turns = limits.turns
    return [
        take_turns(
            clients,
            ours.turn,
            theirs.turn,
            lambda pair, clients=clients: ours.prompts(clients, pair),  # type: ignore[misc]
            limits.speed,
            limits.level,
            Patience(turns.least, turns.most, turns.to_differ, turns.seconds),
            lambda load: say(f"{load.clients} at once: {len(load.pairs)} pairs of turns"),
        )
        for clients in turns.clients
    ]


def alone(subject: Subject, limits: Limits, say: Callable[[str], None]) -> list[Turn]:
    """The least number of turns at each load, after one that warms up; for a recording. Raises
    EnginehouseError when a stream fails.
    """
    load, found = Load(subject, limits), list[Turn]()
    for clients in limits.turns.clients:
        for number in range(limits.turns.least + 1):
            say(f"{clients} at once: turn {number}")
            turn = load.turn(load.prompts(clients, number))
            found += [turn] if number else []
    return found
