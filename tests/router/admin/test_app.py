"""The operators' half of the router over real HTTP: every route, keys, bodies, and that it shows no secret."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from sllm_vllm.errors import ConfigError
from sllm_vllm.node.protocol import CheckpointReport
from sllm_vllm.router.admin.app import BODY_NBYTES_MAX, EVENTS_MAX
from sllm_vllm.router.config.keys import digest_of
from sllm_vllm.router.config.sections import ModelDefaults
from sllm_vllm.router.core.facts import RequestFacts
from tests.support.cases import every_case
from tests.support.fake_gate import until
from tests.support.fake_node import ADMIN_KEY, HUB_TOKEN, ServedAdmin, serving_admin
from tests.support.waiting import DEADLINE_S

MODEL = "meta/tiny"
V1 = "/sllm/v1"
ROUTES = [
    ("GET", f"{V1}/models"),
    ("GET", f"{V1}/models/{MODEL}"),
    ("POST", f"{V1}/models"),
    ("DELETE", f"{V1}/models/{MODEL}"),
    ("GET", f"{V1}/replicas"),
    ("POST", f"{V1}/replicas/a/drain"),
    ("GET", f"{V1}/nodes"),
    ("POST", f"{V1}/nodes/local/drain"),
    ("POST", f"{V1}/nodes/local/undrain"),
    ("GET", f"{V1}/stores"),
    ("GET", f"{V1}/events"),
    ("GET", f"{V1}/story/{MODEL}"),
    ("GET", f"{V1}/explain/{MODEL}"),
    ("POST", f"{V1}/reload"),
    ("GET", "/metrics"),
    ("GET", f"{V1}/nothing"),
]


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[ServedAdmin]:
    async with serving_admin(tmp_path) as served:
        yield served


def kinds(found: dict[str, Any]) -> list[str]:
    return [event["kind"] for event in found["events"]]


# ---------------------------------------------------------------------------------------------------------------- keys


@every_case("headers", [{}, {"authorization": "Bearer other"}, {"authorization": "Basic x"}])
async def test_no_route_without_a_key(served: ServedAdmin, headers: dict[str, str]) -> None:
    for method, path in ROUTES:
        answer = await served.ask(method, path, headers=headers)
        assert (answer.status, answer.error["code"]) == (401, "invalid_api_key"), path
        assert answer.headers["www-authenticate"] == "Bearer"


async def test_without_keys_it_is_closed_and_not_open(tmp_path: Path) -> None:
    async with serving_admin(tmp_path, keys=()) as served:
        for method, path in ROUTES:
            for headers in ({}, {"authorization": f"Bearer {ADMIN_KEY}"}):
                answer = await served.ask(method, path, headers=headers)
                assert (answer.status, answer.error["code"]) == (403, "admin_disabled"), path


async def test_keys_can_be_replaced(served: ServedAdmin) -> None:
    served.admin.set_keys([digest_of("new")])
    assert (await served.ask("GET", f"{V1}/models")).status == 401
    assert (await served.ask("GET", f"{V1}/models", headers={"authorization": "Bearer new"})).status == 200


# -------------------------------------------------------------------------------------------------------------- models


@pytest.mark.parametrize(
    ("name", "status", "told"),
    [
        ("org/unkeepable", 503, "It could not be kept"),
        ("org/locked", 503, "locked by another process"),
        ("org/too-much", 507, "There is no room"),
        ("org/damaged", 500, "The state is damaged"),
    ],
)
async def test_what_cannot_be_kept_is_not_done_and_the_reason_told_apart(
    served: ServedAdmin, name: str, status: int, told: str
) -> None:
    answer = await served.ask("POST", f"{V1}/models", {"name": name})
    assert (answer.status, answer.error["code"]) == (status, "state_unavailable")
    assert told in answer.error["message"]
    assert "nothing was changed" in answer.error["message"]
    assert name not in served.controller.models


async def test_deploy_a_model_and_see_it(served: ServedAdmin) -> None:
    arguments = ["--max-model-len=512", "--hf-token", HUB_TOKEN, f"--hf-token={HUB_TOKEN}", "--enforce-eager"]
    answer = await served.ask(
        "POST",
        f"{V1}/models",
        {
            "name": MODEL,
            "source": "./weights",
            "min_replicas": 1,
            "engine_arguments": arguments,
            "environment": {"HF_TOKEN": HUB_TOKEN, "B": 1},
        },
    )
    assert (answer.status, answer.json["done"]) == (201, "added")
    await served.replica(MODEL)
    (model,) = (await served.get(f"{V1}/models"))["models"]
    assert model == await served.get(f"{V1}/models/{MODEL}") | {"prediction": model["prediction"]}
    assert model["engine_arguments"] == ["--max-model-len=512", "--hf-token", "…", "--hf-token=…", "--enforce-eager"]
    assert (model["name"], model["source"], model["environment"]) == (MODEL, "weights", ["B", "HF_TOKEN"])
    assert model["spec"]["min_replicas"] == 1
    assert model["replicas"] == {"ordered": 0, "ready": 1, "draining": 0, "stopping": 0}
    assert (model["ongoing"], model["waiting"], model["back_off"]) == (0, 0, None)
    assert [term["term"] for term in model["prediction"]["terms"]] == [
        "queue",
        "process",
        "init",
        "weights",
        "prefill",
    ]
    assert served.node.orders[0].environment["HF_TOKEN"] == HUB_TOKEN
    assert not served.node.orders[0].takes_socket  # that node may be another machine


async def test_a_deployed_model_has_the_defaults_that_it_does_not_set(served: ServedAdmin) -> None:
    defaults = ModelDefaults.model_validate(
        {"queue_max": 5, "keep_alive": 60, "engine_arguments": {"max-model-len": 512, "seed": 1}}
    )
    served.admin.set_defaults(defaults)
    await served.deploy(MODEL, keep_alive=None, engine_arguments={"seed": 2})
    kept = served.controller.models[MODEL]
    assert (kept.queue_max, kept.keep_alive) == (5, None)
    assert kept.engine_arguments == ("--max-model-len=512", "--seed=2")


async def test_warnings_are_passed_on(served: ServedAdmin) -> None:
    assert (await served.deploy(MODEL, engine_arguments=["--nonsense=1"]))["warnings"] == [
        "--nonsense=1: not an option"
    ]
    assert (await served.deploy(MODEL))["warnings"] == []


async def test_deploying_again_says_what_changes(served: ServedAdmin) -> None:
    done = [
        (await served.deploy(MODEL))["done"],
        (await served.deploy(MODEL))["done"],
        (await served.deploy(MODEL, queue_max=7))["done"],
        (await served.deploy(MODEL, queue_max=7, engine_arguments={"max-model-len": 512}))["done"],
    ]
    assert done == ["added", "unchanged", "adjusted", "restarted"]
    assert served.controller.core.models[MODEL].spec.queue_max == 7


@every_case(
    "body, told",
    [
        (b"", "line 1: not valid JSON"),
        (b"\xff", "it is not UTF-8: byte 0 is invalid"),
        (b"[]", "the body must be a mapping"),
        (b"[" * 5000, "not valid JSON"),
        (b'{"name": "a", "name": "b"}', "line 1: name: duplicate key 'name'"),
        (b"{}", "name: it is missing"),
        (b'{"name": "a", "nam": 1}', "nam: unknown key; did you mean `name`?"),
        (b'{"name": "a", "min_replicas": 3}', "max_replicas: 1 is less than min_replicas, 3"),
        (b'{"name": "a", "engine_arguments": ["--api-key=x"]}', "engine_arguments[0]: --api-key is not allowed here"),
        (b'{"name": "a", "queue_timeout": NaN}', "not valid JSON (NaN is not a number)"),
        (b'{"name": "a", "source": "/models/missing"}', "/models/missing: No such file or directory"),
    ],
)
async def test_a_wrong_model_is_refused_in_one_line(served: ServedAdmin, body: bytes, told: str) -> None:
    answer = await served.ask("POST", f"{V1}/models", body)
    assert (answer.status, answer.error["code"]) == (400, "invalid_model")
    assert answer.error["message"].startswith(told)
    assert "\n" not in answer.error["message"]
    assert served.controller.models == {}


async def test_a_body_that_is_too_large(served: ServedAdmin) -> None:
    answer = await served.ask("POST", f"{V1}/models", b" " * (BODY_NBYTES_MAX + 1))
    assert (answer.status, answer.error["code"]) == (413, "body_too_large")
    assert (await served.ask("POST", f"{V1}/models", b'{"name": "a"}' + b" " * 1000)).status == 201


async def test_delete_a_model_with_slashes_and_signs_in_its_name(served: ServedAdmin) -> None:
    name = "org/a b?%2F/../drain"
    await served.deploy(name)
    answer = await served.ask("DELETE", f"{V1}/models/{quote(name, safe='')}")
    assert (answer.status, answer.json) == (200, {"deleted": name})
    assert served.controller.models == {}


@every_case(
    "method, path, code",
    [
        ("GET", f"{V1}/models/nobody/x", "model_not_found"),
        ("DELETE", f"{V1}/models/nobody", "model_not_found"),
        ("GET", f"{V1}/explain/nobody", "model_not_found"),
        ("POST", f"{V1}/replicas/nobody/drain", "replica_not_found"),
        ("POST", f"{V1}/nodes/nobody/drain", "node_not_found"),
        ("POST", f"{V1}/nodes/nobody/undrain", "node_not_found"),
        ("GET", f"{V1}/story/nobody", "not_found"),
        ("GET", f"{V1}/nothing", "not_found"),
        ("GET", "/sllm/v2/models", "not_found"),
        ("GET", f"{V1}/models/", "not_found"),
    ],
)
async def test_unknown_names(served: ServedAdmin, method: str, path: str, code: str) -> None:
    answer = await served.ask(method, path)
    assert (answer.status, answer.error["code"]) == (404, code)


@every_case(
    "method, path, allowed",
    [
        ("PUT", f"{V1}/models", "GET, POST"),
        ("POST", f"{V1}/models/{MODEL}", "GET, DELETE"),
        ("GET", f"{V1}/reload", "POST"),
        ("GET", f"{V1}/replicas/a/drain", "POST"),
        ("POST", "/metrics", "GET"),
    ],
)
async def test_wrong_method(served: ServedAdmin, method: str, path: str, allowed: str) -> None:
    answer = await served.ask(method, path)
    assert (answer.status, answer.headers["allow"]) == (405, allowed)


async def test_a_model_whose_starts_fail(served: ServedAdmin) -> None:
    served.node.refusal = "no slot is free"
    await served.deploy(MODEL, min_replicas=1)
    await until(lambda: served.controller.core.models[MODEL].back_off.num_failures, "a failed start")
    back_off = (await served.get(f"{V1}/models/{MODEL}"))["back_off"]
    assert (back_off["num_failures"] >= 1, back_off["reason"]) == (True, "no slot is free")


# -------------------------------------------------------------------------------------------------- replicas and nodes


async def test_replicas_with_their_agents_report(served: ServedAdmin) -> None:
    served.node.may_be_ready.clear()
    await served.deploy(MODEL, min_replicas=1)
    await until(lambda: served.controller.replica_reports(), "the agent's report")
    (replica,) = (await served.get(f"{V1}/replicas"))["replicas"]
    assert (replica["model"], replica["node"], replica["state"], replica["ongoing"]) == (MODEL, "local", "ordered", 0)
    assert replica["ready_in_s"] > 0
    assert (replica["report"]["state"], replica["report"]["start"]["phase"]) == ("loading", "weights")
    assert "api_key" not in replica["report"]


async def test_drain_a_replica(served: ServedAdmin) -> None:
    await served.deploy(MODEL, min_replicas=1)
    replica = await served.replica(MODEL)
    answer = await served.ask("POST", f"{V1}/replicas/{replica}/drain")
    assert (answer.status, answer.json) == (202, {"replica": replica, "state": "stopping", "ongoing": 0})
    await until(lambda: replica not in served.controller.core.cluster.replicas, "its end")


async def test_a_replica_that_starts_can_not_be_drained(served: ServedAdmin) -> None:
    served.node.may_be_ready.clear()
    await served.deploy(MODEL, min_replicas=1)
    replica = await served.replica(MODEL, "ordered")
    answer = await served.ask("POST", f"{V1}/replicas/{replica}/drain")
    assert (answer.status, answer.error["code"]) == (409, "conflict")


async def test_nodes_and_draining_one(served: ServedAdmin) -> None:
    await served.deploy(MODEL, min_replicas=1)
    replica = await served.replica(MODEL)
    (node,) = (await served.get(f"{V1}/nodes"))["nodes"]
    assert (node["id"], node["num_slots"], node["num_free"], node["replicas"]) == ("local", 2, 1, [replica])
    assert (node["report"]["version"], node["report"]["warm"]["num_forks"]) == ("1.2.3", 3)
    answer = await served.ask("POST", f"{V1}/nodes/local/drain")
    assert (answer.status, answer.json) == (202, {"node": "local", "is_drained": True, "replicas": [replica]})
    await until(lambda: not served.controller.core.cluster.replicas, "its end")
    (node,) = (await served.get(f"{V1}/nodes"))["nodes"]
    assert (node["is_drained"], node["num_free"]) == (True, 2)
    assert "no node that takes starts" in (await served.get(f"{V1}/explain/{MODEL}"))["request"]["why"]
    answer = await served.ask("POST", f"{V1}/nodes/local/undrain")
    assert (answer.status, answer.json) == (200, {"node": "local", "is_drained": False})
    assert await served.replica(MODEL) != replica


async def test_stores(served: ServedAdmin) -> None:
    checkpoint = CheckpointReport(name="tiny-1", nbytes=100, resident_nbytes=50, tiers=("disk",), model=MODEL)
    served.node.checkpoints = (checkpoint,)
    await served.deploy(MODEL, min_replicas=1)
    await until(lambda: served.controller.node_reports()["local"].checkpoints, "a report with it")
    (found,) = (await served.get(f"{V1}/stores"))["stores"]
    assert (found["node"], found["problem"]) == ("local", "no daemon answers")
    assert found["checkpoints"] == [{**checkpoint.model_dump(), "tiers": ["disk"]}]
    assert found["hops"] == {"disk": {"bps": 2e9, "limit_bps": None}}


# ------------------------------------------------------------------------------------------------------------- stories


async def test_events_are_the_last_ones(served: ServedAdmin) -> None:
    await served.deploy(MODEL, min_replicas=1)
    await served.replica(MODEL)
    found = await served.get(f"{V1}/events")
    assert kinds(found)[0] == "NodeJoined"
    assert "NodeReported" not in kinds(found)  # it comes all the time
    assert {"ModelDeployed", "StartReplica", "ReplicaReady"} <= set(kinds(found))
    last = await served.get(f"{V1}/events?last=1")
    assert len(last["events"]) == 1
    assert all(event["ago_s"] >= 0 for event in found["events"])


@every_case("last", ["0", "-1", "x", "1.5", str(EVENTS_MAX + 1), "9" * 5000, "%D9%A1"])
async def test_events_with_a_wrong_number(served: ServedAdmin, last: str) -> None:
    answer = await served.ask("GET", f"{V1}/events?last={last}")
    assert (answer.status, answer.error["param"]) == (400, "last")


async def test_stories_of_a_request_a_replica_and_a_model(served: ServedAdmin) -> None:
    await served.deploy(MODEL)
    await served.answer_request(MODEL, "r/1 ?")
    replica = await served.replica(MODEL)
    request_story = await served.get(f"{V1}/story/{quote('r/1 ?', safe='')}")
    assert kinds(request_story) == ["RequestArrived", "Dispatch", "FirstByte", "RequestEnded"]
    assert request_story["events"][1]["fields"] == {"request": "r/1 ?", "replica": replica, "attempt": 1}
    assert kinds(await served.get(f"{V1}/story/{replica}")) == ["StartReplica", "ReplicaReady", "Dispatch"]
    assert "ModelDeployed" in kinds(await served.get(f"{V1}/story/{MODEL}"))
    assert kinds(await served.get(f"{V1}/story/{replica}?last=1")) == ["Dispatch"]


# ---------------------------------------------------------------------------------------------------------- explaining


async def test_explain_a_model_that_sleeps_and_then_one_that_answered(served: ServedAdmin) -> None:
    await served.deploy(MODEL)
    before = await served.get(f"{V1}/explain/{MODEL}")
    (plan,) = before["plans"]
    assert (plan["kind"], plan["node"], plan["is_best"], plan["victims"]) == ("start", "local", True, [])
    assert plan["total_s"] == pytest.approx(sum(plan["terms"].values()))
    assert before["request"] == {"what": "start", "replica": None, "expected_s": plan["total_s"], "why": ""}
    assert (before["under_way"], before["last"]) == ([], None)
    await served.answer_request(MODEL)
    after = await served.get(f"{V1}/explain/{MODEL}")
    assert (after["request"]["what"], after["request"]["replica"]) == ("replica", await served.replica(MODEL))
    took = {term["term"]: term["actual_s"] for term in after["last"]["terms"]}
    assert (took["process"], took["init"], took["weights"]) == (0.75, 1.0, 2.0)
    assert after["last"]["expected_s"] == pytest.approx(plan["total_s"], abs=0.1)


async def test_explain_a_start_under_way(served: ServedAdmin) -> None:
    served.node.may_be_ready.clear()
    await served.deploy(MODEL, min_replicas=1)
    replica = await served.replica(MODEL, "ordered")
    found = await served.get(f"{V1}/explain/{MODEL}")
    assert (found["request"]["what"], found["request"]["replica"]) == ("starting", replica)
    (prediction,) = found["under_way"]
    assert (prediction["replica"], prediction["actual_s"]) == (replica, None)


async def test_the_newest_prediction_is_shown(served: ServedAdmin) -> None:
    await served.deploy(MODEL)
    await served.answer_request(MODEL)
    old = (await served.get(f"{V1}/models/{MODEL}"))["prediction"]
    assert old["actual_s"] is not None
    served.node.may_be_ready.clear()
    await served.deploy(MODEL, engine_arguments=["--enforce-eager"])
    new = (await served.get(f"{V1}/models/{MODEL}"))["prediction"]
    assert (new["replica"], new["actual_s"]) == (await served.replica(MODEL, "ordered"), None)


async def test_explain_full_replicas_queues_and_refusals(served: ServedAdmin) -> None:
    await served.deploy(MODEL, ongoing_max=1, queue_max=1)
    first = await asyncio.wait_for(served.controller.acquire(RequestFacts("r-1", MODEL)), DEADLINE_S)
    assert (await served.get(f"{V1}/explain/{MODEL}"))["request"]["why"] == "every replica is full"
    second = asyncio.create_task(served.controller.acquire(RequestFacts("r-2", MODEL)))
    await until(lambda: served.controller.core.queues.waiting(MODEL), "the second one's place in the queue")
    refused = (await served.get(f"{V1}/explain/{MODEL}"))["request"]
    assert (refused["what"], refused["why"]) == ("refused", "the queue is full")
    model = await served.get(f"{V1}/models/{MODEL}")
    assert (model["ongoing"], model["waiting"]) == (1, 1)
    second.cancel()
    await asyncio.wait({second})
    assert first.replica == await served.replica(MODEL)


async def test_explain_a_model_that_fits_nowhere(served: ServedAdmin) -> None:
    await served.deploy("wide", accelerators=3)
    found = await served.get(f"{V1}/explain/wide")
    assert (found["plans"], found["request"]["what"]) == ([], "queue")
    assert "slots" in found["request"]["why"]


# -------------------------------------------------------------------------------------------------------------- reload


async def test_reload_says_what_changed(served: ServedAdmin) -> None:
    served.reloads.append("added 1")
    answer = await served.ask("POST", f"{V1}/reload")
    assert (answer.status, answer.json) == (200, {"changed": "added 1", "warnings": ["a warning"]})


async def test_reload_of_a_wrong_configuration(served: ServedAdmin) -> None:
    served.reloads.append(ConfigError("router.yaml: models[0].name: it is missing"))
    answer = await served.ask("POST", f"{V1}/reload")
    assert (answer.status, answer.error["code"]) == (400, "invalid_config")
    assert answer.error["message"] == "router.yaml: models[0].name: it is missing"


async def test_a_failure_of_the_router_itself_is_500_and_logged(
    served: ServedAdmin, caplog: pytest.LogCaptureFixture
) -> None:
    answer = await served.ask("POST", f"{V1}/reload")  # the fake has nothing to say
    assert (answer.status, answer.error["type"]) == (500, "server_error")
    assert "event=admin_failed" in caplog.text
    assert (await served.ask("GET", f"{V1}/models")).status == 200


# ------------------------------------------------------------------------------------------------------------- secrets


async def test_no_answer_shows_a_key(served: ServedAdmin) -> None:
    """``ask`` itself looks for the keys of engines and operators in everything that it reads."""
    await served.deploy(MODEL, environment={"HF_TOKEN": HUB_TOKEN}, engine_arguments=["--hf-token", HUB_TOKEN])
    await served.answer_request(MODEL)
    replica = await served.replica(MODEL)
    paths = [path.replace("/a/drain", "") for method, path in ROUTES if method == "GET"]
    texts = [(await served.ask("GET", path)).text for path in (*paths, f"{V1}/story/{replica}", f"{V1}/story/local")]
    assert len([text for text in texts if replica in text]) >= 5
    assert json.loads(texts[0])["models"][0]["environment"] == ["HF_TOKEN"]
