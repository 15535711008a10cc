"""Why an engine failed, out of what it printed: its last exception that says why. Pure; fed line by line.

An engine is several processes, whose tracebacks mix in one log, and its last exception often says only that there was
another one above. Tried on logs of vLLM 0.32 on the CPU (``tests/node/core/logs/failures``).
"""

from __future__ import annotations

import re

LINE_MAX = 600
"""Characters of a line that are looked at."""
CAUSE_MAX = 300
"""Characters of what is told."""
PROCESSES_MAX = 64
"""Processes whose tracebacks are followed at once."""

_TRACEBACK = "Traceback (most recent call last)"
_PREFIX = re.compile(r"(\([^()]* pid=\d+\) ?)?((?:[A-Z]+) \d\d-\d\d \d\d:\d\d:\d\d \[[^\]]*\] ?)?")
"""Of vLLM's lines: which process prints, and what its logger adds."""
_INVALID = re.compile(r"(?:\w+\.)*(ValidationError): \d+ validation errors? for ")
"""Pydantic says in the second line after it what is wrong, or in the first where it is a whole model."""
_REFUSAL = re.compile(r"vllm(?: \w+)?: error: (.+)")
"""What argparse says before it exits with status 2."""
_VALUE = re.compile(r"\s*(.*?)(?: \[type=\w+.*)?$")
_POINTS_ELSEWHERE = re.compile(
    r"[Ss]ee root cause above"
    r"|initialization failed due to an exception in a background process"
    r"|[Cc]heck the logs for more details"
    r"|Error raised in (?:subprocess|a forked process)"
    r"|^(?:\w+\.)*(?:ValidationError: \d+ validation|SystemExit|KeyboardInterrupt|CancelledError|EngineDeadError)"
)
"""What an exception says that has its reason in another one, printed before it."""


class FailureWords:
    """The exceptions that one engine has printed."""

    def __init__(self) -> None:
        self._cause = ""
        self._pointer = ""
        self._open: dict[str, str] = {}
        """By process, what its traceback is at: empty while frames come, else the exception that wants its detail."""

    def note(self, line: str) -> None:
        """It printed one more line. Any text will do."""
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
        """The last exception that says why, or what vLLM's parser of arguments refused; empty if there was neither.

        If all exceptions refer to others, the last of them.
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
        """What pydantic says below its first line: perhaps the name of a field, then what is wrong with it."""
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
