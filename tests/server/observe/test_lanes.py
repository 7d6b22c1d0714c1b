"""Lanes: how far each sequence of a worker has come, and what is kept of those that ended."""

from __future__ import annotations

from doubles.scripted_client import ScriptedGeneration
from enginehouse.server.observe.lanes import Lanes
from makers.completions import completion
from makers.token_outputs import STOP, tokens


def test_a_sequence_goes_from_the_queue_to_its_end() -> None:
    now = [0.0]
    answer = completion(num_choices=2, clock=lambda: now[0], started_s=0.0)
    script = [*tokens("the", None)[:1], *tokens("the lazy", STOP)]
    generation = ScriptedGeneration(script, 2)
    lanes = Lanes(lambda: now[0])
    lanes.num_watchers = 1
    lanes.begin(answer, generation, "one")
    assert [(lane.choice, lane.state) for lane in lanes.open()] == [(0, "queued"), (1, "queued")]
    generation.begun = True
    assert {lane.state for lane in lanes.open()} == {"prefill"}
    now[0] = 0.25
    running = answer.run(generation)
    next(running)
    first, second = lanes.open()
    assert (first.state, first.num_tokens, first.num_prompt_tokens) == ("decode", 1, 15)
    assert (first.first_token_s, first.age_s, first.request_id) == (0.25, 0.25, "one")
    assert second.state == "prefill"
    generation.preempted = frozenset({0})
    assert [lane.state for lane in lanes.open()] == ["preempted", "prefill"]
    generation.preempted = frozenset()
    assert next(lanes.open()).state == "decode"
    running.close()
    lanes.end(answer)
    assert list(lanes.open()) == []
    assert {lane.state for lane in lanes.ended_after(0)} == {"cancelled"}
    assert lanes.ended_after(lanes.num_ended) == []


def test_nothing_is_kept_while_nobody_looks() -> None:
    lanes = Lanes()
    answer = completion()
    lanes.begin(answer, None, "one")
    lanes.end(answer)
    lanes.end(answer)
    assert lanes.num_ended == 0 and lanes.ended_after(0) == []
