"""Requests whose continuation is to be exact, each with what makes it hard. Data alone."""

from __future__ import annotations

from typing import Any

from tests.e2e.resumed import CHAT, COMPLETIONS

NUM_TOKENS = 64
LONG = 400
"""So long that it can be taken over while it goes on."""
PROMPT = [1, *range(300, 400)]
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
CALL = r'\{"name": "get_weather", "arguments": \{"city": "[a-z ]{12,20}", "days": [0-9]{2}\}\}'
TOOL_CALL = rf"<tool_call>\n{CALL}\n</tool_call>"
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
    "stop-string": completion(stop=["ce wo5", "never"], min_tokens=51, **SEEDED),
    "stop-string-kept": completion(stop=["ce wo5", "never"], min_tokens=51, include_stop_str_in_output=True, **SEEDED),
    "stop-string-never": completion(stop=["a string that never comes, and keeps text back"], **SEEDED),
    "bad-words": completion(bad_words=["ba", "de ko", "zu mi", "a", "e"], temperature=0.7, seed=6),
    "logit-bias": completion(logit_bias={"300": 6.0, "301": 6.0, "302": 6.0}, presence_penalty=2.0),
    "repetition-detection": completion(
        allowed_token_ids=[300, 301], repetition_detection={"max_pattern_size": 2, "min_count": 20}
    ),
    "half-a-character": structured(regex="(é|€|😀|日本|ß){40}"),
    "bytes": completion(allowed_token_ids=[*range(100, 260)], **SEEDED),
    "special-tokens": completion(
        allowed_token_ids=[0, 1, 3, 4, 300, 301, 302],
        skip_special_tokens=False,
        spaces_between_special_tokens=False,
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
            "logit_bias": {str(THINK_END): 2.0},
            "structured_outputs": {"regex": "[a-z]{3}-[0-9]{5}-[A-F]{30}"},
        },
    ),
    "n": completion(n=3, **SEEDED),
    "n-ending-apart": completion(n=3, **SEEDED, stop_token_ids=list(range(300, 320)), min_tokens=3),
    "cached": completion(prompt=[*PROMPT, *PROMPT], **SEEDED),
    "chat": chat(),
    "chat-reasoning": chat(logit_bias={str(THINK_END): 4.0}),
    "chat-n": chat(n=2, logit_bias={str(THINK_END): 4.0}),
    "thinking-budget": completion(prompt=[*PROMPT, THINK], thinking_token_budget=25, **SEEDED),
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
CARRYING: dict[str, Case] = {
    "logprobs": completion(logprobs=3, max_tokens=LONG, **SEEDED),
    "logprobs-chat": chat(logprobs=True, top_logprobs=3, max_tokens=LONG),
    "logprobs-n": completion(logprobs=2, n=2, max_tokens=LONG, **SEEDED),
    "logprobs-bytes": completion(logprobs=2, allowed_token_ids=[*range(100, 260)], max_tokens=LONG, **SEEDED),
}
"""Logprobs of owned tokens have to be carried along: only the engine that made them has them."""
ENDED = completion(n=4, **SEEDED, stop_token_ids=list(range(300, 306)), max_tokens=LONG)
"""Its choices end far apart."""
WHOLE_ONLY: dict[str, Case] = {"prompt-logprobs": completion(prompt_logprobs=2), "echo": completion(echo=True)}
"""Not streamed."""
SAMPLE = [
    ("greedy", 1, False),
    ("greedy", 50, True),
    ("seed", 2, True),
    ("seed", 17, False),
    ("seed-min-p", 50, False),
    ("presence", 17, False),
    ("frequency", 50, False),
    ("repetition", 50, False),
    ("penalties-and-seed", 17, True),
    ("min-tokens", 50, False),
    ("min-tokens", -1, True),
    ("stop-token-ids", -1, False),
    ("stop-string", 17, True),
    ("stop-string", -1, True),
    ("stop-string-never", 50, True),
    ("bad-words", 17, False),
    ("bad-words", 50, False),
    ("repetition-detection", -1, False),
    ("half-a-character", 1, True),
    ("half-a-character", 50, True),
    ("bytes", 17, True),
    ("regex", 17, False),
    ("regex", -1, True),
    ("json-schema", 50, True),
    ("choice", 2, False),
    ("grammar", 17, False),
    ("regex-after-reasoning", 2, True),
    ("regex-after-reasoning", 50, False),
    ("n", 17, True),
    ("n-ending-apart", 50, False),
    ("cached", 50, True),
    ("thinking-budget", 17, False),
    ("chat", 1, True),
    ("chat-reasoning", 2, True),
    ("chat-reasoning", 50, True),
    ("chat-response-format", 50, True),
    ("chat-tool-parsed", 50, True),
    ("chat-tool-parsed", -1, False),
    ("chat-tool-named", 50, True),
    ("prompt-logprobs", 50, False),
]
"""Case, tokens it owns (-1: all but the last), and whether it is streamed."""
