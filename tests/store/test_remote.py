"""Remotes of every kind: what a URL means, what a server refuses, and that no message tells a secret."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from sllm_vllm.errors import ConfigError, RemoteCorrupt, RemoteMissing, RemoteRefused, RemoteUnreachable, SllmError
from sllm_vllm.store import remote as remote_module
from sllm_vllm.store.http_source import HttpSource
from sllm_vllm.store.remote import Remote, open_checkpoint_url, open_remote
from tests.store.faulty_http import Fault, faulty_server
from tests.support.cases import every_case
from tests.support.checkpoints import files_below
from tests.support.servers import BUCKET, S3, nginx_server, s3_server

PATH = "partitions/rank-00000.safetensors"
DATA = bytes(range(256)) * 40
SECRET = "hunter2-very-secret"


@pytest.fixture(scope="module")
def s3() -> Iterator[S3]:
    with s3_server() as server:
        yield server


@pytest.fixture
def s3_environment(s3: S3, monkeypatch: pytest.MonkeyPatch) -> S3:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    return s3


@pytest.fixture
def no_token(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))


def write_tree(root: Path) -> Path:
    (root / PATH).parent.mkdir(parents=True)
    (root / PATH).write_bytes(DATA)
    (root / "manifest.json").write_bytes(b"{}")
    return root


async def read(remote: Remote, name: str = "m", start: int = 100, nbytes: int = 5000) -> bytes:
    stream = await remote.open_range(name, PATH, start=start, nbytes=nbytes, file_nbytes=len(DATA))
    return b"".join([bytes(piece) async for piece in stream])


async def assert_reads(remote: Remote, name: str = "m") -> None:
    assert await remote.read_manifest(name) == b"{}"
    assert await read(remote, name) == DATA[100:5100]
    with pytest.raises(RemoteMissing):
        await remote.read_manifest("another")


@pytest.mark.parametrize("prefix", ["file://", ""], ids=["file", "plain path"])
async def test_folder_is_read(tmp_path: Path, prefix: str) -> None:
    write_tree(tmp_path / "a b" / "m")
    await assert_reads(open_remote(f"{prefix}{tmp_path}/a b/"))


async def test_folder_that_is_missing_has_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(RemoteMissing):
        await open_remote(f"{tmp_path}/nothing").read_manifest("m")
    assert not (tmp_path / "nothing").exists()


async def test_nginx_is_read(tmp_path: Path) -> None:
    write_tree(tmp_path / "sub" / "m")
    with nginx_server(tmp_path) as server:
        await assert_reads(open_remote(f"{server.url}/sub/"))


async def test_s3_is_written_and_read(s3_environment: S3) -> None:
    remote = open_remote(f"s3://{BUCKET}/some/prefix")
    await remote.put("m", "manifest.json", b"{}", nbytes=2)
    await remote.put("m", PATH, DATA, nbytes=len(DATA))
    await assert_reads(remote)
    await remote.remove("m", "manifest.json")
    await remote.remove("m", "manifest.json")
    with pytest.raises(RemoteMissing):
        await remote.read_manifest("m")


async def test_s3_endpoint_may_be_an_argument(s3_environment: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    remote = open_remote(f"s3://{BUCKET}", endpoint=s3_environment.endpoint)
    await remote.put("argument", "manifest.json", b"{}", nbytes=2)
    assert await remote.read_manifest("argument") == b"{}"


def test_s3_endpoint_that_is_no_url_is_refused_without_its_words() -> None:
    with pytest.raises(ConfigError, match="the S3 endpoint is not a URL") as refused:
        open_remote("s3://bucket/a", endpoint=f"no url {SECRET}")
    assert SECRET not in str(refused.value)


async def test_public_bucket_is_read_without_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SKIP_SIGNATURE", "true")
    with faulty_server({"/bucket/a%20b/m/manifest.json": b"{}", f"/bucket/a%20b/m/{PATH}": DATA}) as server:
        await assert_reads(open_remote("s3://bucket/a b", endpoint=server.url))
        assert all("?" not in request.path and request.authorization is None for request in server.requests)


async def test_wrong_secret_key_is_refused(s3_environment: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    await open_remote(f"s3://{BUCKET}").put("signed", "manifest.json", b"{}", nbytes=2)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    remote = open_remote(f"s3://{BUCKET}")
    with pytest.raises(RemoteRefused, match="check the credentials") as reading:
        await remote.read_manifest("signed")
    with pytest.raises(RemoteRefused, match="check the credentials"):
        await remote.put("signed", "manifest.json", b"[]", nbytes=2)
    assert SECRET not in str(reading.value)


HUB_URLS = {
    "hf://org/repo/sub": ("main", "sub/"),
    "hf://org/repo@v1.0": ("v1.0", ""),
    "hf://org/repo@refs%2Fpr%2F1": ("refs%2Fpr%2F1", ""),
}


@pytest.mark.usefixtures("no_token")
@pytest.mark.parametrize("url", HUB_URLS)
async def test_hub_is_read_at_a_revision(tmp_path: Path, url: str) -> None:
    revision, folder = HUB_URLS[url]
    paths = [f"/org/repo/resolve/{revision}/{folder}m/{name}" for name in ("manifest.json", PATH)]
    with faulty_server(dict(zip(paths, (b"{}", DATA), strict=True))) as server:
        await assert_reads(open_remote(url, endpoint=server.url))
        assert [request.path for request in server.requests[:2]] == paths


@pytest.mark.usefixtures("no_token")
async def test_repository_itself_may_be_the_checkpoint(tmp_path: Path) -> None:
    write_tree(tmp_path / "org" / "repo" / "resolve" / "main")
    with nginx_server(tmp_path) as server:
        remote, name = open_checkpoint_url("hf://org/repo", endpoint=server.url)
        assert name == "repo"
        await assert_reads(remote, name)


async def test_token_stays_with_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Hub redirects to another host, which must not see who asks."""
    monkeypatch.setenv("HF_TOKEN", SECRET)
    write_tree(tmp_path / "cdn" / "m")
    with nginx_server(tmp_path / "cdn") as cdn:
        rule = f"rewrite ^/org/repo/resolve/main/(.*)$ {cdn.url}/$1?X-Signature=abc redirect;"
        with nginx_server(tmp_path, rule) as hub:
            monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
            remote = open_remote("hf://org/repo", redirect_hosts=["127.0.0.1"])
            assert await remote.read_manifest("m") == b"{}"
            assert await read(remote) == DATA[100:5100]
            at_hub, at_cdn = hub.requests(2), cdn.requests(2)
            assert len(at_hub) == len(at_cdn) == 2
            assert all(f'"Bearer {SECRET}"' in line for line in at_hub)
            assert all(line.endswith('"-"') for line in at_cdn)
            assert '"bytes=100-5099"' in at_cdn[1]
    assert SECRET not in repr(remote)


@pytest.mark.usefixtures("no_token")
@pytest.mark.parametrize("kind", ["http", "hf", "s3"])
async def test_a_redirect_elsewhere_is_followed_only_where_that_is_allowed(
    monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Another port of the same host is elsewhere; and credentials do not go there."""
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "somebody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    with faulty_server({"/cdn": DATA}) as cdn:
        moved = Fault(status=302, location=f"{cdn.url}/cdn")
        with faulty_server({}, forever=moved) as server:

            def opened(*hosts: str) -> Remote:
                if kind == "hf":
                    return open_remote("hf://org/repo", endpoint=server.url, redirect_hosts=hosts)
                if kind == "s3":
                    return open_remote("s3://bucket", endpoint=server.url, redirect_hosts=hosts)
                return open_remote(f"http://user:{SECRET}@127.0.0.1:{server.port}", redirect_hosts=hosts)

            with pytest.raises(RemoteRefused, match=r"redirects to 127\.0\.0\.1, which is not among"):
                await read(opened())
            assert cdn.requests == []
            assert await read(opened("127.0.0.1")) == DATA[100:5100]
            assert [request.authorization for request in cdn.requests] == [None]
            assert [request.range for request in cdn.requests] == ["bytes=100-5099"]
            assert [request.path for request in cdn.requests] == ["/cdn"]
            assert all(request.authorization or "X-Amz-Signature=" in request.path for request in server.requests)


async def test_a_redirect_at_the_same_origin_is_followed_but_not_without_end() -> None:
    with faulty_server({"/moved": DATA}, [Fault(status=307, location="/moved")]) as server:
        remote = open_remote(server.url)
        assert await read(remote) == DATA[100:5100]
        server.forever = Fault(status=307, location="/moved")
        with pytest.raises(RemoteRefused, match="redirects more than 5 times"):
            await read(remote)
        assert len(server.requests) == 2 + 6


@every_case("target", ["http://127.0.0.1:{}/x", "http://[::ffff:127.0.0.1]:{}/x", "http://localhost:{}/x"])
async def test_a_public_remote_leads_to_no_address_of_this_machine(target: str) -> None:
    """Neither by an address nor by a name, also where the host is allowed: the name's address is looked at."""
    with faulty_server({"/x": DATA}) as victim:
        hosts = ("127.0.0.1", "localhost", "::ffff:127.0.0.1")
        with faulty_server({}, forever=Fault(status=302, location=target.format(victim.port))) as server:
            remote = open_remote(server.url, redirect_hosts=hosts)
            assert isinstance(remote._source, HttpSource)
            remote._source._rules.is_public = True  # as if the server's address was one of the internet's
            with pytest.raises(RemoteRefused, match="this machine or of a private network"):
                await read(remote)
        assert victim.requests == []


async def test_a_name_that_is_bound_to_another_address_meanwhile_is_refused() -> None:
    with faulty_server({f"/m/{PATH}": DATA}) as server:
        remote = open_remote(f"http://localhost:{server.port}")
        assert await read(remote) == DATA[100:5100]
        other = open_remote(f"http://localhost:{server.port}")
        assert isinstance(other._source, HttpSource)
        assert other._source._rules.admit("localhost", ["93.184.216.34"])  # its first resolution
        with pytest.raises(RemoteRefused, match="name leads to an address of this machine"):
            await read(other)
        assert len(server.requests) == 1


async def test_a_head_without_end_is_refused_and_costs_no_memory() -> None:
    sent = 0

    async def flood(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        writer.write(b"HTTP/1.1 200 OK\r\n")
        with contextlib.suppress(OSError):
            while sent < 64 << 20:
                writer.write(b"".join(b"X-%d: v\r\n" % index for index in range(1000)))
                sent += 9000
                await writer.drain()
        writer.close()

    server = await asyncio.start_server(flood, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    with pytest.raises(RemoteRefused, match="malformed or too large"):
        await open_remote(f"http://127.0.0.1:{port}").read_manifest("m")
    assert sent < 16 << 20
    server.close()


async def test_user_and_password_are_sent_and_never_shown() -> None:
    with faulty_server({"/m/manifest.json": b"{}"}) as server:
        remote = open_remote(f"http://us%40er:{SECRET}@127.0.0.1:{server.port}/")
        assert await remote.read_manifest("m") == b"{}"
        expected = base64.b64encode(f"us@er:{SECRET}".encode()).decode()
        assert server.requests[0].authorization == f"Basic {expected}"
        assert remote.shown == server.url
        assert SECRET not in repr(remote)


@every_case("fault", [Fault(status=500), Fault(status=403), Fault(status=404), Fault(status=302)])
async def test_no_message_tells_a_secret(fault: Fault) -> None:
    with faulty_server({}, forever=fault) as server:
        remote = open_remote(f"http://user:{SECRET}@127.0.0.1:{server.port}")
        with pytest.raises(SllmError) as caught:
            await read(remote)
    with pytest.raises(SllmError) as refused:
        await read(remote)
    for error in (caught.value, refused.value):
        assert SECRET not in str(error)
        assert error.__suppress_context__
        assert str(error).isprintable()


@every_case(
    "url",
    [
        "ftp://host/x",
        "relative/path",
        "",
        "http://",
        "s3:///prefix",
        "hf://org",
        "file://host/dir",
        f"http://host/x?token={SECRET}",
        f"http://user:{SECRET}@host/x#y",
        f"http://user:{SECRET}@host:99999/",
        f"http://user:{SECRET}@host/../x",
        f"http://user:{SECRET}@host/%2e%2e/x",
    ],
)
def test_what_is_no_remote_is_refused_without_secrets(url: str) -> None:
    for opened in (open_remote, open_checkpoint_url):
        with pytest.raises(ConfigError) as caught:
            opened(url)
        assert SECRET not in str(caught.value)


@every_case("url", ["http://host/.hidden", "http://host/a%2Fb", "http://host/", "s3://bucket", "file:///"])
def test_last_component_must_be_a_name(url: str) -> None:
    with pytest.raises(ConfigError, match="not a checkpoint name"):
        open_checkpoint_url(url)


@pytest.mark.parametrize(
    ("url", "shown", "name"),
    [
        ("s3://bucket/a/b/m-1/", "s3://bucket/a/b", "m-1"),
        ("s3://bucket/m", "s3://bucket", "m"),
        ("https://u:p@host:8443/x/m", "https://host:8443/x", "m"),
        ("/srv/models/m", "file:///srv/models", "m"),
        ("hf://org/repo/m", "hf://org/repo", "m"),
        ("hf://org/repo@v1/sub/m", "hf://org/repo@v1/sub", "m"),
        ("hf://org/repo@v1", "hf://org/repo@v1", "repo"),
    ],
)
@pytest.mark.usefixtures("no_token")
def test_url_of_a_checkpoint_is_its_remote_and_its_name(url: str, shown: str, name: str) -> None:
    remote, found = open_checkpoint_url(url)
    assert (remote.shown, found) == (shown, name)


@every_case("name", ["..", ".", "", "a/b", ".hidden", "a\0", "a\n", "ä", "x" * 256, "%2e%2e"])
async def test_name_that_no_checkpoint_can_have_is_missing(tmp_path: Path, name: str) -> None:
    write_tree(tmp_path / "m")
    with pytest.raises(RemoteMissing) as caught:
        await open_remote(str(tmp_path / "sub")).read_manifest(name)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("url", ["http://host/x", "hf://org/repo/x"])
@pytest.mark.usefixtures("no_token")
async def test_read_only_remote_says_so(url: str) -> None:
    with pytest.raises(ConfigError, match="can only be read"):
        await open_remote(url).put("m", "manifest.json", b"{}", nbytes=2)


async def test_manifest_has_a_largest_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_module, "MANIFEST_NBYTES_MAX", 1000)
    with (
        faulty_server({"/m/manifest.json": bytes(2000)}) as server,
        pytest.raises(RemoteCorrupt, match="too large for a manifest"),
    ):
        await open_remote(server.url).read_manifest("m")


async def test_manifest_that_stalls_is_unreachable() -> None:
    hanging = asyncio.Event()

    async def hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await hanging.wait()
        writer.close()

    server = await asyncio.start_server(hang, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    with pytest.raises(RemoteUnreachable, match="it stalls"):
        await open_remote(f"http://127.0.0.1:{port}").read_manifest("m", stall_s=0.2)
    hanging.set()
    server.close()


async def test_file_remote_is_durable_when_put_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    fsync = os.fsync

    def watched(fd: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{fd}"))
        fsync(fd)

    monkeypatch.setattr(os, "fsync", watched)
    await open_remote(str(tmp_path / "new")).put("m", PATH, DATA, nbytes=len(DATA))
    assert synced == [str(tmp_path / "new" / "m" / PATH), str((tmp_path / "new" / "m" / PATH).parent)]


async def test_stream_that_fails_leaves_no_file(tmp_path: Path) -> None:
    async def pieces() -> AsyncIterator[memoryview]:
        for _ in itertools.repeat(None, 3):
            yield memoryview(bytes(5 << 20))
        raise RemoteCorrupt("here", "it is broken", "mend it")

    with pytest.raises(RemoteCorrupt, match="it is broken"):
        await open_remote(str(tmp_path)).put("m", PATH, pieces(), nbytes=20 << 20)
    assert files_below(tmp_path) == set()
