"""Reads files over http(s) or from S3 by range requests with aiohttp; limits redirects, addresses and header sizes.

obstore's own client is not used because it follows any redirect to any address and does not limit headers. Also, its
threads may still run Python code while the interpreter exits, which aborts the process.
"""

from __future__ import annotations

import asyncio
import re
import socket
import weakref
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import SplitResult, quote, urljoin, urlsplit

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from sllm_vllm.config import proxy_for
from sllm_vllm.errors import RemoteCorrupt, RemoteMissing, RemoteRefused, RemoteUnreachable, SllmError
from sllm_vllm.store.core.redirects import REDIRECTS_MAX, RedirectRules
from sllm_vllm.units import MIB

MEND_TRY = "try again later, or see whether the server is well"
MEND_CORRUPT = "push the checkpoint again"
_MEND_HOST = "if that is right, allow the host (`redirect_hosts` of the store, `pull --redirect-host`)"
_REDIRECTS = {301, 302, 303, 307, 308}
_RETRIED_STATUS = {408, 425, 429}
_BUFFER_NBYTES = MIB
_CONTENT_RANGE = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19})", re.ASCII)
_SAFE = "!#$%&'()*+,/:;=?@[]~"
"""Characters that stay as they are when a URL is quoted that may already be quoted, fully or partly."""
_NO_TIMEOUT = aiohttp.ClientTimeout(total=None, sock_connect=None)
"""No timeout here, because callers detect stalls."""


class _AddressRefused(OSError):
    """A host name resolves only to addresses to which this remote may not lead."""


@dataclass(frozen=True, slots=True)
class HttpAnswer:
    """An answer whose body was not read yet: bytes ``start`` to ``end`` (exclusive) of a file of ``size`` bytes."""

    start: int
    end: int
    size: int
    response: aiohttp.ClientResponse

    async def pieces(self) -> AsyncGenerator[bytes, None]:
        """Yield the body in pieces of up to one or two megabytes."""
        try:
            async for piece in self.response.content.iter_any():
                yield piece
        finally:
            self.response.close()


class HttpSource:
    """Reads files below one URL. Must be used on one event loop; its connections are closed with it.

    Args:
        headers: credentials, sent only to the origin of ``url``.
        redirect_hosts: see ``RedirectRules``.
        sign: makes the signed URL of a key; called in a thread, because it may have to look up credentials.
    """

    def __init__(
        self,
        url: str,
        headers: Mapping[str, str],
        redirect_hosts: Sequence[str] = (),
        *,
        sign: Callable[[str], str] | None = None,
    ) -> None:
        self._url = quote(url, safe=_SAFE)
        self._headers = dict(headers)
        self._sign = sign
        self._rules = RedirectRules(urlsplit(self._url), redirect_hosts)
        self._session: aiohttp.ClientSession | None = None

    async def get(self, key: str, shown: str, bounds: tuple[int, int] | None = None) -> HttpAnswer:
        """Request a file, or its bytes from the first bound up to, not including, the second.

        Raises:
            RemoteError: the file is missing, access is refused, or the answer is not valid.
        """
        headers = {"Accept-Encoding": "identity"}  # ranges and sizes must be those of the stored bytes
        if bounds is not None:
            headers["Range"] = f"bytes={bounds[0]}-{bounds[1] - 1}"
        url = f"{self._url}/{key}" if self._sign is None else await asyncio.to_thread(self._sign, key)
        try:
            response = await self._follow(url, shown, headers)
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise translated_http(error, shown) from None
        try:
            return _checked(response, shown, bounds)
        except SllmError:
            response.close()
            raise

    async def _follow(self, url: str, shown: str, headers: Mapping[str, str]) -> aiohttp.ClientResponse:
        for _ in range(REDIRECTS_MAX + 1):
            target = urlsplit(url)
            own = self._headers if self._rules.is_same_origin(target) else {}
            response = await self._send(url, {**headers, **own})
            location = response.headers.get("Location")
            if response.status not in _REDIRECTS or location is None:
                return response
            response.close()
            url = quote(urljoin(url, location), safe=_SAFE)
            if problem := self._rules.why_not(_split(url)):
                raise RemoteRefused(shown, problem, _MEND_HOST)
        raise RemoteRefused(shown, f"it redirects more than {REDIRECTS_MAX} times", "check the URL")

    async def _send(self, url: str, headers: Mapping[str, str]) -> aiohttp.ClientResponse:
        if self._session is None:
            connector = aiohttp.TCPConnector(limit=0, resolver=_Resolver(self._rules))
            weakref.finalize(self, connector._close)
            self._session = aiohttp.ClientSession(
                connector=connector,
                timeout=_NO_TIMEOUT,
                auto_decompress=False,
                read_bufsize=_BUFFER_NBYTES,
                cookie_jar=aiohttp.DummyCookieJar(),
            )
        return await self._session.get(
            URL(url, encoded=True), headers=headers, allow_redirects=False, proxy=proxy_for(url)
        )


class _Resolver(AbstractResolver):
    """The system's resolver without addresses that the rules forbid. aiohttp connects only to what this returns."""

    def __init__(self, rules: RedirectRules) -> None:
        self._rules = rules
        self._inner = aiohttp.ThreadedResolver()

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        found = await self._inner.resolve(host, port, family)
        proxy = proxy_for(self._rules.named.geturl())
        if proxy is not None and urlsplit(proxy).hostname == host:
            return found  # the proxy is configured by the operator, so any address is allowed
        admitted = self._rules.admit(host, [one["host"] for one in found])
        if not admitted:
            raise _AddressRefused
        return [one for one in found if one["host"] in admitted]

    async def close(self) -> None:
        await self._inner.close()


def _split(url: str) -> SplitResult:
    """Split a URL that a server sent. An invalid one gives a result without a scheme."""
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        return urlsplit("")
    return parts


def _checked(response: aiohttp.ClientResponse, shown: str, bounds: tuple[int, int] | None) -> HttpAnswer:
    """Check that a response is what was requested.

    Raises:
        RemoteError: it is an error, or has another range.
    """
    status = response.status
    if not 200 <= status < 300:
        raise error_of_status(status, shown) from None
    if bounds is None:
        return HttpAnswer(0, 0, 0, response)
    if status != 206:
        raise RemoteRefused(shown, "the server ignores ranges", "serve the checkpoint with one that knows them")
    match = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
    start, end, size = (int(match[1]), int(match[2]) + 1, int(match[3])) if match is not None else (0, 0, 0)
    if start != bounds[0] or not start < end <= min(size, bounds[1]):
        raise RemoteCorrupt(shown, "it answers with another range than was asked for", MEND_CORRUPT)
    return HttpAnswer(start, end, size, response)


def error_of_status(status: int, shown: str) -> SllmError:
    """Return the error for an HTTP status."""
    if status in {404, 410}:
        return RemoteMissing(shown, "there is no such file", "see whether the checkpoint was pushed there")
    if status in {401, 403}:
        return RemoteRefused(
            shown, f"access is refused (HTTP {status})", "check the credentials (token or permissions)"
        )
    if status == 416:
        return RemoteCorrupt(shown, "it answers with another range than was asked for", MEND_CORRUPT)
    if status < 500 and status not in _RETRIED_STATUS:
        return RemoteRefused(shown, f"it answers HTTP {status}", "check the URL")
    return RemoteUnreachable(shown, f"it answers HTTP {status}", MEND_TRY)


def translated_http(error: Exception, shown: str) -> SllmError:
    """Translate an aiohttp error. Its text may contain secrets, so nothing is taken from it."""
    if isinstance(error, aiohttp.ClientConnectorError) and isinstance(error.os_error, _AddressRefused):
        problem = "its name leads to an address of this machine or of a private network"
        return RemoteRefused(shown, problem, "check the URL, and who answers for the name")
    if isinstance(error, aiohttp.ClientConnectorError):
        return RemoteUnreachable(shown, "no connection can be made", "check the URL, and whether the server runs")
    if isinstance(error, aiohttp.ClientResponseError):
        return RemoteRefused(shown, "the head of its answer is malformed or too large", "check the URL")
    if isinstance(error, ValueError):  # includes aiohttp's InvalidURL
        return RemoteRefused(shown, "its URL can't be used", "check the URL")
    return RemoteUnreachable(shown, "the connection broke off", MEND_TRY)
