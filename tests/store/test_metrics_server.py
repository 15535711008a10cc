"""`/metrics` over real HTTP: what a scrape says, and who may not have one."""

from __future__ import annotations

import contextlib
import errno
import http.client
import socket
import socketserver
import stat
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from sllm_vllm.daemon.plain_file import open_key
from sllm_vllm.errors import ConfigError, StoreUnavailable
from sllm_vllm.metrics import SERIES_MAX, StoreMetric
from sllm_vllm.store.metrics_server import HEAD_NBYTES_MAX, KEY_NAME, SCRAPES_MAX, MetricsServer, Status
from sllm_vllm.units import GIB, MIB
from tests.support.cases import every_case
from tests.support.scripted_daemon import EMPTY, STATUS
from tests.support.waiting import DEADLINE_S

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]
Serve = Callable[[Status], MetricsServer]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    with contextlib.ExitStack() as stack:

        def start(status: Status) -> MetricsServer:
            server = MetricsServer(status, tmp_path, 0)
            stack.callback(server.stop)
            server.start()
            return server

        yield start


@pytest.fixture
def key(tmp_path: Path) -> str:
    return open_key(tmp_path / KEY_NAME)


def get(server: MetricsServer, key: str | None, path: str = "/metrics", *, method: str = "GET") -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=DEADLINE_S)
    with contextlib.closing(connection):
        connection.request(method, path, headers={} if key is None else {"Authorization": f"Bearer {key}"})
        answer = connection.getresponse()
        return answer.status, answer.read().decode()


def samples_of(text: str) -> Samples:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def sample(samples: Samples, name: str, labels: Mapping[str, str]) -> float | None:
    return samples.get((name, frozenset(labels.items())))


def test_a_scrape_says_what_the_status_says(serve: Serve, key: str) -> None:
    code, text = get(serve(lambda: STATUS), key)
    found = samples_of(text)
    assert code == 200
    for name, labels, value in (
        ("sllm_store_info", {"version": "0.1.0", "policy": "cost"}, 1),
        ("sllm_store_uptime_seconds", {}, 7300),
        ("sllm_store_pool_slots", {"state": "ready"}, 63),
        ("sllm_store_pool_slot_bytes", {}, 16 * MIB),
        ("sllm_store_tier_bytes", {"tier": "HOST"}, GIB),
        ("sllm_store_tier_capacity_bytes", {"tier": "HOST"}, 2 * GIB),
        ("sllm_store_tier_capacity_bytes", {"tier": "DISK"}, None),
        ("sllm_store_tier_bytes", {"tier": "REMOTE"}, None),
        ("sllm_store_checkpoint_resident_bytes", {"name": STATUS["checkpoints"][1]["name"], "rank": "1"}, 100 * GIB),
        ("sllm_store_checkpoint_resident_bytes", {"name": "on-disk-alone", "rank": "None"}, None),
        ("sllm_store_leases", {}, 1),
        ("sllm_store_clients", {}, 2),
        ("sllm_store_span_hits_total", {}, 1),
        ("sllm_store_span_misses_total", {}, 2),
        ("sllm_store_hop_bytes_total", {"hop": "disk"}, 3 * GIB),
        ("sllm_store_hop_seconds_total", {"hop": "disk"}, 1.5),
        ("sllm_store_hop_limit_bytes_per_second", {"hop": "write"}, 3e9),
        ("sllm_store_hop_limit_bytes_per_second", {"hop": "disk"}, None),
        ("sllm_store_jobs", {"kind": "fill", "state": "running"}, 1),
    ):
        assert sample(found, name, labels) == value, name


def test_every_metric_is_exported_with_its_help_and_kind(serve: Serve, key: str) -> None:
    _, text = get(serve(lambda: EMPTY), key)
    for metric in StoreMetric:
        name, kind = metric.value.name, "counter" if metric.value.is_counter else "gauge"
        assert f"# HELP {name} {metric.value.help}\n# TYPE {name} {kind}\n" in text


def test_each_scrape_asks_anew(serve: Serve, key: str) -> None:
    status = dict(STATUS)
    server = serve(lambda: status)
    get(server, key)
    status["hits"] = 7
    assert sample(samples_of(get(server, key)[1]), "sllm_store_span_hits_total", {}) == 7


def test_checkpoints_have_a_bounded_number_of_series(serve: Serve, key: str) -> None:
    entry = STATUS["checkpoints"][0]
    many = [{**entry, "name": f"m{number}", "resident_nbytes": number} for number in range(SERIES_MAX + 10)]
    found = samples_of(get(serve(lambda: {**STATUS, "checkpoints": many}), key)[1])
    values = [value for (name, _), value in found.items() if name == "sllm_store_checkpoint_resident_bytes"]
    assert sorted(values) == list(range(10, SERIES_MAX + 10))


@pytest.mark.parametrize("shown", [None, "", "wrong", "\xe9"])
def test_without_the_key_there_is_nothing(serve: Serve, shown: str | None) -> None:
    def fail() -> dict[str, Any]:
        raise AssertionError("nobody may ask for the status")

    server = serve(fail)
    assert get(server, shown) == (401, "")
    assert get(server, shown, "/other") == (401, "")


def test_there_is_nothing_else(serve: Serve, key: str) -> None:
    server = serve(lambda: STATUS)
    assert get(server, key, "/")[0] == 404
    assert get(server, key, "/metrics/")[0] == 404
    assert get(server, key, method="POST")[0] == 501


def test_a_daemon_that_does_not_answer_is_unavailable(serve: Serve, key: str) -> None:
    def fail() -> dict[str, Any]:
        raise StoreUnavailable("/socket", "it stops", "wait")

    assert get(serve(fail), key) == (503, "/socket: it stops; wait\n")


def test_a_status_that_can_t_be_told_ends_that_scrape_alone(
    serve: Serve, key: str, caplog: pytest.LogCaptureFixture
) -> None:
    status: dict[str, Any] = {}
    server = serve(lambda: status)
    with pytest.raises((http.client.HTTPException, ConnectionError)):
        get(server, key)
    status.update(STATUS)
    assert get(server, key)[0] == 200
    assert "metrics=failed" in caplog.text


def exchange(server: MetricsServer, request: bytes) -> bytes:
    """Send raw bytes; everything that comes back."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=DEADLINE_S) as channel:
        channel.sendall(request)
        channel.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ConnectionResetError), channel.makefile("rb") as stream:
            return stream.read()
    return b""


def test_a_request_that_is_too_large_is_refused(serve: Serve, key: str) -> None:
    server = serve(lambda: STATUS)
    head = f"GET /metrics HTTP/1.0\r\nAuthorization: Bearer {key}\r\nX: ".encode()
    fits = head + b"x" * (HEAD_NBYTES_MAX - len(head) - 4) + b"\r\n\r\n"
    assert exchange(server, fits).startswith(b"HTTP/1.0 200 ")
    too_large = head + b"x" * (HEAD_NBYTES_MAX + 1 - len(head))
    assert exchange(server, too_large).startswith(b"HTTP/1.0 431 ")


@pytest.mark.parametrize("request_", [b"", b"\r\n\r\n", b"GET\r\n\r\n", b"GET /metrics", b"\0\xff\xfe\r\n\r\n"])
def test_a_request_that_is_none_harms_nobody(serve: Serve, key: str, request_: bytes) -> None:
    server = serve(lambda: STATUS)
    assert b" 200 " not in exchange(server, request_)
    assert get(server, key)[0] == 200


def test_scrapes_are_answered_at_the_same_time(serve: Serve, key: str) -> None:
    """No answer is given before all have asked."""
    barrier = threading.Barrier(SCRAPES_MAX)

    def status() -> dict[str, Any]:
        barrier.wait(DEADLINE_S)
        return STATUS

    server = serve(status)
    with ThreadPoolExecutor(SCRAPES_MAX) as pool:
        codes = list(pool.map(lambda _: get(server, key)[0], range(SCRAPES_MAX)))
    assert codes == [200] * SCRAPES_MAX


def test_more_scrapes_than_allowed_are_hung_up_on(serve: Serve, key: str) -> None:
    barrier, proceed = threading.Barrier(SCRAPES_MAX + 1), threading.Event()

    def status() -> dict[str, Any]:
        barrier.wait(DEADLINE_S)
        proceed.wait(DEADLINE_S)
        return STATUS

    server = serve(status)
    with ThreadPoolExecutor(SCRAPES_MAX) as pool:
        answers = [pool.submit(get, server, key) for _ in range(SCRAPES_MAX)]
        barrier.wait(DEADLINE_S)
        assert exchange(server, b"") == b""
        with pytest.raises((http.client.HTTPException, ConnectionError)):
            get(server, key)
        proceed.set()
        assert [answer.result()[0] for answer in answers] == [200] * SCRAPES_MAX


def test_scrapes_that_there_was_no_thread_for_keep_no_place(
    serve: Serve, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve(lambda: EMPTY)

    def no_thread(*args: object, **kwargs: object) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(socketserver.threading, "Thread", no_thread)  # type: ignore[attr-defined]
        for _ in range(SCRAPES_MAX + 1):
            with pytest.raises((OSError, http.client.HTTPException)):
                get(server, key)
    assert get(server, key)[0] == 200


def test_an_error_of_one_moment_ends_no_server(serve: Serve, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    server, failures = serve(lambda: EMPTY), [OSError(errno.EMFILE, "Too many open files"), ValueError("no selector")]
    failed = threading.Event()

    def ready(*args: object) -> None:
        if not failures:
            failed.set()
            return
        raise failures.pop()

    monkeypatch.setattr(server._server, "service_actions", ready)
    assert failed.wait(DEADLINE_S)
    assert get(server, key)[0] == 200


def test_the_port_is_free_again_after_stop(serve: Serve, key: str, tmp_path: Path) -> None:
    server = serve(lambda: STATUS)
    server.stop()
    server.stop()
    with pytest.raises(ConnectionRefusedError):
        get(server, key)
    again = MetricsServer(lambda: STATUS, tmp_path, server.port)
    assert again.port == server.port
    again.stop()


def test_a_key_is_made_once_for_this_user_alone(tmp_path: Path) -> None:
    key = open_key(tmp_path / KEY_NAME)
    assert len(key) >= 32
    assert open_key(tmp_path / KEY_NAME) == key
    assert stat.S_IMODE((tmp_path / KEY_NAME).stat().st_mode) == 0o600
    assert [path.name for path in tmp_path.iterdir()] == [KEY_NAME]


def test_a_key_that_others_may_read_is_refused(tmp_path: Path) -> None:
    open_key(tmp_path / KEY_NAME)
    (tmp_path / KEY_NAME).chmod(0o640)
    with pytest.raises(ConfigError, match=KEY_NAME):
        open_key(tmp_path / KEY_NAME)


@pytest.mark.parametrize("content", ["", "\n"])
def test_an_empty_key_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / KEY_NAME).touch(0o600)
    (tmp_path / KEY_NAME).write_text(content)
    with pytest.raises(ConfigError, match="remove it"):
        open_key(tmp_path / KEY_NAME)


def test_a_key_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_text("secret")
    (tmp_path / KEY_NAME).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match=KEY_NAME):
        open_key(tmp_path / KEY_NAME)


@every_case("metric", list(StoreMetric))
def test_a_name_ends_in_its_base_unit(metric: StoreMetric) -> None:
    """As Prometheus wants it; bytes and seconds always, counts by what they count."""
    record = metric.value
    words = record.name.removesuffix("_total").split("_")
    assert record.name.startswith("sllm_store_")
    assert record.help.endswith(".")
    for unit in ("bytes", "seconds"):
        assert (unit in words) == (unit in record.unit)
