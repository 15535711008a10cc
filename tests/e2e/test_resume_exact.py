"""A request that goes on with its own tokens gives what it would have given unmoved: on one real engine, in fp32."""

from __future__ import annotations

import functools
import itertools
import json
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sllm_vllm.engine.resume import OwnedChoice, Resume
from tests.conftest import ModelDir
from tests.e2e.resume_cases import (
    CARRYING,
    CASES,
    ENDED,
    LONG,
    SAMPLE,
    SEEDED,
    THINK,
    WHOLE_ONLY,
    completion,
    structured,
)
from tests.e2e.resumed import Answer, Client, carried, compare, take_over
from tests.support.vllm_server import vllm_server
from tests.support.waiting import wait_until

KEY = "a key of the engine"
ARGUMENTS = (
    *("--max-model-len", "1024", "--dtype", "float32", "--block-size", "32", "--max-num-seqs", "16"),
    *("--enable-chunked-prefill", "--max-num-batched-tokens", "64"),  # prompts and what is resumed come in chunks
    *("--reasoning-parser", "deepseek_r1", "--tool-call-parser", "hermes", "--enable-auto-tool-choice"),
    *("--enable-prompt-tokens-details", "--api-key", KEY),
)
ENVIRONMENT = {"VLLM_PLUGINS": "sllm", "SLLM_MIGRATION": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
OWNED = (1, 2, 17, 50, -1)
AS_LONG_AS = 20
LONGEST = 10_000

Whole = Callable[[str, bool], Answer]


def with_marks(model: Path, target: Path) -> Path:
    """A copy of a model whose tokenizer has the marks of reasoning and of tool calls."""
    shutil.copytree(model, target)
    tokenizer = json.loads((target / "tokenizer.json").read_text())
    for id_, content in enumerate(("<think>", "</think>", "<tool_call>", "</tool_call>"), start=THINK):
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
        tokenizer["added_tokens"].append({"id": id_, "content": content, **flags})
    (target / "tokenizer.json").write_text(json.dumps(tokenizer))
    return target


def write_adapter(path: Path) -> Path:
    """A random LoRA adapter of the tiny model, strong enough to change what it says."""
    import torch
    from safetensors.torch import save_file

    generator, tensors = torch.Generator().manual_seed(1), {}
    for layer, (name, rows) in itertools.product(range(4), {"q_proj": 256, "v_proj": 128}.items()):
        stem = f"base_model.model.model.layers.{layer}.self_attn.{name}"
        tensors[f"{stem}.lora_A.weight"] = torch.randn(8, 256, generator=generator) * 0.1
        tensors[f"{stem}.lora_B.weight"] = torch.randn(rows, 8, generator=generator) * 0.1
    path.mkdir()
    save_file(tensors, path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"], "bias": "none"}
    (path / "adapter_config.json").write_text(json.dumps({**config, "task_type": "CAUSAL_LM"}))
    return path


@pytest.fixture(scope="module")
def client(model_dir: ModelDir, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    directory = tmp_path_factory.mktemp("resume")
    model = with_marks(model_dir("llama", dtype="float32"), directory / "model")
    adapter = ("--enable-lora", "--max-lora-rank", "8", "--lora-modules", f"ada={write_adapter(directory / 'ada')}")
    with vllm_server(model, directory, *ARGUMENTS, *adapter, environment=ENVIRONMENT) as server:
        client = Client(f"http://127.0.0.1:{server.port}", str(model), {"Authorization": f"Bearer {KEY}"})
        wait_until(lambda: client.get("/sllm/state")["resume"] is not None, "the self-test")
        yield client


@pytest.fixture(scope="module")
def whole(client: Client) -> Whole:
    """Unmoved answers, each asked for once."""

    @functools.cache
    def ask(name: str, stream: bool) -> Answer:
        path, body = {**CASES, **WHOLE_ONLY}[name]
        return client.ask(path, {**body, "stream": stream})

    return ask


def problem_of(client: Client, whole: Answer, case: tuple[str, dict[str, Any]], num_owned: int) -> str:
    """What differs in the answer to a case that owns so many tokens; empty if nothing does."""
    path, body = case
    longest = max(map(len, whole.token_ids)) - 1
    owned = longest if num_owned < 0 else min(num_owned, longest)
    try:
        compare(whole, client.ask(path, body, whole.resume(owned)))
    except AssertionError as problem:
        return str(problem)[:2000]
    return ""


def check(client: Client, whole: Whole, name: str, *, num_owned: int, stream: bool) -> str:
    path, body = {**CASES, **WHOLE_ONLY}[name]
    return problem_of(client, whole(name, stream), (path, {**body, "stream": stream}), num_owned)


@pytest.mark.e2e_long
def test_a_sample_of_requests_goes_on_as_if_unmoved(client: Client, whole: Whole) -> None:
    """One test, not forty: each worker of the test run would start an engine of its own."""
    assert client.get("/sllm/state")["resume"] is True
    told = {case: check(client, whole, case[0], num_owned=case[1], stream=case[2]) for case in SAMPLE}
    assert {case: problem for case, problem in told.items() if problem} == {}


@pytest.mark.e2e_long
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", [*CASES, *WHOLE_ONLY])
def test_every_case_goes_on_as_if_unmoved(client: Client, whole: Whole, name: str, stream: bool) -> None:
    if stream and name in WHOLE_ONLY:
        pytest.skip("never streamed")
    told = {num: check(client, whole, name, num_owned=num, stream=stream) for num in OWNED}
    assert {num: problem for num, problem in told.items() if problem} == {}


@pytest.mark.e2e_long
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", list(CARRYING))
def test_a_request_taken_over_goes_on_with_its_logprobs(client: Client, name: str, stream: bool) -> None:
    path, body = CARRYING[name]
    body = {**body, "stream": stream}
    client.ask(path, body)  # from here on the prompt is in the prefix cache, and `usage` says so each time
    whole = client.ask(path, body)
    told, sent = take_over(client, path, body, num_tokens=AS_LONG_AS)
    resume = carried(told)
    for index, choice in enumerate(resume.choices):
        ids = sent.choices[index].token_ids
        assert list(choice.token_ids[: len(ids)]) == ids
    for num in (*OWNED[:-1], LONGEST):
        compare(whole, client.ask(path, body, resume.first([num] * len(resume.choices))))


@pytest.mark.e2e_long
@pytest.mark.parametrize("name", list(CARRYING))
def test_a_request_moves_twice(client: Client, name: str) -> None:
    path, body = CARRYING[name]
    whole = client.ask(path, body)
    first, _ = take_over(client, path, body, num_tokens=AS_LONG_AS)
    second, _ = take_over(client, path, body, num_tokens=3 * AS_LONG_AS, resume=carried(first))
    assert all(num >= 3 * AS_LONG_AS for num in second["num_output_tokens"])
    compare(whole, client.ask(path, body, carried(second)))


@pytest.mark.e2e_long
def test_a_request_that_does_not_stream_is_taken_over_too(client: Client) -> None:
    path, body = completion(max_tokens=LONG, **SEEDED)
    whole = client.ask(path, body)
    named = replace(client, headers={**client.headers, "X-Request-Id": "plain"})
    with ThreadPoolExecutor(1) as pool:
        unmoved = pool.submit(named.ask, path, body)
        wait_until(lambda: client.status("/sllm/requests/plain/tokens") == 200, "the request")
        told = client.get("/sllm/requests/plain/tokens")
        assert unmoved.result().choices == whole.choices
    assert told["sampling_params"]["seed"] == body["seed"]
    assert told["prompt_token_ids"] == body["prompt"]
    compare(whole, client.ask(path, body, carried(told)))


@pytest.mark.e2e_long
@pytest.mark.parametrize("stream", [False, True])
def test_choices_that_have_ended_stay_ended(client: Client, stream: bool) -> None:
    path, body = ENDED
    body = {**body, "stream": stream}
    whole = client.ask(path, body)
    told, _ = take_over(client, path, body, num_tokens=min(map(len, whole.token_ids)) + 1)
    resume = carried(told)
    assert {choice.finish_reason for choice in resume.choices} == {None, "stop"}
    compare(whole, client.ask(path, body, resume))


@pytest.mark.e2e_long
@pytest.mark.parametrize(("step", "seen"), [(1, [1, 2, 3]), (5, [5, 10, 15]), (0, [20, 21, 22])])
def test_a_replay_comes_in_the_steps_that_were_asked_for(client: Client, step: int, seen: list[int]) -> None:
    path, body = completion(stream=True)
    whole = client.ask(path, body)
    resumed = client.ask(path, body, replace(whole.resume(20), step=step))
    compare(whole, resumed)
    assert sorted(resumed.choices[0].states)[:3] == seen


@pytest.mark.e2e_long
@pytest.mark.parametrize("name", ["greedy", "seed", "regex", "chat"])
def test_an_adapters_request_goes_on_as_if_unmoved(client: Client, whole: Whole, name: str) -> None:
    adapted = replace(client, model="ada")
    path, body = CASES[name]
    said = adapted.ask(path, body)
    assert said.token_ids != whole(name, False).token_ids
    told = {num: problem_of(adapted, said, (path, body), num) for num in OWNED}
    assert {num: problem for num, problem in told.items() if problem} == {}


@pytest.mark.e2e_long
@pytest.mark.parametrize("stream", [False, True])
def test_a_chat_goes_on_from_its_own_prompt_whatever_a_template_makes_now(client: Client, stream: bool) -> None:
    path, body = CASES["chat-tool-parsed"]
    body = {**body, "stream": stream}
    whole = client.ask(path, body)
    later = {**body, "messages": [{"role": "user", "content": "as rendered a day later"}]}
    status, message = client.refusal(path, later, whole.resume(30).to_json())
    assert (status, "prompt" in message) == (400, True)
    pinned = {**later, "kv_transfer_params": {"prompt_token_ids": whole.prompt_token_ids}}
    compare(whole, client.ask(path, pinned, whole.resume(30)))


@pytest.mark.e2e_long
def test_without_its_state_an_answer_would_differ(client: Client) -> None:
    """The cases can tell: plain resubmission of prompt and tokens is wrong in these."""
    for name in ("presence", "frequency", "min-tokens", "regex"):
        path, body = CASES[name]
        whole = client.ask(path, body)
        naive = {**body, "prompt": [*body["prompt"], *whole.token_ids[0][:17]], "max_tokens": body["max_tokens"] - 17}
        if "min_tokens" in body:
            naive["max_tokens"] = body["max_tokens"]
        assert whole.token_ids[0][:17] + client.ask(path, naive).token_ids[0] != whole.token_ids[0], name


@pytest.mark.e2e_long
def test_what_cant_be_resumed_is_refused_before_it_streams(client: Client) -> None:
    path, body = completion()
    resume = client.ask(path, body).resume(5)
    refused: list[tuple[dict[str, Any], Any, str]] = [
        ({}, "no JSON", "is no JSON"),
        ({}, 7, "must be a string"),
        ({}, replace(resume, prompt_digest="another").to_json(), "prompt"),
        ({}, replace(resume, choices=(OwnedChoice((512,)),)).to_json(), "vocabulary"),
        ({}, replace(resume, choices=(OwnedChoice((1,) * 64),)).to_json(), "max_tokens"),
        ({"n": 2, **SEEDED}, resume.to_json(), "n=2"),
        ({"logprobs": 1}, resume.to_json(), "logprobs"),
        ({"use_beam_search": True, "n": 2}, resume.to_json(), "beam search"),
    ]
    for more, value, reason in refused:
        for stream in (False, True):
            if stream and "use_beam_search" in more:
                continue
            status, message = client.refusal(path, {**body, **more, "stream": stream}, value)
            assert status == 400, message
            assert reason in message


@pytest.mark.e2e_long
def test_a_choice_that_only_claims_to_have_ended_never_reaches_the_core(client: Client) -> None:
    """Its tokens have other bounds than an open one's; the worker would die of them."""
    path, body = completion(n=2, **SEEDED)
    open_ = OwnedChoice((1, 2))
    ended = OwnedChoice((3,) * body["max_tokens"], None, "stop", "a string that is not there")
    prompt = client.ask(path, body).resume(2).prompt_digest
    for choices in ((open_, ended), (ended, open_)):
        status, message = client.refusal(path, body, Resume(prompt, choices).to_json())
        assert (status, "stop string" in message) == (400, True)
    compare(client.ask(*CASES["greedy"]), client.ask(*CASES["greedy"]))
    assert client.get("/sllm/requests") == {"requests": []}


@pytest.mark.e2e_long
def test_tokens_that_no_grammar_takes_fail_their_request_alone(client: Client) -> None:
    path, body = structured(regex="[0-9]{20}")
    resume = client.ask(path, body).resume(3)
    status, _ = client.refusal(path, body, replace(resume, choices=(OwnedChoice((300, 301)),)).to_json())
    assert status == 500
    compare(client.ask(*CASES["regex"]), client.ask(*CASES["regex"]))


@pytest.mark.e2e_long
def test_our_routes_want_the_engines_key(client: Client) -> None:
    stranger = replace(client, headers={"Authorization": "Bearer another"})
    for path in ("/sllm/state", "/sllm/requests", "/sllm/requests/x/tokens"):
        assert stranger.status(path) == 401
        assert replace(client, headers={}).status(path) == 401
    assert client.status("/sllm/requests/unknown/tokens") == 404
    assert client.get("/sllm/requests") == {"requests": []}
