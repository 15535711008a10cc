"""Requests whose continuation is to be exact, each with what makes it hard. Data alone."""

from __future__ import annotations

from typing import Any

from tests.resumed import CHAT, COMPLETIONS

NUM_TOKENS = 64
PROMPT = [1, *range(10, 110)]
"""Longer than a chunk of the test engine's prefill."""
THINK, THINK_END, TOOL, TOOL_END = 500, 501, 502, 503
REASONED = [*PROMPT[:60], THINK, THINK_END]
"""A prompt after which a reasoning model answers at once, so that a grammar holds from the first token."""
EOS = 2
SEEDED = {"temperature": 1.0, "seed": 11}
GREEDY = {"temperature": 0.0}
MESSAGES = [{"role": "user", "content": "hello world"}]
GET_WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "minLength": 12, "maxLength": 24}, "days": {"type": "integer"}},
            "required": ["city", "days"],
        },
    },
}
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 10, "maxLength": 20},
        "tags": {"type": "array", "items": {"type": "string", "minLength": 3, "maxLength": 6}, "minItems": 3},
    },
    "required": ["name", "tags"],
    "additionalProperties": False,
}
TOOL_CALL = r'<tool_call>\n\{"name": "get_weather", "arguments": \{"city": "[a-z ]{12,20}", "days": [0-9]{2}\}\}\n</tool_call>'
GRAMMAR = 'root ::= pair pair pair pair\npair ::= "(" word " " word ")\\n"\nword ::= [a-z] [a-z] [a-z] [a-z]?'

Case = tuple[str, dict[str, Any]]


def completion(**body: Any) -> Case:
    """One of /v1/completions."""
    return COMPLETIONS, {"prompt": PROMPT, "max_tokens": NUM_TOKENS, "ignore_eos": True, **GREEDY, **body}


def structured(**constraint: Any) -> Case:
    """One whose output a grammar constrains."""
    return COMPLETIONS, {"prompt": REASONED, "max_tokens": 96, **SEEDED, "structured_outputs": constraint}


def chat(**body: Any) -> Case:
    """One of /v1/chat/completions."""
    return CHAT, {"messages": MESSAGES, "max_tokens": NUM_TOKENS, "ignore_eos": True, **SEEDED, **body}


CASES: dict[str, Case] = {
    "greedy": completion(),
    "seed": completion(**SEEDED),
    "seed-top-p-top-k": completion(temperature=0.9, seed=3, top_p=0.9, top_k=40),
    "seed-min-p": completion(temperature=1.2, seed=4, min_p=0.02),
    "presence": completion(presence_penalty=1.5),
    "frequency": completion(frequency_penalty=1.0),
    "repetition": completion(repetition_penalty=1.3),
    "penalties-and-seed": completion(
        temperature=1.0, seed=5, presence_penalty=0.5, frequency_penalty=0.7, repetition_penalty=1.1
    ),
    "min-tokens": completion(ignore_eos=False, logit_bias={str(EOS): 100.0}, min_tokens=55),
    "eos": completion(ignore_eos=False, **SEEDED, logit_bias={str(EOS): 3.0}, min_tokens=20),
    "stop-token-ids": completion(stop_token_ids=list(range(300, 420)), min_tokens=52, **SEEDED),
    "stop-string": completion(stop=["ba", "de", "zu", "ko", "mi", "ta"], min_tokens=51, **SEEDED),
    "stop-string-kept": completion(
        stop=["ba", "de", "zu", "ko", "mi"], min_tokens=51, include_stop_str_in_output=True, **SEEDED
    ),
    "stop-string-never": completion(stop=["a string that never comes, and keeps text back"], **SEEDED),
    "bad-words": completion(bad_words=["ba", "de ko", "zu mi", "a", "e"], temperature=0.7, seed=6),
    "logit-bias": completion(logit_bias={"300": 6.0, "301": 6.0, "302": 6.0}, presence_penalty=2.0),
    "repetition-detection": completion(
        allowed_token_ids=[300, 301], repetition_detection={"max_pattern_size": 2, "min_count": 20}
    ),
    "half-a-character": structured(regex="(é|€|😀|日本|ß){40}"),
    "bytes": completion(allowed_token_ids=[*range(100, 260)], **SEEDED),
    "special-tokens": completion(
        allowed_token_ids=[0, 1, 3, 4, 300, 301, 302], skip_special_tokens=False, spaces_between_special_tokens=False,
        **SEEDED,
    ),
    "regex": structured(regex="[a-z]{3}-[0-9]{5}-[A-F]{30}"),
    "json-schema": structured(json=SCHEMA),
    "json-object": structured(json_object=True),
    "choice": structured(choice=["the first of all choices there are", "the second of all choices there are"]),
    "grammar": structured(grammar=GRAMMAR),
    "regex-after-reasoning": (
        COMPLETIONS,
        {
            "prompt": PROMPT,
            "max_tokens": 96,
            **SEEDED,
            "ignore_eos": True,
            "logit_bias": {str(THINK_END): 4.0},
            "structured_outputs": {"regex": "[a-z]{3}-[0-9]{5}-[A-F]{30}"},
        },
    ),
    "n": completion(n=3, **SEEDED),
    "cached": completion(prompt=[*PROMPT, *PROMPT], **SEEDED),
    "chat": chat(),
    "chat-reasoning": chat(logit_bias={str(THINK_END): 3.0}),
    "chat-n": chat(n=2, logit_bias={str(THINK_END): 3.0}),
    "chat-thinking-budget": chat(thinking_token_budget=25),
    "chat-response-format": chat(
        logit_bias={str(THINK_END): 4.0},
        ignore_eos=False,
        max_tokens=128,
        response_format={"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA}},
    ),
    "chat-tool-parsed": chat(
        tools=[GET_WEATHER],
        logit_bias={str(THINK_END): 5.0},
        ignore_eos=False,
        max_tokens=160,
        structured_outputs={"regex": TOOL_CALL},
    ),
    "chat-tool-required": chat(
        tools=[GET_WEATHER],
        tool_choice="required",
        logit_bias={str(THINK_END): 5.0},
        ignore_eos=False,
        max_tokens=160,
    ),
    "chat-tool-named": chat(
        tools=[GET_WEATHER],
        tool_choice={"type": "function", "function": {"name": "get_weather"}},
        logit_bias={str(THINK_END): 5.0},
        ignore_eos=False,
        max_tokens=160,
    ),
}
CARRYING = {
    "logprobs": completion(logprobs=3, **SEEDED),
    "logprobs-chat": chat(logprobs=True, top_logprobs=3),
    "logprobs-n": completion(logprobs=2, n=2, **SEEDED),
    "logprobs-bytes": completion(logprobs=2, allowed_token_ids=[*range(100, 260)], **SEEDED),
}
"""Logprobs of owned tokens have to be carried along: only the engine that made them has them."""
WHOLE_ONLY = {
    "prompt-logprobs": completion(prompt_logprobs=2),
    "echo": completion(echo=True),
}
"""Not streamed."""
