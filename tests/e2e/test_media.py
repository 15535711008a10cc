"""Audio through the router: real vLLM, a tiny random Whisper, the engine's own answers."""

from __future__ import annotations

import io
import json
import math
import urllib.request
import uuid
import wave
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import ModelDir
from tests.e2e.test_router_moves import expect_no_port
from tests.support.engine_http import ask_engine
from tests.support.router_process import RouterUnderTest, running_router, write_config
from tests.support.vllm_server import SERVER_ENVIRONMENT

pytestmark = pytest.mark.e2e_long

START_MAX_S = 400.0
"""Of a request that a cold engine is started for, on a busy machine."""
RATE_HZ = 16000
TRANSCRIPTIONS = "/v1/audio/transcriptions"


@pytest.fixture(scope="module")
def router(model_dir: ModelDir, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RouterUnderTest]:
    """One with a model that hears; its engine starts cold."""
    directory = tmp_path_factory.mktemp("media")
    write_config(
        directory,
        node={"slots": 1, "kv_memory": "64MiB", "warm": False, "node_dir": "./node"},
        defaults={
            "engine_arguments": {"enforce-eager": True, "max-num-seqs": 4},
            "keep_alive": 3600,
            "queue_timeout": START_MAX_S,
        },
        models=[{"name": "whisper", "source": str(model_dir("whisper"))}],
    )
    variables = {**SERVER_ENVIRONMENT, "HF_HUB_OFFLINE": "1"}
    del variables["VLLM_CPU_KVCACHE_SPACE"]  # the agent's own share counts
    with running_router(directory, environment=variables) as running:
        running.answer_s_max = START_MAX_S
        yield running


def sound(hertz: float) -> bytes:
    """A WAV file of two seconds of a tone that swells."""
    seconds = np.arange(2 * RATE_HZ) / RATE_HZ
    samples = np.sin(2 * math.pi * hertz * seconds) * seconds / 2
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(RATE_HZ)
        out.writeframes((samples * 32000).astype("<i2").tobytes())
    return file.getvalue()


def form(fields: Mapping[str, str], file: bytes) -> tuple[bytes, str]:
    """A multipart body as clients send it, and its content type."""
    boundary = uuid.uuid4().hex
    parts = [f'--{boundary}\r\nContent-Disposition: form-data; name="{k}"\r\n\r\n{v}\r\n' for k, v in fields.items()]
    head = f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n'
    data = "".join(parts).encode() + f"{head}Content-Type: audio/wav\r\n\r\n".encode() + file
    return data + f"\r\n--{boundary}--\r\n".encode(), f"multipart/form-data; boundary={boundary}"


def send(url: str, data: bytes, content_type: str) -> Any:
    """POST; what a 200 says. A client's error is raised."""
    request = urllib.request.Request(url, data, {"Content-Type": content_type})
    with urllib.request.urlopen(request, timeout=START_MAX_S) as answer:
        assert answer.status == 200
        raw: bytes = answer.read()
    return json.loads(raw) if answer.headers["content-type"].startswith("application/json") else raw.decode()


def from_engine(router: RouterUnderTest, model: Path, path: str, data: bytes, content_type: str) -> Any:
    """The answer of the engine itself, past the router."""
    (one,) = (one for one in router.node.report().replicas if one.pid and one.model == str(model))
    expect_no_port(router, one.id)
    assert one.url is not None
    headers = {"Content-Type": content_type, "Authorization": f"Bearer {one.api_key}"}
    status, kind, raw = ask_engine(one.url, path, data, headers, timeout_s=START_MAX_S)
    assert status == 200
    return json.loads(raw) if kind.startswith("application/json") else raw.decode()


def test_two_sounds_are_transcribed_as_by_the_engine(router: RouterUnderTest, model_dir: ModelDir) -> None:
    texts = []
    for hertz in (220, 3500):
        fields = {"model": "whisper", "language": "en", "temperature": "0", "max_completion_tokens": "24"}
        asked = form(fields, sound(hertz))
        through = send(f"{router.url}{TRANSCRIPTIONS}", *asked)
        assert through == from_engine(router, model_dir("whisper"), TRANSCRIPTIONS, *asked)
        texts.append(through["text"])
    assert texts[0] != texts[1]
