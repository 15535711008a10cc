"""Rules for remotes: which redirects are followed, and which addresses may be connected to. Pure."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass, field
from urllib.parse import SplitResult

HUB_HOSTS = ("huggingface.co", "*.huggingface.co", "*.hf.co")
"""Hosts to which the Hugging Face Hub redirects downloads: its content delivery networks and Xet's bridge."""
REDIRECTS_MAX = 5
_PORTS = {"http": 80, "https": 443}
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_IPV4_BITS = (1 << 32) - 1


def is_public(address: str) -> bool:
    """Whether an address is on the public internet: not loopback, link-local, private, multicast or reserved."""
    found = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(found, ipaddress.IPv6Address):
        inner = found.ipv4_mapped or found.sixtofour
        if inner is None and found in _NAT64:
            inner = ipaddress.IPv4Address(int(found) & _IPV4_BITS)
        if inner is not None:
            return is_public(str(inner))
    return found.is_global and not found.is_multicast


def is_literal(host: str) -> bool:
    """Whether a host is an IP address in standard notation; other spellings are resolved like names."""
    try:
        ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return True


@dataclass(slots=True)
class RedirectRules:
    """The rules for one remote.

    The first resolution of its name decides whether the remote is public; this does not change later. A public remote
    may not lead to private addresses.

    Args:
        named: the URL that the operator configured.
        hosts: other hosts to which it may redirect; ``*.example.com`` allows all subdomains.
    """

    named: SplitResult
    hosts: Sequence[str] = ()
    is_public: bool | None = field(default=None)

    def __post_init__(self) -> None:
        host = self.named.hostname or ""
        if is_literal(host):
            self.is_public = is_public(host)

    def why_not(self, target: SplitResult) -> str:
        """Return why a redirect to ``target`` is refused; empty if it is allowed."""
        host = target.hostname or ""
        if target.scheme not in _PORTS or not host:
            return "it redirects to something that is no http(s) URL"
        if self.named.scheme == "https" and target.scheme != "https":
            return f"it redirects to {_shown(host)} without TLS"
        if not self.is_same_origin(target) and not self._is_upgrade(target) and not self._is_listed(host):
            return f"it redirects to {_shown(host)}, which is not among the hosts that it may redirect to"
        if self.is_public and is_literal(host) and not is_public(host):
            return f"it redirects to {_shown(host)}, an address of this machine or of a private network"
        return ""

    def admit(self, host: str, addresses: Sequence[str]) -> list[str]:
        """Return those of a host's addresses to which a connection is allowed."""
        if self.is_public is None and host == self.named.hostname:
            self.is_public = any(map(is_public, addresses))
        return [address for address in addresses if not self.is_public or is_public(address)]

    def is_same_origin(self, target: SplitResult) -> bool:
        """Whether scheme, host and port equal those of the configured URL. Credentials are sent only there."""
        return _origin(target) == _origin(self.named)

    def _is_upgrade(self, target: SplitResult) -> bool:
        host = self.named.hostname
        return _origin(self.named) == ("http", host, 80) and _origin(target) == ("https", host, 443)

    def _is_listed(self, host: str) -> bool:
        return any(
            host.endswith(pattern[1:].lower()) if pattern.startswith("*.") else host == pattern.lower()
            for pattern in self.hosts
        )


def _origin(parts: SplitResult) -> tuple[str, str | None, int | None]:
    return parts.scheme, parts.hostname, parts.port or _PORTS.get(parts.scheme)


def _shown(host: str) -> str:
    """Return a host that a server sent in a form that is safe for a one-line message."""
    return "".join(letter if letter.isascii() and letter.isprintable() else "?" for letter in host)[:255]
