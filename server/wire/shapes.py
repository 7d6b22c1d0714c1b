"""The form of what requests share: each field's type, range, default and meaning.

The models here and in bodies.py validate, and the OpenAPI document is made of the very same. What
a well-formed request may ask for is of api/'s folders. Knows no Flask, no model, no other
field's value.
Source: the product page's "Input fields"; OpenAI's and vLLM's references for the rest.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    FailFast,
    Field,
    GetJsonSchemaHandler,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError

from enginehouse.server.wire.json_body import MAX_FREE_DEPTH, found_text, is_too_deep
from enginehouse.server.wire.refused_fields import ADVICE, Idle

SEED_LIMIT = 9223372036854776000  # 2**63 as JavaScript prints it, which is how the page states it
# The most that a request may hold, all of it; docs/api.md tells them, and what each is for.
MAX_STOPS, MAX_STOP_CHARS, MAX_STOP_IDS = 16, 4096, 1024
MAX_LOGPROBS = 20
MAX_BEST_OF = 20
MAX_GRAMMAR_CHARS = 256 * 1024
MAX_CHOICES = 1024
MAX_STRUCTURES = 128
MAX_TOKENS = 1_000_000
MAX_BIASES = 1024
MAX_PROMPTS, MAX_INPUTS = 128, 2048
MAX_DIMENSIONS = 65_536
MAX_TOOLS = 128
MAX_CALLS = 128

T = TypeVar("T")


class Shape(BaseModel):
    """Strict types, null means absent, unknown fields are kept apart in model_extra.

    refused: known ones among these that ask for what is not done; advice: fields of which nothing
    is made; each with the values that ask for nothing. foreign: fields that are inherited and have
    no place here, which are refused where they are not their default. wanted: what fields are, in
    words, where the endpoint has them of its own form.
    """

    refused: ClassVar[Idle] = {}
    foreign: ClassVar[tuple[str, ...]] = ()
    wanted: ClassVar[dict[str, str]] = {}
    advice: ClassVar[Idle] = ADVICE

    model_config = ConfigDict(
        strict=True, extra="allow", frozen=True, use_attribute_docstrings=True
    )

    @model_validator(mode="before")
    @classmethod
    def drop_nulls(cls, value: object) -> object:
        if isinstance(value, dict):
            return {key: item for key, item in value.items() if item is not None}
        return value

    @classmethod
    def __get_pydantic_json_schema__(
        cls, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        """The document says what drop_nulls does: a field that may be absent may be null."""
        made = handler(schema)
        document = handler.resolve_ref_schema(made)
        required = document.get("required", ())
        for name, field in document.get("properties", {}).items():
            options = field.get("anyOf", ())
            if name not in required and {"type": "null"} not in options:
                notes = {
                    key: field.pop(key)
                    for key in ("title", "description", "default")
                    if key in field
                }
                inner = list(options) or [dict(field)]
                field.clear()
                field.update(notes, anyOf=[*inner, {"type": "null"}])
        return made


class Body(Shape):
    """What the whole body of a request is."""

    strict_fields: bool = False
    """Refuse fields that nobody knows, instead of naming them in X-Ignored-Fields."""


def bounded(value: T) -> T:
    if is_too_deep(value):
        raise PydanticCustomError(
            "too_deep", f"is nested too deeply; wanted at most {MAX_FREE_DEPTH} levels"
        )
    return value


def check_text(part: object, index: int, name: str) -> None:
    """A part of a text, in this place of a list, has its text; null is none."""
    if isinstance(part, dict) and part.get(name) is None:
        raise PydanticCustomError("missing", "missing", {"at": f"[{index}].{name}"})


def _text_as_stops(value: object) -> object:
    if value == "":
        raise PydanticCustomError("empty", '"" is empty; wanted a non-empty string')
    return [value] if isinstance(value, str) else value


def _schema_or_text(value: object) -> object:
    if isinstance(value, dict):
        return bounded(value)
    if not isinstance(value, str) or not 0 < len(value) <= MAX_GRAMMAR_CHARS:
        raise PydanticCustomError(
            "schema",
            "found {found}; wanted an object, or its JSON text of at most {most} characters",
            {"found": found_text(value), "most": MAX_GRAMMAR_CHARS},
        )
    return value


def _few(value: object) -> object:
    if isinstance(value, dict) and len(value) > MAX_BIASES:
        raise PydanticCustomError(
            "too_many",
            "found {num} entries; wanted at most {most}",
            {"num": len(value), "most": MAX_BIASES},
        )
    return value


# FailFast: a list of five million wrong items costs one error, not five million.
Number = Annotated[float, Field(allow_inf_nan=False)]
Token = Annotated[int, Field(ge=0, lt=2**31)]
TokenList = Annotated[list[Token], FailFast(), Field(max_length=MAX_TOKENS)]
FreeObject = Annotated[dict[str, Any], AfterValidator(bounded)]
Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]
Word = Annotated[str, Field(min_length=1)]
Stops = Annotated[
    list[Stop],
    FailFast(),
    Field(max_length=MAX_STOPS),
    BeforeValidator(
        _text_as_stops,
        json_schema_input_type=Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)],
    ),
]
TokenName = Annotated[str, Field(pattern=r"^(0|[1-9][0-9]{0,8})$")]
Bias = Annotated[Number, Field(ge=-100, le=100)]
Choices = Annotated[list[Word], FailFast(), Field(min_length=1, max_length=MAX_CHOICES)]
GrammarText = Annotated[str, Field(min_length=1, max_length=MAX_GRAMMAR_CHARS)]
SchemaOrText = Annotated[
    Any,
    BeforeValidator(_schema_or_text, json_schema_input_type=dict[str, Any] | GrammarText),
]


class JsonSchema(Shape):
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: str = ""
    schema_: Annotated[FreeObject, Field(alias="schema")]
    """The JSON schema the whole answer follows."""
    strict: bool = False
    """Refuse a schema of which something cannot be enforced, instead of naming that in
    X-Unenforced-Schema.
    """


class TaggedSchema(Shape):
    """A part of the answer that follows a schema, between two texts."""

    begin: GrammarText
    schema_: Annotated[FreeObject, Field(alias="schema")]
    end: str


class ResponseFormat(Shape):
    type: Literal["text", "json_object", "json_schema", "structural_tag"]
    json_schema: JsonSchema | None = None
    schema_: Annotated[FreeObject | None, Field(alias="schema")] = None
    """With json_object: the schema of the object, as llama.cpp has it."""
    format: FreeObject | None = None
    """With structural_tag: the format, as xgrammar has it."""
    structures: Annotated[
        list[TaggedSchema], FailFast(), Field(min_length=1, max_length=MAX_STRUCTURES)
    ] = []
    """With structural_tag, the older form: the tagged parts."""
    triggers: Annotated[list[Word], FailFast(), Field(min_length=1, max_length=MAX_STRUCTURES)] = []
    """With structures: the texts after which one of them has to follow."""


class StructuredOutputs(Shape):
    """vLLM's name for a grammar; exactly one of the fields is given."""

    refused = {
        "disable_additional_properties": (False,),
        "disable_any_whitespace": (),
        "whitespace_pattern": (),
    }

    json_: Annotated[SchemaOrText | None, Field(alias="json")] = None
    """A JSON schema, as an object or as its text."""
    json_object: bool = False
    regex: GrammarText | None = None
    choice: Choices = []
    grammar: GrammarText | None = None
    structural_tag: SchemaOrText | None = None


class StreamOptions(Shape):
    include_usage: bool = False
    """A last chunk without choices tells the usage."""
    continuous_usage_stats: bool = False
    """Every chunk tells the usage so far."""
    include_obfuscation: bool = False
    """Padding against traffic analysis: no text depends on it, none is sent."""


class SamplingFields(Body):
    """What chat and text completions have in common."""

    model: str
    """The served name, or one of the engine's own names."""
    stream: bool = False
    """Answer by server-sent events."""
    stream_options: StreamOptions | None = None
    temperature: Annotated[Number, Field(ge=0, le=2)] = 1.0
    """Higher values make the answer more random; 0 is greedy."""
    top_p: Annotated[Number, Field(gt=0, le=1)] = 1.0
    """Choose among the likeliest tokens that together have this probability; 1 is off."""
    min_p: Annotated[Number, Field(ge=0, le=1)] = 0.0
    """Drop tokens less likely than this share of the likeliest one's probability; 0 is off."""
    top_k: Annotated[int, Field(ge=-1, lt=1000)] = 0
    """Choose among so many of the likeliest tokens; 0 is off, and so is -1."""
    max_tokens: Annotated[int | None, Field(ge=0, le=MAX_TOKENS)] = None
    """Of the answer, at most; also bounded by what the context has left."""
    min_tokens: Annotated[int, Field(ge=0, le=MAX_TOKENS)] = 0
    """No end token, stop token or stop string ends the answer earlier."""
    stop: Stops = []
    """The answer ends before the first of these texts."""
    include_stop_str_in_output: bool = False
    """Keep the stop text that was found."""
    stop_token_ids: Annotated[list[Token], FailFast(), Field(max_length=MAX_STOP_IDS)] = []
    """More tokens that end the answer; they are no text."""
    ignore_eos: bool = False
    """The model's own end tokens do not end the answer."""
    n: Annotated[int, Field(ge=1, le=4)] = 1
    """How many answers; answer i draws from seed + i."""
    best_of: Annotated[int | None, Field(ge=1, le=MAX_BEST_OF)] = None
    """Generate this many, return the n whose tokens are likeliest on average."""
    presence_penalty: Annotated[Number, Field(ge=-2, le=2)] = 0.0
    """Taken from the logit of each token that the answer has already."""
    frequency_penalty: Annotated[Number, Field(ge=-2, le=2)] = 0.0
    """Taken from a token's logit as many times as the answer has it."""
    repetition_penalty: Annotated[Number, Field(ge=0.01, le=5)] = 1.0
    """Divides the chances of tokens of the prompt and the answer; below 1 it favours them."""
    logit_bias: Annotated[
        dict[TokenName, Bias],
        BeforeValidator(_few),
        Field(json_schema_extra={"additionalProperties": False, "maxProperties": MAX_BIASES}),
    ] = {}
    """Token ids as text -> what is added to their logits."""
    prompt_logprobs: Annotated[int | None, Field(ge=0, le=MAX_LOGPROBS)] = None
    """Tell the log probability of each token of the prompt, and of so many of the likeliest in its
    place; not in a stream, as vLLM does."""
    seed: Annotated[int | None, Field(ge=0, lt=SEED_LIMIT)] = None
    """The same seed draws the same answer, as far as the engine repeats itself."""
    priority: Annotated[int, Field(ge=-(2**31), lt=2**31)] = 0
    """A lower one runs first."""
    response_format: ResponseFormat = ResponseFormat(type="text")
    structured_outputs: StructuredOutputs | None = None
    guided_json: SchemaOrText | None = None
    """A JSON schema, as an object or as its text."""
    guided_regex: GrammarText | None = None
    guided_grammar: GrammarText | None = None
    """xgrammar's EBNF; its first rule is `root`."""
    guided_choice: Choices = []
    """The answer is one of these texts."""
    regex: GrammarText | None = None
    """SGLang's name for guided_regex."""
    ebnf: GrammarText | None = None
    """SGLang's name for guided_grammar."""
    user: str | None = None
    """Is checked; no answer depends on it."""
    metadata: FreeObject = {}
    """Is checked; X-Ignored-Fields names it, as it does the three below."""
    service_tier: Literal["auto", "default", "flex", "scale", "priority"] = "auto"
    safety_identifier: str = ""
    prompt_cache_key: str = ""
