"""Memory of the log of a streamed answer's tokens; what it says is tested with the answers."""

from __future__ import annotations

import json
import tracemalloc

from sllm_vllm.router.migration.token_log import TokenLog


def test_logprobs_take_no_more_memory_than_their_notes() -> None:
    log = TokenLog()
    log.strip(b': sllm [{"d":"x","c":0,"n":1}]\n\n')
    tracemalloc.start()
    try:
        num = nbytes = 0
        while nbytes < 1 << 20:
            top = [[1000 + rank, -1.2345678 - rank - num, rank, f"tok{rank}"] for rank in range(21)]
            note = json.dumps([{"i": 0, "t": [num], "l": [top]}], separators=(",", ":")).encode()
            log.strip(b": sllm " + note + b"\n\n")
            num, nbytes = num + 1, nbytes + len(note)
        assert tracemalloc.get_traced_memory()[0] < 1.5 * nbytes
    finally:
        tracemalloc.stop()
    found = log.resume()
    assert found is not None
    assert found["choices"][0]["logprobs"][-1] == top
