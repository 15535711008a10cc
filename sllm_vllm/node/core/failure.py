"""Finds out why an engine failed from its output: the last exception that names a cause. Pure; fed line by line.

An engine is several processes, whose tracebacks mix in one log, and the last exception often only refers to another one
above it. Tested with logs of vLLM 0.32 on the CPU (``tests/node/core/logs/failures``).
"""

from __future__ import annotations

import re

LINE_MAX = 600
"""Characters of a line that are examined."""
CAUSE_MAX = 300
"""Characters of the cause that are reported."""
PROCESSES_MAX = 64
"""Processes whose tracebacks are followed at once."""

_TRACEBACK = "Traceback (most recent call last)"
_PREFIX = re.compile(r"(\([^()]* pid=\d+\) ?)?((?:[A-Z]+) \d\d-\d\d \d\d:\d\d:\d\d \[[^\]]*\] ?)?")
"""Prefix of vLLM's lines: the process that prints, then what its logger adds."""
_INVALID = re.compile(r"(?:\w+\.)*(ValidationError): \d+ validation errors? for ")
"""First line of a pydantic error. The cause follows in its second line after a field's name, or in its first where the
error is about a whole model."""
_REFUSAL = re.compile(r"vllm(?: \w+)?: error: (.+)")
"""What argparse prints before it exits with status 2."""
_VALUE = re.compile(r"\s*(.*?)(?: \[type=\w+.*)?$")
_POINTS_ELSEWHERE = re.compile(
    r"[Ss]ee root cause above"
    r"|initialization failed due to an exception in a background process"
    r"|[Cc]heck the logs for more details"
    r"|Error raised in (?:subprocess|a forked process)"
    r"|^(?:\w+\.)*(?:ValidationError: \d+ validation|SystemExit|KeyboardInterrupt|CancelledError|EngineDeadError)"
)
"""Exceptions that only refer to another one, printed earlier."""


class FailureWords:
    """The exceptions that one engine has printed."""

    def __init__(self) -> None:
        self._cause = ""
        self._pointer = ""
        self._open: dict[str, str] = {}
        """By process, the state of its open traceback: empty while frames come, else the exception whose detail comes
        next."""

    def note(self, line: str) -> None:
        """Take one more line of output. Any text is accepted."""
        if (refusal := _REFUSAL.match(line[:LINE_MAX])) is not None:
            self._cause = refusal[1]
            return
        if not self._open and _TRACEBACK not in line:
            return
        prefix = _PREFIX.match(line[:LINE_MAX])
        process = (prefix[1] or "").strip() if prefix is not None else ""
        text = line[: LINE_MAX + (0 if prefix is None else prefix.end())][0 if prefix is None else prefix.end() :]
        if _TRACEBACK in text:
            if process in self._open or len(self._open) < PROCESSES_MAX:
                self._open[process] = ""
        elif process in self._open:
            self._continue(process, text)

    @property
    def cause(self) -> str:
        """The last exception that names a cause, or what vLLM's argument parser refused; empty if there was neither.

        If every exception only refers to another one, the last of them.
        """
        return (self._cause or self._pointer)[:CAUSE_MAX]

    def _continue(self, process: str, text: str) -> None:
        invalid = self._open[process]
        if invalid:
            self._detail(process, text, invalid)
        elif text[:1].strip():  # frames are indented
            found = _INVALID.match(text)
            if found is None:
                del self._open[process]
                self._take(text.strip())
            else:
                self._open[process] = found[1]

    def _detail(self, process: str, text: str, invalid: str) -> None:
        """Take a line below pydantic's first one: a field's name, if any, then what is wrong with it."""
        found = _VALUE.match(text)
        if not text.startswith("  ") and text.strip() and not text[0].isspace():
            self._open[process] = invalid  # the field's name
            return
        del self._open[process]
        if found is not None and found[1]:
            self._take(f"{invalid}: {found[1].removeprefix('Value error, ')}")

    def _take(self, exception: str) -> None:
        if _POINTS_ELSEWHERE.search(exception):
            self._pointer = exception
        else:
            self._cause = exception
