"""Ask one engine everything of a suite that needs no other engine beside it. Judges nothing.

What cannot be asked of it (a server without /tokenize, a text longer than its context) is left out,
and the recording says what and why.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from typing import TypeVar

from enginehouse.regress.behaviour.asker import Known
from enginehouse.regress.behaviour.converse import converse
from enginehouse.regress.behaviour.judging import Conversation
from enginehouse.regress.numerics.divergence import answer_kl
from enginehouse.regress.recording import FORMAT, Head, Noise, Recording, Solved
from enginehouse.regress.subject.answers import Answer, answer_prompt
from enginehouse.regress.subject.scores import Score, score_text, tokenize
from enginehouse.regress.subject.subject import Subject
from enginehouse.regress.suite.suite import Prompt, Suite, Task, Text
from enginehouse.runtime.errors import EnginehouseError
from enginehouse.server.client.connection import ServerUnreachable

GROUPS = ("numerics", "quality", "behaviour", "speed")
AT_ONCE = 16
_TASK_TOKENS = 6
Advance = Callable[[str], None]
_Asked = TypeVar("_Asked")
_Told = TypeVar("_Told")


class Collector:
    """Asks a subject; `left_out` fills with what could not be asked, and why."""

    def __init__(
        self, subject: Subject, suite: Suite, groups: Sequence[str], advance: Advance
    ) -> None:
        self.subject = subject
        self.groups = groups
        self.suite = suite
        self.left_out: dict[str, str] = {}
        self._advance = advance
        self._api = subject.api

    def collect(self) -> Recording:
        """Everything but the turns, which two engines take together."""
        numerics = "numerics" in self.groups
        scores = self.scores() if numerics else []
        answers = self._answers("alone", self.suite.prompts) if numerics else []
        noise = self.noise(answers)
        solved = self.solved() if "quality" in self.groups else []
        behaviour = Conversation([], [])
        if "behaviour" in self.groups:
            behaviour = converse(self._api, self._known(), self._advance)
        return Recording(self._head(noise), scores, answers, solved, behaviour, [])

    def scores(self) -> list[Score]:
        """Of all texts, or of none."""
        found = []
        for text in self.suite.texts:
            self._advance(f"text {text.name}")
            ids = self._ids(text)
            if ids is None:
                self.left_out["texts"] = "the server tells no token ids (POST /tokenize)"
                return []
            try:
                score = score_text(self._api, text.name, text.kind, ids)
            except ServerUnreachable:
                raise
            except EnginehouseError as error:
                self.left_out[f"text {text.name}"] = f"refused: {error}"
                continue
            if score is None:
                self.left_out["texts"] = "the server tells no log probabilities of a prompt"
                return []
            found.append(score)
        return found

    def _ids(self, text: Text) -> list[int] | None:
        ids = tokenize(self._api, prompt=text.text)
        room = self.subject.max_seq_len
        return ids if ids is None or room is None else ids[: room - 1]

    def _answers(self, how: str, prompts: Sequence[Prompt], at_once: int = 1) -> list[Answer]:
        def ask(prompt: Prompt) -> Answer | None:
            self._advance(f"prompt {prompt.name}, {how}")
            try:
                return answer_prompt(
                    self._api,
                    prompt.name,
                    prompt=prompt.prompt,
                    messages=prompt.messages,
                    tools=prompt.tools,
                    max_tokens=prompt.max_tokens,
                )
            except ServerUnreachable:
                raise
            except EnginehouseError as error:
                self.left_out[f"prompt {prompt.name}"] = f"refused: {error}"
                return None

        return [answer for answer in _mapped(ask, prompts, at_once) if answer is not None]

    def noise(self, alone: Sequence[Answer]) -> Noise:
        """Answer again with each prompt's beginning known to the engine, and all at once."""
        prompts = [prompt for prompt in self.suite.prompts if prompt.name in _names(alone)]
        known = self._answers("again", prompts)
        among = self._answers(f"among {AT_ONCE - 1} others", prompts, AT_ONCE)
        prefix, batch = _distances(alone, known), _distances(alone, among)
        parted = sum(
            one.text != other.text
            for others in (known, among)
            for one, other in zip(alone, others, strict=False)
        )
        return Noise(*_mean_and_max(batch), *_mean_and_max(prefix), parted)

    def solved(self) -> list[Solved]:
        """Every task: does the answer begin as it should?"""

        def ask(task: Task) -> Solved:
            answer = answer_prompt(
                self._api, task.name, prompt=task.prompt, max_tokens=_TASK_TOKENS
            )
            said = answer.text.split("\n")[0].strip()
            return Solved(task.name, task.kind, said.startswith(task.answer), said)

        self._advance(f"{len(self.suite.tasks)} tasks")
        try:
            return _mapped(ask, self.suite.tasks, AT_ONCE)
        except ServerUnreachable:
            raise
        except EnginehouseError as error:
            self.left_out["tasks"] = f"refused: {error}"
            return []

    def _known(self) -> Known:
        manifest = self.subject.manifest
        model = None if manifest is None else manifest.model
        prices = None
        if model and model.price_input is not None and model.price_output is not None:
            prices = (model.price_input, model.price_output)
        return Known(
            eos_token_ids=model.eos_token_ids if model else None,
            max_seq_len=self.subject.max_seq_len,
            is_ours=self.subject.is_ours,
            prices=prices,
        )

    def _head(self, noise: Noise) -> Head:
        subject = self.subject
        return Head(
            format=FORMAT,
            suite=self.suite.name,
            suite_digest=self.suite.digest,
            target=subject.target,
            kind="url" if subject.server is None else "engine",
            is_ours=subject.is_ours,
            model=subject.api.model,
            created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            manifest=subject.manifest,
            machine=subject.machine,
            left_out=self.left_out,
            noise=noise,
            server=subject.kind,
            groups=list(self.groups),
            start_s=[] if subject.start_s is None else [round(subject.start_s, 3)],
            peak_bytes=subject.memory(),
        )


def _mapped(ask: Callable[[_Asked], _Told], asked: Sequence[_Asked], at_once: int) -> list[_Told]:
    """In order; several at once, each in its own thread."""
    if at_once == 1:
        return [ask(one) for one in asked]
    with ThreadPoolExecutor(at_once) as pool:
        return list(pool.map(ask, asked))


def _names(answers: Sequence[Answer]) -> set[str]:
    return {answer.name for answer in answers}


def _distances(alone: Sequence[Answer], others: Sequence[Answer]) -> Iterator[float]:
    by_name = {answer.name: answer for answer in others}
    for one in alone:
        other = by_name.get(one.name)
        if other is not None:
            yield from answer_kl(one.tokens, other.tokens, one.top, other.top)


def _mean_and_max(kl: Iterator[float]) -> tuple[float | None, float | None]:
    values = list(kl)
    return (sum(values) / len(values), max(values)) if values else (None, None)
