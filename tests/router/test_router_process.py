"""The whole router over fake engines: cold requests, evictions, and everything that can be killed or break."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from sllm_vllm.config import child_environment
from sllm_vllm.daemon.unix_listener import socket_of_url
from tests.support.listening import listening_addresses
from tests.support.process_tree import descendants
from tests.support.router_process import RouterUnderTest, is_alive, running_router, write_config
from tests.support.waiting import DEADLINE_S, wait_until


def test_the_first_request_starts_an_engine_and_the_next_finds_it(tmp_path: Path) -> None:
    write_config(tmp_path, "fine")
    with running_router(tmp_path) as router:
        first = router.post("fine")
        assert (first.status, router.post("fine").body) == (200, first.body)
        assert router.log.count("event=start ") == 1
        unknown = router.post("nobody")
        assert unknown.status == 404
        assert "fine" in unknown.body["error"]["message"]


@pytest.mark.parametrize("has_sockets", [True, False])
def test_its_engines_listen_on_sockets_that_go_with_them_unless_it_says_otherwise(
    tmp_path: Path, has_sockets: bool
) -> None:
    write_config(tmp_path, "fine", node_changes={"engine_sockets": has_sockets})
    with running_router(tmp_path) as router:
        assert router.post("fine").status == 200
        (report,) = router.node.report().replicas
        assert report.pid is not None
        path = socket_of_url(report.url or "")
        assert (path is not None, report.port is None) == (has_sockets, has_sockets)
        assert bool(listening_addresses(report.pid)) == (not has_sockets)
    assert not (tmp_path / "node" / "sockets").exists()
    assert path is None or not os.path.lexists(path)


def test_a_hundred_requests_at_once_to_a_model_that_is_down_are_all_answered_by_one_start(tmp_path: Path) -> None:
    write_config(tmp_path, "fine")
    with running_router(tmp_path) as router, ThreadPoolExecutor(100) as pool:
        answers = list(pool.map(lambda _: router.post("fine"), range(100)))
        assert [answer.status for answer in answers] == [200] * 100
        assert router.log.count("event=start ") == 1


def test_a_third_model_on_two_slots_takes_an_idle_ones_place(tmp_path: Path) -> None:
    write_config(tmp_path, "fine", "family", "turns-ill")
    with running_router(tmp_path) as router:
        for model in ("fine", "family", "turns-ill", "fine"):
            assert router.post(model).status == 200
        living = [one for one in router.node.report().replicas if one.pid]
        assert len(living) == 2
        assert sum(len(one.slots) for one in living) == 2


def test_an_idle_engine_leaves_when_its_keep_alive_is_over(tmp_path: Path) -> None:
    write_config(tmp_path, "fine", defaults={"keep_alive": 0.2})
    with running_router(tmp_path) as router:
        assert router.post("fine").status == 200
        wait_until(lambda: not router.pids("fine"), "the engine to leave")
        assert "its keep-alive is over" in router.log
        assert router.post("fine").status == 200


def test_an_engine_killed_while_idle_is_started_anew(tmp_path: Path) -> None:
    write_config(tmp_path, "fine")
    with running_router(tmp_path) as router:
        assert router.post("fine").status == 200
        (pid,) = router.pids("fine")
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not is_alive(pid), "its end")
        assert router.post("fine").status == 200


def test_an_engine_killed_while_starting_is_started_again_for_the_request_that_waits(tmp_path: Path) -> None:
    go = tmp_path / "go"
    write_config(tmp_path, "late", defaults={"environment": {"FAKE_ENGINE_GO": str(go)}})
    with running_router(tmp_path) as router, ThreadPoolExecutor(1) as pool:
        waiting = router.post_later(pool, "late")
        wait_until(lambda: router.pids("late"), "a process")
        go.touch()
        os.kill(router.pids("late")[0], signal.SIGKILL)
        assert waiting.result().status == 200


def test_an_engine_that_does_not_start_is_told_with_its_last_line_and_not_tried_for_ever(tmp_path: Path) -> None:
    write_config(tmp_path, "exits-3", "fine")
    with running_router(tmp_path) as router, ThreadPoolExecutor(20) as pool:
        for answer in pool.map(lambda _: router.post("exits-3"), range(20)):
            assert answer.status == 503
            assert "exited with status 3" in answer.body["error"]["message"]
            assert "RuntimeError: Engine core initialization failed" in answer.body["error"]["message"]
            assert 1 <= int(answer.headers["retry-after"]) <= 60
        num_starts = router.log.count("event=start ")
        assert num_starts == 3
        assert router.post("exits-3").status == 503  # at once, without another start
        assert router.log.count("event=start ") == num_starts
        assert router.post("fine").status == 200


def test_no_engine_outlives_a_killed_router_and_the_next_one_serves(tmp_path: Path) -> None:
    write_config(tmp_path, "family")
    with running_router(tmp_path) as router:
        assert router.post("family").status == 200
        (pid,) = router.pids("family")
        log = next((tmp_path / "node" / "logs").glob("*.log")).read_text()
        family = [pid, *(int(line.split()[1]) for line in log.splitlines() if line.startswith("child "))]
        assert len(family) == 3
        router.kill()
        wait_until(lambda: not any(map(is_alive, family)), "the end of all engines")
    with running_router(tmp_path) as router:
        assert router.post("family").status == 200


def test_a_reload_adds_removes_and_changes_models_and_a_broken_file_changes_nothing(tmp_path: Path) -> None:
    write_config(tmp_path, "fine", "family")
    with running_router(tmp_path) as router:
        assert router.post("family").status == 200
        write_config(tmp_path, "fine", "turns-ill")
        router.process.send_signal(signal.SIGHUP)
        wait_until(lambda: "event=reloaded" in router.log, "the reload")
        assert router.post("turns-ill").status == 200
        assert router.post("family").status == 404
        wait_until(lambda: not router.pids("family"), "the engine of what was removed to leave")

        (tmp_path / "router.yaml").write_text("modles: []")
        assert router.admin("reload", "POST").status == 400
        assert router.post("fine").status == 200

        write_config(tmp_path, "fine", "turns-ill", slots=1)
        refused = router.admin("reload", "POST")
        assert refused.status == 400
        assert "node.slots" in str(refused.body)


def test_a_model_that_was_deleted_through_the_api_is_named_by_a_reload_and_by_the_next_start(tmp_path: Path) -> None:
    write_config(tmp_path, "fine", "family")
    told = "; not served until they are deployed or changed in the file, as they were deleted: family"
    with running_router(tmp_path) as router:
        assert router.admin("models/family", "DELETE").status == 200
        assert router.admin("reload", "POST").body == {
            "changed": f"added 0, removed 0, changed 0{told}",
            "warnings": [],
        }
    with running_router(tmp_path) as router:
        assert f"models=1{told}" in router.log


def test_changed_arguments_reach_the_next_engine_and_no_request_is_lost(tmp_path: Path) -> None:
    write_config(tmp_path, "fine")
    with running_router(tmp_path) as router, ThreadPoolExecutor(8) as pool:
        assert router.post("fine").status == 200
        (old,) = router.pids("fine")
        write_config(tmp_path, "fine", defaults={"engine_arguments": ["--max-model-len=77"]})
        assert router.admin("reload", "POST").status == 200
        answers = list(pool.map(lambda _: router.post("fine"), range(40)))
        assert [answer.status for answer in answers] == [200] * 40
        wait_until(lambda: not is_alive(old), "the old engine to leave")
        assert router.post("fine").status == 200
        (new,) = router.pids("fine")
        assert b"--max-model-len=77" in Path(f"/proc/{new}/cmdline").read_bytes()


def test_keys_are_asked_for_and_the_admins_is_another(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("a-client-key\n")
    write_config(tmp_path, "fine", keys={"clients": [{"file": "./keys"}]})
    with running_router(tmp_path) as router:
        assert router.post("fine").status == 401
        assert router.post("fine", key="wrong").status == 401
        assert router.post("fine", key="a-client-key").status == 200
        assert router.admin("models").status == 200
        (tmp_path / "node" / "admin.key").write_text("a-client-key")
        assert router.admin("models").status in (401, 403)


def test_no_process_below_the_router_gets_its_keys(tmp_path: Path) -> None:
    """Neither through what it reads of its environment, nor through ``/proc/PID/environ``."""
    given = {name: f"key-in-{name.lower()}" for name in ("CLIENT_KEY", "OPERATOR_KEY", "SLLM_ADMIN_KEY", "OTHER_KEY")}
    keys = {"clients": [{"env": "CLIENT_KEY"}], "admin": [{"env": "OPERATOR_KEY"}], "hidden_variables": ["OTHER_KEY"]}
    write_config(tmp_path, "fine", keys=keys)
    with running_router(tmp_path, environment={**given, "KEPT": "1"}) as router:
        router.admin_key = given["OPERATOR_KEY"]
        assert router.post("fine", key=given["CLIENT_KEY"]).status == 200
        told = router.ask_engine("/environment")["environment"]
        assert (told.keys() & given.keys(), told["KEPT"]) == (set(), "1")
        children = {pid for pid, _ in descendants(router.process.pid)}
        assert set(router.pids("fine")) < children  # the watch for orphans is another
        for pid in children:
            assert b"key-in-" not in Path(f"/proc/{pid}/environ").read_bytes(), pid


def test_a_key_that_engines_have_in_their_environment_is_refused_until_a_restart(tmp_path: Path) -> None:
    write_config(tmp_path, "fine", keys={"clients": [{"env": "FIRST_KEY"}]})
    given = {"FIRST_KEY": "first", "LATER_KEY": "later"}
    with running_router(tmp_path, environment=given) as router:
        write_config(tmp_path, "fine", keys={"clients": [{"env": "FIRST_KEY"}, {"env": "LATER_KEY"}]})
        answer = router.admin("reload", "POST")
        assert answer.status == 400
        assert "running engines have LATER_KEY in their environment" in answer.body["error"]["message"]
        assert router.post("fine", key="first").status == 200
        assert router.post("fine", key="later").status == 401
    with running_router(tmp_path, environment=given) as router:
        assert router.post("fine", key="later").status == 200
        assert "LATER_KEY" not in router.ask_engine("/environment")["environment"]


def test_what_a_router_learned_is_there_after_a_restart(tmp_path: Path) -> None:
    write_config(tmp_path, "fine")

    def process_s(router: RouterUnderTest) -> float:
        return float(router.admin("explain/fine").body["plans"][0]["terms"]["process"])

    with running_router(tmp_path) as router:
        default_s = process_s(router)
        assert router.post("fine").status == 200
        wait_until(lambda: process_s(router) != default_s, "what the start taught")
        learned_s = process_s(router)
    assert (tmp_path / "node" / "estimates.json").stat().st_mode & 0o777 == 0o600
    with running_router(tmp_path) as router:
        assert process_s(router) == learned_s


def test_a_low_soft_limit_of_descriptors_is_raised(tmp_path: Path) -> None:
    write_config(tmp_path, "fine")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(256, hard), hard))
    try:
        with running_router(tmp_path) as router:
            found, _ = resource.prlimit(router.process.pid, resource.RLIMIT_NOFILE)
            assert found == min(hard, 1 << 18)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_commands_of_this_machine_find_the_router_and_its_key(tmp_path: Path) -> None:
    """Its port is a free one, which no command is told."""
    write_config(tmp_path, "fine")
    environment = child_environment(SLLM_NODE_DIR=str(tmp_path / "node"))
    for name in ("SLLM_URL", "SLLM_ADMIN_KEY"):
        environment.pop(name, None)
    command = [str(Path(sys.executable).with_name("sllm-vllm")), "status", "--json"]
    with running_router(tmp_path):
        done = subprocess.run(command, env=environment, capture_output=True, timeout=DEADLINE_S, check=False)
        assert [model["name"] for model in json.loads(done.stdout)["models"]] == ["fine"]
    done = subprocess.run(command, env=environment, capture_output=True, timeout=DEADLINE_S, check=False)
    assert (
        done.returncode,
        b"no router is running on this machine (the last one listened at http://" in done.stderr,
    ) == (1, True)
