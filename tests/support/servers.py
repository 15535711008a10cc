"""Real servers on loopback: nginx, Redis, an S3 server that checks signatures. They end with the test process."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.waiting import wait_until

BUCKET = "models"
SERVERS_REQUIRED = "SLLM_TEST_SERVERS_REQUIRED"
"""Set where a missing server is a failure instead of a skipped test."""

_NGINX = """
daemon off; master_process off; pid {state}/pid; error_log stderr notice;
events {{ worker_connections 256; }}
http {{
    log_format seen '$status "$request" "$http_range" "$http_authorization"';
    access_log {state}/access.log seen;
    log_not_found off;
    client_body_temp_path {state}/1; proxy_temp_path {state}/2; fastcgi_temp_path {state}/3;
    uwsgi_temp_path {state}/4; scgi_temp_path {state}/5;
    server {{ listen 127.0.0.1:{port}; root {root}; {directives} }}
}}
"""
_PREPARING_CALLS = 3  # what is done before moto begins to check keys and signatures


@dataclass(frozen=True, slots=True)
class Nginx:
    """A running nginx."""

    url: str
    access_log: Path

    def requests(self, num: int) -> list[str]:
        """Status, request line, Range and Authorization of the ``num`` requests that were made, in order.

        nginx logs a request after the client has its answer.
        """
        wait_until(lambda: len(self.access_log.read_text().splitlines()) >= num, "nginx to log its requests")
        return self.access_log.read_text().splitlines()


@dataclass(frozen=True, slots=True)
class S3:
    """A running S3 server with one bucket and one user who may do anything with it."""

    endpoint: str
    key_id: str
    secret: str

    @property
    def environment(self) -> dict[str, str]:
        """What AWS's own tools read."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ALLOW_HTTP": "true",
            "AWS_ACCESS_KEY_ID": self.key_id,
            "AWS_SECRET_ACCESS_KEY": self.secret,
            "AWS_REGION": "us-east-1",
        }


@contextlib.contextmanager
def nginx_server(root: Path, directives: str = "") -> Iterator[Nginx]:
    """Serve the files below ``root``; ``directives`` go into the server block."""
    binary = _program("nginx")
    with tempfile.TemporaryDirectory() as state:
        port = _free_port()
        config = Path(state, "nginx.conf")
        user = "user root;" if os.geteuid() == 0 else ""
        config.write_text(user + _NGINX.format(state=state, port=port, root=root, directives=directives))
        command = [binary, "-e", "stderr", "-p", state, "-c", str(config)]
        with _child(command, stderr=subprocess.PIPE) as process:
            assert process.stderr is not None
            told = b""
            while b"event method" not in told:  # it listens before it says this
                told = process.stderr.readline()
                assert told, "nginx ended at once"
            yield Nginx(f"http://127.0.0.1:{port}", Path(state, "access.log"))


@contextlib.contextmanager
def s3_server() -> Iterator[S3]:
    """moto's server. It checks each request's signature (SigV4) and rights once the user is made."""
    import boto3  # type: ignore[import-untyped]

    with socket.create_server(("127.0.0.1", 0)) as listener, tempfile.TemporaryFile() as log:
        port = listener.getsockname()[1]
        command = [sys.executable, str(Path(__file__).with_name("s3_app.py")), str(listener.fileno()), str(port)]
        environment = {**os.environ, "INITIAL_NO_AUTH_ACTION_COUNT": str(_PREPARING_CALLS)}
        with _child(command, stderr=log, pass_fds=(listener.fileno(),), env=environment):
            endpoint = f"http://127.0.0.1:{port}"
            anybody = {"aws_access_key_id": "nobody", "aws_secret_access_key": "nothing"}
            iam = boto3.client("iam", endpoint_url=endpoint, region_name="us-east-1", **anybody)
            iam.create_user(UserName="tester")
            rights = {"Effect": "Allow", "Action": "s3:*", "Resource": "*"}
            policy = json.dumps({"Version": "2012-10-17", "Statement": [rights]})
            iam.put_user_policy(UserName="tester", PolicyName="all", PolicyDocument=policy)
            key = iam.create_access_key(UserName="tester")["AccessKey"]
            own = {"aws_access_key_id": key["AccessKeyId"], "aws_secret_access_key": key["SecretAccessKey"]}
            boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1", **own).create_bucket(Bucket=BUCKET)
            yield S3(endpoint, key["AccessKeyId"], key["SecretAccessKey"])


@contextlib.contextmanager
def redis_server(password: str) -> Iterator[str]:
    """Its URL, with the password."""
    port = _free_port()
    command = [_program("redis-server"), "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
    with _child([*command, "--requirepass", password]):
        wait_until(lambda: _listens(port), "redis")
        yield f"redis://:{password}@127.0.0.1:{port}"


def _program(name: str) -> str:
    """Where it is; skips the test if it is nowhere."""
    binary = shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if binary is None:
        if os.environ.get(SERVERS_REQUIRED):
            pytest.fail(f"there is no {name} on this machine")
        pytest.skip(f"there is no {name} on this machine")
    return binary


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@contextlib.contextmanager
def _child(command: list[str], **options: object) -> Iterator[subprocess.Popen[bytes]]:
    """A process that the kernel kills with the test process, however that ends."""
    guarded = ["setpriv", "--pdeathsig", "KILL", *command]
    process = subprocess.Popen(guarded, stdout=subprocess.DEVNULL, **options)  # type: ignore[call-overload]
    with process:
        try:
            yield process
        finally:
            process.kill()
