"""Notes beside an answer, and the end of an API server whose core has died; over a fake of vLLM's front end."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

from sllm_vllm.engine.answer_notes import AnswerNotes
from sllm_vllm.router.migration.token_log import LOG_NBYTES_MAX, TokenLog

EVENT = b'data: {"choices": []}\n\n'


def front_end(*tokens: int, logprobs: Any = None) -> Any:
    """With one request in flight, called ``x``."""
    params = SimpleNamespace(prompt_logprobs=None, output_kind=SimpleNamespace(name="DELTA"), extra_args=None)
    request = SimpleNamespace(
        prompt_embeds=None, prompt_token_ids=[1, 2], mm_features=None, resumable=False, sampling_params=params
    )
    numbers = list(tokens)
    state = SimpleNamespace(
        request_id="r",
        external_req_id="cmpl-x-0",
        parent_req=None,
        prompt_len=2,
        prompt_token_ids=[1, 2],
        request_index=0,
        sllm_request=request,
        is_prefilling=False,
        num_cached_tokens=0,
        detokenizer=SimpleNamespace(output_token_ids=numbers, num_output_tokens=lambda: len(numbers)),
        logprobs_processor=SimpleNamespace(logprobs=logprobs),
    )
    model = SimpleNamespace(return_sampling_mask=False, enable_return_routed_experts=False)
    config = SimpleNamespace(model_config=model, speculative_config=None, kv_transfer_config=None)
    processor = SimpleNamespace(request_states={"r": state})
    return SimpleNamespace(errored=False, vllm_config=config, output_processor=processor, state=state)


class Server:
    """An app behind the middleware that sends what it is told, and what comes out of it."""

    def __init__(
        self, engine: Any, *, asks: bool = True, status: int = 200, kind: bytes = b"text/event-stream"
    ) -> None:
        self.engine = engine
        self.sent: list[Any] = []
        self.should_exit = False
        self._status = status
        self._kind = kind
        self._headers = [(b"x-request-id", b"x"), *([(b"x-sllm-notes", b"1")] if asks else [])]

    async def answer(self, *steps: Any) -> bytes:
        """Bodies one after the other; a step that is a function is called. Returns all that was sent of them."""

        async def app(scope: Any, receive: Any, send: Any) -> None:
            headers = [(b"content-type", self._kind)]
            await send({"type": "http.response.start", "status": self._status, "headers": headers})
            for step in steps:
                if callable(step):
                    step()
                else:
                    await send({"type": "http.response.body", "body": step, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})

        async def send(message: Any) -> None:
            self.sent.append(message)

        async def receive() -> Any:
            raise AssertionError

        state = SimpleNamespace(state=SimpleNamespace(server=self))
        scope = {"type": "http", "headers": self._headers, "app": state}
        await AnswerNotes(app, engine=lambda: self.engine)(scope, receive, send)
        return b"".join(one.get("body", b"") for one in self.sent)

    @property
    def is_complete(self) -> bool:
        return self.sent[-1].get("more_body") is False


async def test_a_stream_says_its_tokens_before_its_text_and_each_once() -> None:
    engine = front_end(5)
    more = engine.state.detokenizer.output_token_ids
    body = await Server(engine).answer(EVENT, lambda: more.extend([6, 7]), EVENT, EVENT)
    log = TokenLog()
    assert log.strip(body) == 3 * EVENT
    found = log.resume()
    assert found is not None
    assert found["choices"][0]["token_ids"] == [5, 6, 7]
    assert body.count(b": sllm ") == 2
    assert log.goes_on_from({**found, "choices": [{"token_ids": [5, 6]}]})
    assert not log.goes_on_from({**found, "choices": [{"token_ids": [6]}]})


async def test_logprobs_keep_every_bit() -> None:
    position = {5: SimpleNamespace(logprob=-0.1 - 2**-50, rank=1, decoded_token="a")}
    body = await Server(front_end(5, logprobs=[position])).answer(EVENT)
    log = TokenLog()
    log.strip(body)
    found = log.resume()
    assert found is not None
    assert found["choices"][0]["logprobs"] == [[[5, -0.1 - 2**-50, 1, "a"]]]


async def test_an_answer_whose_tokens_are_all_there_is_not_to_be_continued() -> None:
    engine = front_end(5)
    body = await Server(engine).answer(EVENT, engine.output_processor.request_states.clear, EVENT)
    log = TokenLog()
    assert log.strip(body) == 2 * EVENT
    assert log.resume() is None


async def test_who_does_not_ask_gets_no_notes() -> None:
    assert await Server(front_end(5), asks=False).answer(EVENT) == EVENT
    assert await Server(front_end(5), kind=b"application/json").answer(b"{}") == b"{}"


async def test_a_request_that_cant_be_moved_or_is_not_known_has_no_notes() -> None:
    engine = front_end(5)
    engine.state.sllm_request.mm_features = ["an image"]
    assert await Server(engine).answer(EVENT) == EVENT
    engine.output_processor.request_states.clear()
    assert await Server(engine).answer(EVENT) == EVENT


async def test_a_stream_whose_core_dies_is_cut_and_says_so() -> None:
    """vLLM would end it well, with an error in it, and its server would serve on for seconds."""
    engine = front_end(5)
    server = Server(engine)
    body = await server.answer(EVENT, lambda: setattr(engine, "errored", True), b'data: {"error": "EngineDead"}\n\n')
    log = TokenLog()
    assert log.strip(body) == EVENT
    assert log.has_died
    assert log.resume() is not None
    assert not server.is_complete
    assert server.should_exit


async def test_an_answer_that_has_not_begun_says_in_its_head_that_the_core_has_died() -> None:
    engine = front_end()
    engine.errored = True
    server = Server(engine, asks=False, status=500, kind=b"application/json")
    await server.answer(b"{}")
    assert (b"x-sllm-core", b"died") in server.sent[0]["headers"]
    assert server.is_complete
    assert server.should_exit


async def test_an_error_of_one_request_is_passed_on() -> None:
    server = Server(front_end(), status=500, kind=b"application/json")
    assert await server.answer(b"{}") == b"{}"
    assert not server.should_exit


def test_a_log_is_bounded() -> None:
    log = TokenLog()
    log.strip(b': sllm [{"d":"x","c":0,"n":1}]\n' + EVENT)
    note = json.dumps([{"i": 0, "t": [1] * 10_000}]).encode()
    for _ in range(LOG_NBYTES_MAX // len(note) + 1):
        assert log.strip(b": sllm " + note + b"\n" + EVENT) == EVENT
    assert log.resume() is None
    assert log.num_tokens == 0


def test_notes_of_another_version_continue_nothing() -> None:
    for rubbish in (b"{}", b"[{}]", b"[1]", b'[{"i":3,"t":[1]}]', b'[{"d":1}]', b"nothing"):
        log = TokenLog()
        assert log.strip(b": sllm " + rubbish + b"\n" + EVENT) == EVENT
        assert log.resume() is None
