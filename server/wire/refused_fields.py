"""Fields that other servers take and this one refuses, as they would change the answer; and those
that advise, of which nothing is made.

Knows no body. docs/api.md says what to use instead.
"""

from __future__ import annotations

from collections.abc import Mapping

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
