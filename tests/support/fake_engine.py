"""A stand-in for `vllm serve`: a real process with real sockets that is up in a moment. Standard library only.

``python tests/support/fake_engine.py serve MODEL --host H --port P …``, or ``--uds PATH`` in place of both; unknown
arguments are ignored. The last part of MODEL's path says how it behaves:

=============  ======================================================================================================
fine           binds the port, prints what vLLM prints, listens, answers
exits-N        prints an error and exits with status N before it listens
hangs          never listens
late           listens when the file that FAKE_ENGINE_GO names is there
noisy          prints NOISE_NBYTES first
ignores-term   SIGTERM does nothing
turns-ill      from ``POST /ill`` until ``POST /well``, /health answers 503
freezes        after ``POST /freeze`` it accepts no more, and answers nothing
family         has two child processes, one in a group of its own; prints ``child PID`` for each, never ends them
=============  ======================================================================================================

A request may say under ``fake`` how it is answered (see ``Wish``). ``GET /stats`` says how many streams run, and for
how long none of them sent anything.

SIGTERM ends all others with status 0. Nothing lives longer than LIFE_S, whatever becomes of the test that started it.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import sys
import threading
import time
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePath

LIFE_S = 900
NOISE_NBYTES = 4 << 20
BACKLOG = 2048
MAX_MODEL_LEN = 512
_POLL_S = 0.01
LINES = (
    "(APIServer pid={pid}) INFO 11-20 12:46:17 [api_utils.py:286] non-default args: {{'model_tag': '{model}'}}",
    "(EngineCore pid={pid}) INFO 11-20 12:46:38 [core.py:133] Initializing a V1 LLM engine (v0.32.0) with config: m",
    "(Worker pid={pid}) INFO 11-20 12:47:08 [parallel_state.py:1906] world_size=1 rank=0 local_rank=0 backend=gloo",
    "(Worker pid={pid}) INFO 11-20 12:47:08 [cpu_model_runner.py:68] Starting to load model {model}...",
    "(Worker pid={pid}) INFO 11-20 12:47:08 [default_loader.py:501] Loading weights took 0.02 seconds",
    "(EngineCore pid={pid}) INFO 11-20 12:47:11 [utils.py:347] Using LBHNC KV cache layout.",
    "(Worker pid={pid}) INFO 11-20 12:47:11 [cpu_model_runner.py:87] Warming up model for the compilation...",
    "(Worker pid={pid}) INFO 11-20 12:49:10 [cpu_model_runner.py:91] Warming up done.",
    "(EngineCore pid={pid}) INFO 11-20 12:49:10 [core.py:394] init engine (profile, create kv cache, warmup model) took"
    " 0.01 seconds",
)
"""Up to the listening."""
STARTED = "INFO:     Application startup complete."
NOISE = "(Worker pid=1) INFO 11-20 12:47:08 [noise.py:1] " + "nothing in particular " * 40


def say(line: str, fd: int = 1) -> None:
    """Past Python's buffers, so that a signal in between harms nothing."""
    data = f"{line}\n".encode()
    while data:
        data = data[os.write(fd, data) :]


@dataclass(frozen=True, slots=True)
class Wish:
    """How a request is answered."""

    events: int = 3
    """Of a stream, without its last two. The text of each is ``USER/NUMBER ``, after the request's ``user``."""
    pace_s: float = 0.0
    """Before each."""
    pad: int = 0
    """Bytes more in each."""
    stalls_after: int | None = None
    """From then on the stream says nothing more, and does not end, unless there is a file to wait for."""
    stalls_until: str = ""
    """A stream that stalls goes on when this file is there."""
    waits_for: str = ""
    """Nothing is said before this file is there. What waits is told by a line ``waits USER``."""


class FakeEngine(ThreadingHTTPServer):
    allow_reuse_address = True  # as vLLM does
    daemon_threads = True
    request_queue_size = BACKLOG

    def __init__(self, address: tuple[str, int] | str, model: str, name: str) -> None:
        self.address_family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
        super().__init__(address, Handler, bind_and_activate=False)  # type: ignore[arg-type]
        self.model = model
        self.name = name
        self.key = os.environ.get("VLLM_API_KEY", "")
        self.is_ill = False
        self.frozen = threading.Event()
        self.streams: dict[int, float] = {}
        """When each sent something last, by its thread."""

    def server_bind(self) -> None:
        """As the class's own does, but asks nobody for the host's name."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)

    def get_request(self) -> tuple[socket.socket, tuple[str, int]]:
        if self.frozen.is_set():
            wait_for_ever()
        return super().get_request()


class Handler(BaseHTTPRequestHandler):
    server: FakeEngine
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        if self.path == "/health":
            self.answer(None, 503 if self.server.is_ill else 200)
        elif not self.has_key():
            self.answer({"error": "Unauthorized"}, 401)
        elif self.path == "/v1/models":
            card = {"id": self.server.model, "object": "model", "max_model_len": MAX_MODEL_LEN, "pid": os.getpid()}
            self.answer({"object": "list", "data": [card]})
        elif self.path == "/environment":
            self.answer(environment())
        elif self.path == "/stats":
            sent_s = list(self.server.streams.values())
            self.answer({"streams": len(sent_s), "quiet_s": time.monotonic() - max(sent_s, default=0.0)})
        else:
            self.answer({"error": "Not Found"}, 404)

    def do_POST(self) -> None:
        text = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path in {"/ill", "/well"} and self.server.name == "turns-ill":
            self.server.is_ill = self.path == "/ill"
            self.answer(None)
        elif self.path == "/freeze" and self.server.name == "freezes":
            self.server.frozen.set()
            self.answer(None)
        elif not self.has_key():
            self.answer({"error": "Unauthorized"}, 401)
        elif self.path in {"/v1/completions", "/v1/chat/completions"}:
            self.complete_or_stream(json.loads(text or b"{}"))
        else:
            self.answer({"error": "Not Found"}, 404)

    def complete_or_stream(self, request: dict[str, object]) -> None:
        given = request.get("fake")
        wish = Wish(**given) if isinstance(given, dict) else Wish()
        if wish.waits_for:
            say(f"waits {request.get('user')}")
            wait_for_file(wish.waits_for)
        if request.get("stream") is True:
            self.stream(request, wish)
        else:
            self.complete(request)

    def stream(self, request: dict[str, object], wish: Wish) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        head = {"id": "cmpl-1", "object": "text_completion", "created": 1, "model": request.get("model")}
        padding = {"pad": "x" * wish.pad} if wish.pad else {}
        try:
            for number in range(wish.events):
                if number == wish.stalls_after and not wish.stalls_until:
                    wait_for_ever()
                if number == wish.stalls_after:
                    wait_for_file(wish.stalls_until)
                time.sleep(wish.pace_s)
                choice = {"index": 0, "text": f"{request.get('user')}/{number} ", "finish_reason": None}
                self.send_event(json.dumps({**head, "choices": [choice], "pid": os.getpid(), **padding}))
            usage = {"prompt_tokens": 1, "completion_tokens": wish.events, "total_tokens": 1 + wish.events}
            self.send_event(json.dumps({**head, "choices": [], "usage": usage}))
            self.send_event("[DONE]")
            self.wfile.write(b"0\r\n\r\n")
        except OSError:  # the client left
            self.close_connection = True
        finally:
            self.server.streams.pop(threading.get_ident(), None)

    def send_event(self, event: str) -> None:
        data = f"data: {event}\n\n".encode()
        self.server.streams[threading.get_ident()] = time.monotonic()
        self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))

    def complete(self, request: dict[str, object]) -> None:
        choice = {"index": 0, "text": f" said {self.server.model}", "finish_reason": "length", "logprobs": None}
        usage = {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}
        head = {"id": f"cmpl-{os.getpid()}", "object": "text_completion", "created": int(time.time())}
        model = request.get("model", self.server.model)
        self.answer({**head, "model": model, "choices": [choice], "usage": usage, "pid": os.getpid()})

    def has_key(self) -> bool:
        return not self.server.key or self.headers.get("Authorization") == f"Bearer {self.server.key}"

    def answer(self, body: object, status: int = 200) -> None:
        data = b"" if body is None else json.dumps(body).encode()
        if self.server.frozen.is_set() and self.path != "/freeze":
            wait_for_ever()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        client = ":".join(map(str, self.client_address))  # of a Unix socket it is empty
        say(f'INFO:     {client} - "{self.requestline}"')


def environment() -> dict[str, object]:
    return {
        "pid": os.getpid(),
        "environment": dict(os.environ),
        "cwd": os.getcwd(),
        "argv": sys.argv,
        "cpus": sorted(os.sched_getaffinity(0)),
    }


def wait_for_ever() -> None:
    """In the first thread signals still count; LIFE_S does in any."""
    threading.Event().wait()


def wait_for_file(path: str) -> None:
    while not os.path.exists(path):
        time.sleep(_POLL_S)


def start_children() -> None:
    for has_own_group in (False, True):
        pid = os.fork()
        if pid == 0:
            if has_own_group:
                os.setpgid(0, 0)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.alarm(LIFE_S)  # forked processes don't inherit it
            say(f"child {os.getpid()}")
            while True:
                signal.pause()


def prepare(name: str) -> None:
    """What comes before listening, if ever it does."""
    if name.startswith("exits-"):
        say("(APIServer pid=1) ERROR 11-20 12:46:17 [core.py:1] RuntimeError: Engine core initialization failed", 2)
        sys.exit(int(name.removeprefix("exits-")))
    if name == "noisy":
        for _ in range(NOISE_NBYTES // len(NOISE) + 1):
            say(NOISE)
    if name == "hangs":
        wait_for_ever()
    if name == "late":
        wait_for_file(os.environ["FAKE_ENGINE_GO"])


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("command", choices=["serve"])
    parser.add_argument("model")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--uds")
    parser.add_argument("--served-model-name")
    given, _ = parser.parse_known_args(arguments)
    name = PurePath(given.model).name
    signal.alarm(LIFE_S)
    signal.signal(signal.SIGTERM, signal.SIG_IGN if name == "ignores-term" else lambda *_: os._exit(0))
    if name == "family":
        start_children()  # before there is a socket that they would inherit
    server = FakeEngine(given.uds or (given.host, given.port), given.served_model_name or given.model, name)
    server.server_bind()
    *first, last = LINES
    for line in first:
        say(line.format(pid=os.getpid(), model=given.model))
    prepare(name)
    say(last.format(pid=os.getpid()))
    server.server_activate()
    say(STARTED)
    server.serve_forever()


if __name__ == "__main__":
    main(sys.argv[1:])
