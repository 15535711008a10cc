"""Measures remote to pool against a plain download, and cut-through to parameters. Needs obstore, nginx, moto.

The servers run on loopback; the limit is a download with obstore itself, with as many concurrent requests.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.store.daemon import DaemonFailed, StoreDaemon
from benchmarks.store.job import StoreAnswer, StoreJob, StoreJobFailed
from benchmarks.store.setting import StoreSetting, data_nbytes, forget_on_disk, load_job, partition_file
from benchmarks.store.shares import Share
from sllm_vllm.checkpoint.reader import Checkpoint
from tests.support.servers import BUCKET, S3, nginx_server, s3_server

REMOTE_GOAL = 0.90
CUT_THROUGH_GOAL = 1.15
S3_LAYERS_MAX = 2
"""0.24 GB, because moto reads a whole object for each range of it."""
DOWNLOADS = 8
"""Concurrent requests; the daemon's default."""
SLOW_RATE = "8m"
"""nginx's rate limit for one request. nginx sends a second's worth at once, so a chunk of 16 MiB takes one second, and
eight at once give 134 MB/s: much less than any disk or memory copy here.
"""
WRITTEN_TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class Remote:
    """A checkpoint on a server, as the daemon and a plain download address it."""

    name: str
    url: str
    checkpoint: Checkpoint
    environment: Mapping[str, str] = field(default_factory=dict)

    def download_job(self, *, streams: bool) -> StoreJob:
        """A job that fetches all of the checkpoint's data and discards it."""
        file = partition_file(self.checkpoint)
        return StoreJob(
            action="download",
            url=self.url,
            path=f"{self.checkpoint.path.name}/{file.relative_to(self.checkpoint.path)}",
            nbytes=file.stat().st_size,
            num_threads=DOWNLOADS,
            streams=streams,
        )


def s3_shares(setting: StoreSetting) -> list[Share]:
    """Measure with an S3 server that checks signatures; it is written in Python, and slow."""
    small = dataclasses.replace(setting, num_layers=min(setting.num_layers, S3_LAYERS_MAX))
    checkpoint = small.checkpoint("remote", "far-small")
    with s3_server() as server:
        setting.say("putting the checkpoint to S3")
        _put(server, checkpoint)
        remote = Remote("S3 (moto)", f"s3://{BUCKET}", checkpoint, server.environment)
        return _measure(setting, remote, to_pool=True)


def http_shares(setting: StoreSetting) -> list[Share]:
    """Measure with nginx without a limit, which is faster than most networks."""
    _require_nginx()
    checkpoint = setting.checkpoint("remote", "far")
    with nginx_server(setting.scratch / "remote") as server:
        return _measure(setting, Remote("http (nginx)", server.url, checkpoint), to_pool=True)


def slow_http_shares(setting: StoreSetting) -> list[Share]:
    """Measure with nginx limited to less than anything behind it. A round takes half a minute; two are enough."""
    _require_nginx()
    checkpoint = setting.checkpoint("remote", "far")
    with nginx_server(setting.scratch / "remote", f"limit_rate {SLOW_RATE};") as server:
        remote = Remote(f"http at {SLOW_RATE} a request", server.url, checkpoint)
        return _measure(setting, remote, to_pool=False)


def _measure(setting: StoreSetting, remote: Remote, *, to_pool: bool) -> list[Share]:
    """Measure in rounds: the plain download in one or two ways, to the pool if ``to_pool``, and to parameters."""
    pool_s: list[float] = []
    load: list[StoreAnswer] = []
    whole_s: list[float] = []
    stream_s: list[float] = []
    for number in range(1, (setting.rounds if to_pool else min(2, setting.rounds)) + 1):
        setting.say(f"round {number}: {remote.name}: plain download")
        stream_s.append(setting.run_job(remote.download_job(streams=True), remote.environment).seconds)
        if to_pool:
            whole_s.append(setting.run_job(remote.download_job(streams=False), remote.environment).seconds)
            setting.say(f"round {number}: {remote.name}: to the pool")
            with _daemon(setting, remote) as daemon:
                pool_s.append(daemon.prefetch_s(remote.checkpoint.path.name))
                daemon.evict(remote.checkpoint.path.name)
        setting.say(f"round {number}: {remote.name}: to parameters")
        load.append(_cut_through(setting, remote))
    limit_s = [min(pair) for pair in zip(whole_s, stream_s, strict=True)] if to_pool else stream_s
    hidden = [answer.wait_s for answer in load]
    shares = [
        Share(
            name=f"(e) {remote.name} cut through to parameters, of a plain download",
            rule="times",
            goal=CUT_THROUGH_GOAL,
            ours_s=[answer.seconds for answer in load],
            limit_s=limit_s,
            note=f"waited for bytes: {hidden}",
        )
    ]
    if to_pool:
        to_pool_share = Share(
            name=f"(d) {remote.name} to the pool, of a plain download",
            rule="share",
            goal=REMOTE_GOAL,
            ours_s=pool_s,
            limit_s=limit_s,
            note=f"whole ranges {_rounded(whole_s)}, streams {_rounded(stream_s)}; the faster one counts",
        )
        shares.insert(0, to_pool_share)
    return shares


@contextlib.contextmanager
def _daemon(setting: StoreSetting, remote: Remote) -> Iterator[StoreDaemon]:
    nbytes = data_nbytes(remote.checkpoint)
    environment = remote.environment
    with setting.daemon("near", nbytes=nbytes, environment=environment, remotes=(remote.url,)) as daemon:
        assert daemon.config.downloads == DOWNLOADS
        yield daemon


def _cut_through(setting: StoreSetting, remote: Remote) -> StoreAnswer:
    """Load a checkpoint that only the remote has. The daemon then writes it to disk, where it is removed again."""
    name = remote.checkpoint.path.name
    with _daemon(setting, remote) as daemon:
        with daemon.client() as client:
            manifest = Path(client.find(name)["manifest"])
        answer = setting.run_job(load_job(manifest.parent, daemon.config.store_dir))
        _wait_written(daemon)
        forget_on_disk(daemon.config.store_dir, name)
    if answer.source != "store":
        raise StoreJobFailed(f"{remote.name}: the bytes came from the {answer.source}")
    return answer


def _wait_written(daemon: StoreDaemon) -> None:
    deadline_s = time.monotonic() + WRITTEN_TIMEOUT_S
    while "event=written_behind" not in (log := daemon.log.read_text()):
        if "event=not_written_behind" in log or time.monotonic() > deadline_s:
            raise DaemonFailed(f"the checkpoint was not written behind the load: {log.splitlines()[-1]}")
        time.sleep(0.1)


def _require_nginx() -> None:
    if shutil.which("nginx") is None and not Path("/usr/sbin/nginx").exists():
        raise StoreJobFailed("there is no nginx on this machine")


def _put(server: S3, checkpoint: Checkpoint) -> None:
    import boto3  # type: ignore[import-untyped]

    keys = {"aws_access_key_id": server.key_id, "aws_secret_access_key": server.secret}
    client = boto3.client("s3", endpoint_url=server.endpoint, region_name="us-east-1", **keys)
    for file in sorted(path for path in checkpoint.path.rglob("*") if path.is_file()):
        client.upload_file(str(file), BUCKET, f"{checkpoint.path.name}/{file.relative_to(checkpoint.path)}")


def _rounded(seconds: list[float]) -> list[float]:
    return [round(each, 3) for each in seconds]
