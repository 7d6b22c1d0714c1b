"""Fields that other servers take and this one refuses, as they would change the answer; what to do
instead; and fields that advise, of which nothing is made.

Knows no body: which form refuses what, each says itself. docs/refused_fields.md has all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

Idle = Mapping[str, tuple[object, ...]]

# Known fields that would change the answer, or make a promise this server does not keep, with
# the values that ask for nothing: those pass, all others are refused.
UNSUPPORTED: Idle = {
    "allowed_token_ids": (),
    "bad_words": ([],),
    "beam_width": (1,),
    "cache_salt": (),
    "disaggregated_params": (),
    "dry_multiplier": (0, 0.0),
    "dynatemp_range": (0, 0.0),
    "early_stopping": (False,),
    "grammar": (),
    "guided_decoding_backend": (),
    "guided_whitespace_pattern": (),
    "json_schema": (),
    "kv_transfer_params": (),
    "length_penalty": (1, 1.0),
    "logits_processors": ([],),
    "lora_path": (),
    "lora_request": (),
    "mirostat": (0,),
    "n_predict": (),
    "no_stop_trim": (False,),
    "nvext": ({},),
    "prompt_embeds": (),
    "repeat_penalty": (1, 1.0),
    "return_hidden_states": (False,),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "stop_regex": ([],),
    "suffix": ("",),
    "top_a": (0, 0.0),
    "top_p_min": (),
    "truncate_prompt_tokens": (),
    "typical_p": (1, 1.0),
    "use_beam_search": (False,),
    "xtc_probability": (0, 0.0),
}
UNSUPPORTED_IN_CHAT: Idle = {
    **UNSUPPORTED,
    "audio": (),
    "chat_template": (),
    "documents": ([],),
    "echo": (False,),
    "enable_thinking": (),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "mm_processor_kwargs": ({},),
    "modalities": (["text"],),
    "prompt": (),
    "reasoning_format": ("auto",),
    "thinking": (),
    "web_search_options": (),
}
UNSUPPORTED_IN_COMPLETIONS: Idle = {
    **UNSUPPORTED,
    "add_generation_prompt": (True,),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "max_completion_tokens": (),
    "messages": (),
    "store": (False,),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
}
# Of a conversation that is rendered and not answered.
UNSUPPORTED_IN_TEMPLATES: Idle = {
    "chat_template": (),
    "documents": ([],),
    "enable_thinking": (),
    "mm_processor_kwargs": ({},),
    "thinking": (),
}
UNSUPPORTED_IN_EMBEDDINGS: Idle = {
    "embd_normalize": (2,),
    "embed_dtype": ("float32",),
    "endianness": ("native", "little"),
    "image": (),
    "input_type": (),
    "instruction": ("",),
    "late_chunking": (False,),
    "messages": (),
    "prompt_name": (),
    "stream": (False,),
    "task": (),
    "truncate": ("NONE",),
    "truncate_prompt_tokens": (),
    "use_activation": (True,),
}
# Fields that advise, with the values that advise nothing: what they advise has no effect here.
ADVICE: Idle = {
    "metadata": ({},),
    "prediction": (None,),
    "prompt_cache_key": ("",),
    "safety_identifier": ("",),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "verbosity": (None,),
}


class Instead(NamedTuple):
    """Of a field that is refused. whose: who has it. words: what to do, with names in backticks."""

    whose: str
    words: str


_BY_WORDS = {
    ("vLLM", "use `logit_bias` or a grammar"): (
        "allowed_token_ids",
        "bad_words",
        "logits_processors",
    ),
    ("LC", "use `top_p` or `min_p`"): (
        "dynatemp_range",
        "mirostat",
        "typical_p",
        "xtc_probability",
    ),
    ("TRT", "use `top_p` or `min_p`"): ("top_p_min",),
    ("OpenRouter", "use `top_p` or `min_p`"): ("top_a",),
    ("LC", "use `repetition_penalty`"): ("dry_multiplier", "repeat_penalty"),
    ("LC", "use `max_tokens`, of Responses `max_output_tokens`"): ("n_predict",),
    ("vLLM, TRT", "use `best_of`, which Responses does not have"): (
        "beam_width",
        "early_stopping",
        "length_penalty",
        "use_beam_search",
    ),
    ("vLLM", "leave it out; `/tokenize` has the ids"): (
        "prompt_embeds",
        "return_token_ids",
        "return_tokens_as_token_ids",
        "skip_special_tokens",
        "spaces_between_special_tokens",
        "truncate_prompt_tokens",
    ),
    ("vLLM", "leave it out: grammars have one backend and bounded white space"): (
        "disable_any_whitespace",
        "guided_decoding_backend",
        "guided_whitespace_pattern",
        "whitespace_pattern",
    ),
    ("vLLM", "leave it out: an object that names properties has no others"): (
        "disable_additional_properties",
    ),
    ("SG, LC", "use `structured_outputs` or `response_format`, of Responses `text.format`"): (
        "grammar",
        "json_schema",
    ),
    ("SG", "use `stop`"): ("stop_regex",),
    ("SG", "use `include_stop_str_in_output`"): ("no_stop_trim",),
    ("SG", "leave it out"): ("return_hidden_states",),
    ("TRT, SG", "leave it out: an engine is one model"): ("lora_path", "lora_request"),
    ("vLLM", "leave it out"): ("cache_salt", "kv_transfer_params"),
    ("TRT", "leave it out"): ("disaggregated_params",),
    ("NIM", "leave it out"): ("nvext",),
    ("vLLM", "use `chat_template_kwargs`"): (
        "chat_template",
        "documents",
        "mm_processor_kwargs",
    ),
    ("others", "use `chat_template_kwargs`"): ("enable_thinking", "thinking"),
    ("LC", "use `separate_reasoning`"): ("reasoning_format",),
    ("vLLM", "use `normalize`"): ("use_activation",),
    ("LC", "use `normalize`"): ("embd_normalize",),
    ("vLLM", "use `encoding_format`"): ("embed_dtype", "endianness"),
    ("NIM, Jina, Cohere", "write what the model wants into the text"): ("input_type", "task"),
    ("SG, TEI", "write what the model wants into the text"): ("instruction", "prompt_name"),
    ("NIM, TEI, Cohere", "send a text that the context has room for"): ("truncate",),
    ("Jina", "embed each part by itself"): ("late_chunking",),
    ("SG", "leave it out: text is read, and nothing else"): ("image",),
    ("OpenAI", "use `tools` and `tool_choice`"): ("function_call", "functions"),
    ("OpenAI", "leave it out: text is read and written, and nothing else"): ("audio", "modalities"),
    ("OpenAI", "leave it out: hosted tools are not served"): ("web_search_options",),
    ("OpenAI", "leave it out"): ("moderation", "suffix"),
    ("OpenAI", "use `truncation`"): ("context_management",),
    ("Anthropic", "leave it out: server tools are not served"): ("container", "mcp_servers"),
    ("Anthropic", "send all messages: none are held for a next turn"): ("thread",),
    # Of another endpoint of this server.
    ("completions", "ask `/v1/completions`"): ("echo",),
    ("completions", "use `messages`, of Responses `input`"): ("prompt",),
    ("chat", "use `prompt`, of Responses and embeddings `input`"): ("messages",),
    ("chat", "leave it out: an embedding is told whole"): ("stream",),
    ("chat", "use `max_tokens`"): ("max_completion_tokens",),
    ("chat", "use `logprobs`, which is a number here"): ("top_logprobs",),
    ("chat", "ask `/v1/chat/completions`"): (
        "add_generation_prompt",
        "chat_template_kwargs",
        "continue_final_message",
        "tool_choice",
        "tools",
    ),
    ("chat", "leave it out: nothing is stored"): ("store",),
    ("chat, completions", "use `max_output_tokens`"): ("max_tokens",),
    ("chat, completions", "use `text.format`"): ("response_format",),
    ("chat, completions", "leave it out: a response is one answer"): ("best_of", "n"),
    ("chat, completions", "leave it out"): ("prompt_logprobs",),
}
# Of every field that a form refuses.
INSTEAD: Mapping[str, Instead] = {
    name: Instead(*key) for key, names in _BY_WORDS.items() for name in names
}


def instead_of(name: str) -> str:
    """What to do instead of asking for a field, as the end of a refusal."""
    return INSTEAD[name].words.replace("`", "") if name in INSTEAD else "leave it out"
