"""What the router says of its API, held against what it does: schemathesis attacks it by its own description."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.support.router_process import RouterUnderTest, running_router, write_config
from tests.support.waiting import DEADLINE_S, wait_until

SEED = 20_261_120
NUM_EXAMPLES = 5
"""Of each operation, beside the hundreds that its schema alone leads to."""
KEY = "a-client-key"
MODEL = "fine"
ATTACK_MAX_S = 900
ANSWERED = ("/v1/completions", "/v1/chat/completions")
"""By the fake engine."""


@contextlib.contextmanager
def guarded_router(directory: Path) -> Iterator[RouterUnderTest]:
    """One that wants a key, as its document says, and has an engine that is ready."""
    (directory / "keys").write_text(f"{KEY}\n")
    write_config(directory, MODEL, keys={"clients": [{"file": "./keys"}]})
    with running_router(directory) as router:
        assert router.post(MODEL, key=KEY).status == 200
        yield router


def document_of(router: RouterUnderTest) -> dict[str, Any]:
    with urllib.request.urlopen(f"{router.url}/openapi.json", timeout=DEADLINE_S) as answer:
        found: dict[str, Any] = json.load(answer)
    return found


def attack(router: RouterUnderTest, document: dict[str, Any], directory: Path, *options: str) -> None:
    """Every case from one seed; the first that finds something wrong fails the test with the way to repeat it."""
    file = directory / "openapi.json"
    file.write_text(json.dumps(document))
    command = [str(Path(sys.executable).with_name("schemathesis")), "run", str(file), f"--url={router.url}"]
    command += [f"--header=Authorization: Bearer {KEY}", f"--seed={SEED}", f"--max-examples={NUM_EXAMPLES}"]
    command += ["--phases=coverage,fuzzing", "--generation-database=none", "--no-color", *options]
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=ATTACK_MAX_S, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "✅ Coverage" in done.stdout
    assert "✅ Fuzzing" in done.stdout


def test_router_keeps_to_its_own_description(tmp_path: Path) -> None:
    """All that it checks: statuses, headers, types, schemas, keys, and that what is wrong is refused."""
    with guarded_router(tmp_path) as router:
        attack(router, document_of(router), tmp_path)
        assert "Traceback" not in router.log
        assert router.post(MODEL, key=KEY).status == 200


def test_requests_that_reach_an_engine_keep_to_it_too(tmp_path: Path) -> None:
    """The same with a model that is served. What else is wrong with a request is for the engine to say."""
    with guarded_router(tmp_path) as router:
        document = document_of(router)
        document["paths"] = {path: document["paths"][path] for path in ANSWERED}
        for item in document["paths"].values():
            item["post"]["requestBody"]["content"]["application/json"]["schema"]["properties"]["model"] = {
                "const": MODEL
            }
        attack(router, document, tmp_path, "--exclude-checks=negative_data_rejection,positive_data_acceptance")
        wait_until(lambda: router.log.count("status=200 outcome=done") > NUM_EXAMPLES, "the lines of the requests")
        wait_until(lambda: router.num_ongoing() == 0, "all places to be free")
        assert "Traceback" not in router.log
