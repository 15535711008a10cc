"""Which redirects are followed, and which addresses a remote may lead to."""

from __future__ import annotations

from urllib.parse import urlsplit

from sllm_vllm.store.core.redirects import HUB_HOSTS, RedirectRules, is_public
from tests.support.cases import every_case

PUBLIC, OTHER = "93.184.216.34", "151.101.1.1"


def rules(named: str, *hosts: str) -> RedirectRules:
    return RedirectRules(urlsplit(named), hosts)


@every_case(
    "address",
    [
        "127.0.0.1",
        "127.1.2.3",
        "0.0.0.0",
        "10.0.0.1",
        "172.16.0.1",
        "192.168.1.1",
        "169.254.169.254",
        "100.64.0.1",
        "224.0.0.1",
        "255.255.255.255",
        "::",
        "::1",
        "fe80::1",
        "fe80::1%eth0",
        "fd00:ec2::254",
        "ff02::1",
        "::ffff:127.0.0.1",
        "::ffff:10.0.0.1",
        "64:ff9b::7f00:1",
        "64:ff9b::a9fe:a9fe",
        "2002:7f00:1::",
    ],
)
def test_an_address_of_this_machine_or_a_private_network_is_not_public(address: str) -> None:
    assert not is_public(address)


@every_case("address", [PUBLIC, "2606:4700::1111", "64:ff9b::5db8:d822", f"::ffff:{PUBLIC}"])
def test_an_address_of_the_internet_is_public(address: str) -> None:
    assert is_public(address)


@every_case(
    "named, target, told",
    [
        ("https://a.com/x", "https://a.com/y", ""),
        ("https://a.com/x", "https://A.com:443/y", ""),
        ("https://a.com/x", "https://a.com:8443/y", "not among"),
        ("https://a.com/x", "https://b.com/y", "not among"),
        ("https://a.com/x", "http://a.com/y", "without TLS"),
        ("http://a.com/x", "https://a.com/y", ""),
        ("http://a.com:8000/x", "https://a.com/y", "not among"),
        ("http://a.com/x", "http://a.com:6379/y", "not among"),
        ("https://a.com/x", "https://cdn.a.com/y", "not among"),
        ("https://a.com/x", "ftp://a.com/y", "no http"),
        ("https://a.com/x", "file:///etc/passwd", "no http"),
        ("https://a.com/x", "", "no http"),
        ("http://127.0.0.1:1/x", "http://127.0.0.1:2/y", "not among"),
        ("http://127.0.0.1:1/x", "http://169.254.169.254/y", "not among"),
    ],
)
def test_a_redirect_stays_at_the_origin(named: str, target: str, told: str) -> None:
    problem = rules(named).why_not(urlsplit(target))
    assert told in problem
    assert bool(problem) == bool(told)


@every_case("host", ["huggingface.co", "cdn-lfs.huggingface.co", "cas-bridge.xethub.hf.co"])
def test_the_hub_may_redirect_to_its_own_networks(host: str) -> None:
    hub = rules("https://huggingface.co/org/repo", *HUB_HOSTS)
    assert hub.why_not(urlsplit(f"https://{host}/x?sig=1")) == ""
    for other in (f"{host}.evil.com", f"evil{host}" if host.startswith("hugging") else "evilhf.co", "hf.co.evil.com"):
        assert "not among" in hub.why_not(urlsplit(f"https://{other}/x"))


def test_an_allowed_host_is_no_way_to_a_private_address() -> None:
    public = rules(f"http://{PUBLIC}/x", "10.0.0.1", "*.b.com")
    assert "private network" in public.why_not(urlsplit("http://10.0.0.1/y"))
    assert public.why_not(urlsplit("http://in.b.com/y")) == ""
    assert public.admit("in.b.com", ["10.0.0.1"]) == []
    assert public.admit("in.b.com", ["::1", OTHER]) == [OTHER]


def test_a_name_that_was_public_once_leads_to_no_private_address_later() -> None:
    rebound = rules("http://a.com/x")
    assert rebound.admit("a.com", [PUBLIC]) == [PUBLIC]
    assert rebound.admit("a.com", ["127.0.0.1"]) == []
    both = rules("http://a.com/x")
    assert both.admit("a.com", ["127.0.0.1", PUBLIC]) == [PUBLIC]


def test_a_private_remote_may_lead_to_private_hosts_that_are_allowed() -> None:
    private = rules("http://store.lan/x", "mirror.lan")
    assert private.admit("store.lan", ["10.0.0.1"]) == ["10.0.0.1"]
    assert private.why_not(urlsplit("http://mirror.lan/y")) == ""
    assert private.admit("mirror.lan", ["10.0.0.2"]) == ["10.0.0.2"]
