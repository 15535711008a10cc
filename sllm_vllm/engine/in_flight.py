"""The front end's requests in flight: their output so far, and what is needed to move them. Reads vLLM's state."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import msgspec

from sllm_vllm.engine.movable import why_immovable_in_flight
from sllm_vllm.engine.resume import FINISH_REASONS, OwnedChoice, Resume, TokenLogprob, digest_tokens

_NOT_SEEN = "it came before this was watched, or it generates nothing"


class IdAmbiguous(LookupError):
    """Several requests have this id, which is possible because clients choose ids; so none can be identified by it."""


def list_in_flight(engine: Any) -> list[dict[str, Any]]:
    """A summary of each request in flight."""
    return [_summary(engine, states) for states in _by_request(engine)]


def find_in_flight(engine: Any, id_: str) -> dict[str, Any] | None:
    """Find one request, with its tokens, by vLLM's id or its X-Request-Id; None if it does not exist, or no longer.

    The field ``resume`` is what a target needs, as an object; it is absent if the request can't be moved.

    Raises:
        IdAmbiguous: several requests have this id.
    """
    found = _all_named(engine, id_)
    if len(found) > 1:
        raise IdAmbiguous(f"{len(found)} requests in flight have the id {id_}")
    return _described(engine, found[0]) if found else None


def find_states(engine: Any, id_: str) -> list[Any] | None:
    """vLLM's states of the choices of a request, by its X-Request-Id; None unless exactly one request has that id."""
    found = _all_named(engine, id_)
    return found[0] if len(found) == 1 else None


def note_of(engine: Any, states: list[Any], told: dict[int, int]) -> list[dict[str, Any]] | None:
    """The entries of a request's next note (see ``answer_notes.py``); None if the request can't be moved.

    Args:
        told: by choice, the number of tokens in earlier notes, or -1 if its end was in one; updated.
    """
    everything = _all_choices(states)
    if not told and _why_immovable(engine, states[0], everything):
        return None
    if _has_ended(engine, states, everything):
        return [{"end": True}]
    entries: list[dict[str, Any]] = []
    if not told:
        digest = digest_tokens(states[0].prompt_token_ids)
        entries.append({"d": digest, "c": _num_cached_tokens(states[0]), "n": len(everything)})
    for index, state in enumerate(everything):
        if told.setdefault(index, 0) >= 0 and (entry := _news_of(state, told[index])):
            told[index] = -1 if "f" in entry else told[index] + len(entry["t"])
            entries.append({"i": index, **entry})
    return entries


def _has_ended(engine: Any, states: list[Any], everything: list[Any]) -> bool:
    if states[0].parent_req is None:
        return states[0].request_id not in engine.output_processor.request_states
    return all(_ending(state)[0] is not None for state in everything)


def _news_of(state: Any, num_told: int) -> dict[str, Any]:
    """The note's entry for one choice; empty if there is nothing new."""
    finish_reason, stop_reason = _ending(state)
    tokens = state.detokenizer.output_token_ids[num_told:]
    if not tokens and finish_reason is None:
        return {}
    news: dict[str, Any] = {"t": list(tokens)}
    if (logprobs := state.logprobs_processor.logprobs) is not None:
        news["l"] = [_entries(position) for position in list(logprobs)[num_told:]]
    if finish_reason is not None:
        news["f"] = [finish_reason, stop_reason]
    return news


def _all_named(engine: Any, id_: str) -> list[list[Any]]:
    names = (id_, f"chatcmpl-{id_}", f"cmpl-{id_}-0")
    return [states for states in _by_request(engine) if states[0].external_req_id in names]


def _by_request(engine: Any) -> list[list[Any]]:
    """States of all choices, grouped by request.

    Grouped by vLLM's own request id, because a client may give the same external id to several requests.
    """
    found: dict[str, list[Any]] = defaultdict(list)
    for state in engine.output_processor.request_states.values():
        owner = state if state.parent_req is None else state.parent_req
        found[owner.request_id].append(state)
    return list(found.values())


def _summary(engine: Any, states: list[Any]) -> dict[str, Any]:
    everything = _all_choices(states)
    return {
        "id": states[0].external_req_id,
        "num_prompt_tokens": states[0].prompt_len,
        "num_output_tokens": [_num_tokens(state) for state in everything],
        "immovable": _why_immovable(engine, states[0], everything),
    }


def _described(engine: Any, states: list[Any]) -> dict[str, Any]:
    everything = _all_choices(states)
    request = getattr(states[0], "sllm_request", None)
    told = _summary(engine, states)
    told["prompt_token_ids"] = states[0].prompt_token_ids
    told["sampling_params"] = _as_json(request.sampling_params) if request is not None else None
    if not told["immovable"]:
        resume = Resume(
            prompt_digest=digest_tokens(states[0].prompt_token_ids),
            choices=tuple(map(_owned, everything)),
            num_cached_tokens=_num_cached_tokens(states[0]),
        )
        told["resume"] = msgspec.to_builtins(msgspec.json.decode(resume.to_json()))
    return told


def _all_choices(states: list[Any]) -> list[Any]:
    """States of all choices in order, including those that have ended."""
    parent = states[0].parent_req
    if parent is None:
        return states
    known = getattr(parent, "sllm_states", {})
    return [known[index] for index in sorted(known)] or states


def _why_immovable(engine: Any, state: Any, everything: list[Any]) -> str:
    request = getattr(state, "sllm_request", None)
    if request is None or state.detokenizer is None:
        return _NOT_SEEN
    if state.parent_req is not None and len(everything) != state.parent_req.n:
        return "not all of its choices are known yet"
    if any(reason not in FINISH_REASONS for reason, _ in map(_ending, everything) if reason is not None):
        return "one of its choices failed"
    return why_immovable_in_flight(engine.vllm_config, request, request.sampling_params)


def _num_tokens(state: Any) -> int:
    return state.detokenizer.num_output_tokens() if state.detokenizer is not None else 0


def _num_cached_tokens(state: Any) -> int | None:
    """Prompt tokens found in the prefix cache; None if not known yet. A resumed request brings the number along."""
    if state.is_prefilling and getattr(state, "remote_prefill_cached_tokens", None) is None:
        return None
    return int(state.num_cached_tokens)


def _ending(state: Any) -> tuple[str | None, int | str | None]:
    ended = getattr(state.parent_req, "sllm_ended", {}) if state.parent_req is not None else {}
    return ended.get(state.request_index, (None, None))


def _owned(state: Any) -> OwnedChoice:
    finish_reason, stop_reason = _ending(state)
    logprobs = state.logprobs_processor.logprobs
    return OwnedChoice(
        token_ids=tuple(state.detokenizer.output_token_ids),
        logprobs=tuple(map(_entries, logprobs)) if logprobs is not None else None,
        finish_reason=finish_reason,
        stop_reason=stop_reason,
    )


def _entries(position: Any) -> tuple[TokenLogprob, ...]:
    return tuple((token, found.logprob, found.rank, found.decoded_token) for token, found in position.items())


def _as_json(params: Any) -> Any:
    """The effective sampling parameters, without ``extra_args``, which may hold a resume."""
    fields: Iterable[str] = params.__struct_fields__
    return {name: msgspec.to_builtins(getattr(params, name), enc_hook=str) for name in fields if name != "extra_args"}
