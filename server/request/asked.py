"""What any completion request asks for, once its fields agree with each other.

A field is honoured or refused, never dropped in silence: what a form refuses it says
(wire/refused_fields.py), and a field nobody knows is reported back by name. Knows no Flask and no
template.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from enginehouse.runtime.request import Constraint, SamplingParams
from enginehouse.server.request.constraints import read_constraint
from enginehouse.server.tools.unenforced import Unenforced
from enginehouse.server.wire.refusal import refuse
from enginehouse.server.wire.refused_fields import instead_of
from enginehouse.server.wire.shapes import Body, SamplingFields, Shape


class Unknown(NamedTuple):
    """path is a field's place in the request; in report all items of a list share one spelling:
    a long conversation must not flood the header that tells it.
    """

    path: str
    report: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A request that is legal in every field that chat and text completions share.

    fields: as they were validated, with their defaults. max_tokens None: as many as fit.
    num_logprobs None: none are told; num_prompt_logprobs: the same of the prompt's tokens.
    unenforced: what a schema says and the constraint does not.
    """

    fields: SamplingFields
    max_tokens: int | None
    num_logprobs: int | None
    num_prompt_logprobs: int | None
    constraint: Constraint | None
    ignored_fields: tuple[str, ...]
    unenforced: tuple[Unenforced, ...] = ()

    @property
    def num_sequences(self) -> int:
        """How many are generated; fields.n of them are returned."""
        return self.fields.best_of or self.fields.n

    @property
    def include_usage(self) -> bool:
        options = self.fields.stream_options
        return options is not None and options.include_usage

    @property
    def continuous_usage(self) -> bool:
        options = self.fields.stream_options
        return options is not None and options.continuous_usage_stats

    def check_vocabulary(self, vocab_size: int) -> None:
        """RequestError for a token id that the model does not have."""
        for name in self.fields.logit_bias:
            if int(name) >= vocab_size:
                _no_token(f"logit_bias.{name}", name, vocab_size)
        for index, token_id in enumerate(self.fields.stop_token_ids):
            if token_id >= vocab_size:
                _no_token(f"stop_token_ids[{index}]", token_id, vocab_size)

    def check_scores(self, scores_prompts: bool) -> None:
        """RequestError where the engine cannot tell what is asked of the prompt's tokens."""
        if self.num_prompt_logprobs is None or scores_prompts:
            return
        refuse(
            "logprobs" if self.fields.prompt_logprobs is None else "prompt_logprobs",
            "this engine does not compute the log probabilities of a prompt's tokens, as it was "
            "built without gather_context_logits; leave it out, or build the engine with it",
            "unsupported_parameter",
        )

    def samplings(
        self, max_tokens: int, end_token_ids: tuple[int, ...] = ()
    ) -> list[SamplingParams]:
        """One SamplingParams per sequence; end_token_ids are the model's own. The first one asks
        for the prompt's log probabilities: they are all sequences'.

        Sequence i draws from seed + i, so that the choices of one seeded request differ. Seeds are
        folded into 63 bits: the page's limit lies 192 above 2**63, and those few seeds wrap.
        """
        fields = self.fields
        if fields.min_tokens > max_tokens:
            refuse(
                "min_tokens",
                f"{fields.min_tokens} tokens do not fit: at most {max_tokens} can be generated",
            )
        own = () if fields.ignore_eos else end_token_ids
        ranks_by_logprob = self.num_sequences > fields.n
        return [
            SamplingParams(
                max_tokens=max_tokens,
                temperature=fields.temperature,
                top_p=fields.top_p,
                top_k=max(0, fields.top_k),
                min_p=fields.min_p,
                presence_penalty=fields.presence_penalty,
                frequency_penalty=fields.frequency_penalty,
                repetition_penalty=fields.repetition_penalty,
                seed=None if fields.seed is None else (fields.seed + index) % 2**63,
                stop_token_ids=tuple(dict.fromkeys((*own, *fields.stop_token_ids))),
                ignore_eos=fields.ignore_eos,
                min_tokens=fields.min_tokens,
                logit_bias=tuple((int(name), bias) for name, bias in fields.logit_bias.items()),
                num_logprobs=0
                if ranks_by_logprob and self.num_logprobs is None
                else self.num_logprobs,
                num_prompt_logprobs=self.num_prompt_logprobs if index == 0 else None,
                constraint=self.constraint,
            )
            for index in range(self.num_sequences)
        ]


def read_common(fields: SamplingFields) -> dict[str, Any]:
    """The part of Asked that follows from the shared fields; RequestError where two disagree."""
    ignored = ignored_fields(fields)
    if fields.stream_options is not None and not fields.stream:
        refuse("stream_options", "found without stream; wanted stream true, or no stream_options")
    if fields.stream and fields.prompt_logprobs:
        refuse("prompt_logprobs", "found with stream; wanted no stream, or no prompt_logprobs")
    if fields.best_of is not None:
        if fields.best_of < fields.n:
            refuse("best_of", f"{fields.best_of} is less than n: {fields.n}; wanted at least n")
        if fields.stream and fields.best_of > fields.n:
            refuse(
                "best_of",
                "the best are known when all have ended; wanted no stream, or best_of equal to n",
            )
    bound = read_constraint(fields)
    constraint, unenforced = bound or (None, ())
    check_constraint(fields, constraint)
    return {
        "fields": fields,
        "num_prompt_logprobs": None if fields.stream else fields.prompt_logprobs,
        "constraint": constraint,
        "unenforced": unenforced,
        "ignored_fields": ignored,
    }


def check_constraint(fields: SamplingFields, constraint: Constraint | None) -> None:
    """RequestError where the fields would let an answer go on, or end, against its grammar."""
    if constraint is not None and fields.ignore_eos:
        refuse("ignore_eos", f"contradicts {constraint.param}: a grammar has to end the answer")
    if constraint is not None and fields.min_tokens:
        refuse("min_tokens", f"contradicts {constraint.param}: a grammar may end earlier")


def check_min_tokens(min_tokens: int, max_tokens: int | None) -> None:
    if max_tokens is not None and min_tokens > max_tokens:
        refuse("min_tokens", f"{min_tokens} is more than max_tokens: {max_tokens}")


def ignored_fields(body: Body) -> tuple[str, ...]:
    """The fields nobody knows and those whose advice has no effect, each once.

    RequestError for a known one that asks for what we cannot do, and for all of them under
    strict_fields.
    """
    unknown = list(_unknown_fields(body, "", ""))
    if unknown and body.strict_fields:
        path = unknown[0].path[:200]
        refuse(path, "nobody knows this field, and strict_fields is true", "unknown_parameter")
    advice = type(body).advice.items()
    idle = [name for name, values in advice if getattr(body, name, values[0]) not in values]
    return tuple(dict.fromkeys([*(field.report for field in unknown), *idle]))


def _unknown_fields(shape: Shape, path: str, report: str) -> Iterator[Unknown]:
    unsupported = type(shape).refused
    for name, value in (shape.model_extra or {}).items():
        if name not in unsupported:
            yield Unknown(path + name, report + name)
        elif not any(type(value) is type(idle) and value == idle for idle in unsupported[name]):
            refuse(path + name, f"is not supported; {instead_of(name)}", "unsupported_parameter")
    for name, value in shape.__dict__.items():  # its fields, in their order
        if not isinstance(value, (Shape, list)):
            continue
        key = type(shape).model_fields[name].alias or name
        if isinstance(value, Shape):
            yield from _unknown_fields(value, f"{path}{key}.", f"{report}{key}.")
        else:
            for index, item in enumerate(value):
                if not isinstance(item, Shape):
                    break
                yield from _unknown_fields(item, f"{path}{key}[{index}].", f"{report}{key}[].")


def _no_token(param: str, token_id: object, vocab_size: int) -> None:
    refuse(param, f"{token_id} is no token id; wanted one below {vocab_size}")
