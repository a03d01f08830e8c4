"""Which addresses and URLs are fetched, as text alone."""

import string
from collections.abc import Callable
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from urllib.parse import urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.addresses import MAX_URL_BYTES, UrlRules, check_redirect, check_url, literal_address, refuse_reason
from service.errors import UrlRefused
from tests.service.refused_urls import REFUSED_ADDRESSES, REFUSED_URLS

ANY = UrlRules(http=True)
PUBLIC = ["8.8.8.8", "1.1.1.1", "93.184.215.14", "172.15.255.255", "172.32.0.0", "192.0.1.0", "100.63.255.255",
          "100.128.0.0", "198.17.255.255", "198.20.0.0", "223.255.255.255", "192.167.255.255", "169.253.255.255",
          "168.63.129.15", "2606:4700::1111", "2001:4860:4860::8888", "2a00:1450:4001::1", "2001:200::1",
          "2003::1"]  # fmt: skip


@pytest.mark.parametrize("text", PUBLIC)
def test_public_addresses_are_taken(text: str) -> None:
    assert refuse_reason(ip_address(text)) is None
    host = f"[{text}]" if ":" in text else text
    assert check_url(f"https://{host}/", ANY).host == text


@pytest.mark.parametrize(("text", "why"), REFUSED_ADDRESSES.items())
def test_other_addresses_are_refused_with_a_reason(text: str, why: str) -> None:
    assert why in str(refuse_reason(ip_address(text)))


@given(st.ip_addresses())
def test_nothing_is_public_that_python_does_not_call_global(address: IPv4Address | IPv6Address) -> None:
    if refuse_reason(address) is None:
        assert address.is_global
        assert not any([address.is_multicast, address.is_private, address.is_reserved, address.is_link_local])


# --- every spelling of every address that is not public --------------------------------------------------------------

NOT_PUBLIC_V4 = list(map(IPv4Network, [
    "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.0.0.0/24",
    "192.168.0.0/16", "198.18.0.0/15", "224.0.0.0/4", "240.0.0.0/4", "168.63.129.16/32",
]))  # fmt: skip


def inside(number: int, network: str, shift: int = 0) -> str:
    """The number inside an IPv6 network, shifted to where a translation looks for it."""
    return f"[{IPv6Address(int(IPv6Network(network).network_address) | number << shift)}]"


SPELLINGS: dict[str, Callable[[int], str]] = {
    "dotted": lambda n: str(IPv4Address(n)),
    "trailing dot": lambda n: f"{IPv4Address(n)}.",
    "decimal": str,
    "hexadecimal": hex,
    "capital hexadecimal": lambda n: f"0X{n:X}",
    "octal": lambda n: f"0{n:o}",
    "octal parts": lambda n: ".".join(f"0{byte:o}" for byte in n.to_bytes(4, "big")),
    "hexadecimal parts": lambda n: ".".join(map(hex, n.to_bytes(4, "big"))),
    "padded parts": lambda n: ".".join(f"{byte:04d}" for byte in n.to_bytes(4, "big")),
    "two parts": lambda n: f"{n >> 24}.{n & 0xFFFFFF}",
    "three parts": lambda n: f"{n >> 24}.{n >> 16 & 0xFF}.{n & 0xFFFF}",
    "mixed parts": lambda n: f"{n >> 24:#x}.{n >> 16 & 0xFF}.0{n & 0xFFFF:o}",
    "overflowing": lambda n: str(n + 2**32),
    "escaped": lambda n: str(IPv4Address(n)).replace(".", "%2e"),
    "full-width": lambda n: str(IPv4Address(n)).translate({ord("0") + i: 0xFF10 + i for i in range(10)}),
    "circled": lambda n: str(IPv4Address(n)).translate({ord("1") + i: ord("①") + i for i in range(9)} | {48: "⓪"}),
    "ideographic dots": lambda n: str(IPv4Address(n)).replace(".", "。"),
    "mapped": lambda n: inside(n, "::ffff:0:0/96"),
    "mapped, dotted": lambda n: f"[::ffff:{IPv4Address(n)}]",
    "compatible": lambda n: inside(n, "::/96"),
    "translated": lambda n: inside(n, "::ffff:0:0:0/96"),
    "NAT64": lambda n: inside(n, "64:ff9b::/96"),
    "local NAT64": lambda n: inside(n, "64:ff9b:1::/96"),
    "6to4": lambda n: inside(n, "2002::/16", 80),
    "Teredo server": lambda n: inside(n, "2001::/32", 64),
    "Teredo client": lambda n: inside(n ^ 0xFFFFFFFF, "2001::/32"),
    "ISATAP": lambda n: inside(n, "2606:4700:0:0:0:5efe::/96"),
    "bracketed": lambda n: f"[{IPv4Address(n)}]",
    "credentials": lambda n: f"public.example.com@{IPv4Address(n)}",
}


@pytest.mark.parametrize("spelling", SPELLINGS)
@given(network=st.sampled_from(NOT_PUBLIC_V4), data=st.data())
def test_no_spelling_of_an_address_that_is_not_public_passes(
    spelling: str, network: IPv4Network, data: st.DataObject
) -> None:
    address = data.draw(st.ip_addresses(network=network))
    assert refuse_reason(address) is not None
    with pytest.raises(UrlRefused):
        check_url(f"http://{SPELLINGS[spelling](int(address))}/", ANY)


@given(st.ip_addresses(v=4))
def test_an_ipv4_address_passes_in_one_spelling_if_it_is_public(address: IPv4Address) -> None:
    passing = set()
    for name, spelling in SPELLINGS.items():
        try:
            assert check_url(f"http://{spelling(int(address))}/", ANY).host == str(address)
            passing.add(name)
        except UrlRefused:
            pass
    assert passing == (set() if refuse_reason(address) else {"dotted", "trailing dot"})


# --- URLs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "host", "target"),
    [
        ("https://example.com", "example.com", "/"),
        ("HTTPS://Example.COM/A.jpg", "example.com", "/A.jpg"),
        ("https://example.com.", "example.com", "/"),
        ("https://example.com:443/a", "example.com", "/a"),
        ("http://example.com:80/a", "example.com", "/a"),
        ("https://cdn_1.a-b.example.com/x", "cdn_1.a-b.example.com", "/x"),
        ("https://bücher.de/ü", "xn--bcher-kva.de", "/%C3%BC"),
        ("https://BÜCHER.de", "xn--bcher-kva.de", "/"),
        ("https://xn--bcher-kva.de/", "xn--bcher-kva.de", "/"),
        ("https://example.com?a=b#c", "example.com", "/?a=b"),
        ("https://example.com/a%2Fb?sig=x%2By/+==&e=[1]|'", "example.com", "/a%2Fb?sig=x%2By/+==&e=[1]|%27"),
        ("https://example.com/a/../b//c;d=1@2:3", "example.com", "/a/../b//c;d=1@2:3"),
        ("https://example.com/?", "example.com", "/?"),
        ("https://[2606:4700::0001]/", "2606:4700::1", "/"),
        ("https://[2606:4700::1]:443/x", "2606:4700::1", "/x"),
        ("https://1.1.1.1.example.com/", "1.1.1.1.example.com", "/"),
        ("https://127.0.0.1.nip.io/", "127.0.0.1.nip.io", "/"),  # its addresses are for the guard to judge
        ("https://localhost.example.com/", "localhost.example.com", "/"),
    ],
)
def test_plain_urls_come_apart(url: str, host: str, target: str) -> None:
    checked = check_url(url, ANY)
    assert (checked.host, checked.target) == (host, target)
    assert checked.port == {"https": 443, "http": 80}[checked.scheme]


@pytest.mark.parametrize("url", REFUSED_URLS)
def test_other_urls_are_refused(url: str) -> None:
    with pytest.raises(UrlRefused):
        check_url(url, ANY)


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("https://user:pw@example.com/", "user name or a password"),
        ("https://example.com:22/", "only port 443"),
        ("https://10.0.0.1/", "address that is not public: private"),
        ("https://0x7f.1/", "a number, and not an IPv4 address"),
        ("https://db.internal/", "local networks"),
        ("https://db/", "single word"),
        ("https://ex%61mple.com/", "not a domain name"),
        ("ftp://example.com/", "only https and http URLs"),
        (f"https://example.com/{'a' * MAX_URL_BYTES}", "longer than 2048 bytes"),
    ],
)
def test_a_reason_tells_what_to_change(url: str, why: str) -> None:
    with pytest.raises(UrlRefused, match=why):
        check_url(url, ANY)


def test_http_is_for_the_operator_to_allow() -> None:
    assert check_url("http://example.com/", UrlRules(http=True)).scheme == "http"
    with pytest.raises(UrlRefused, match="only https URLs"):
        check_url("http://example.com/", UrlRules())


@pytest.mark.parametrize("host", ["example.com", "Example.COM.", "cdn.example.com", "a.b.example.com", "bücher.de"])
def test_listed_hosts_and_their_subdomains_are_fetched(host: str) -> None:
    rules = UrlRules(hosts=("EXAMPLE.com.", "bücher.de"))
    assert check_url(f"https://{host}/", rules).host.endswith(rules.hosts)


@pytest.mark.parametrize("host", ["example.org", "notexample.com", "example.com.evil.org", "com.example", "8.8.8.8"])
def test_other_hosts_are_not_where_there_is_a_list(host: str) -> None:
    with pytest.raises(UrlRefused):
        check_url(f"https://{host}/", UrlRules(hosts=("example.com",)))


@pytest.mark.parametrize("host", ["", "com", "*.example.com", ".example.com", "https://example.com", "example.com:443",
                                  "example.com/a", "a b.com", "localhost", "10.0.0.1", "minio.internal"])  # fmt: skip
def test_a_list_with_what_cannot_be_fetched_is_an_error_that_names_it(host: str) -> None:
    with pytest.raises(ValueError, match="cannot be fetched from") as caught:
        UrlRules(hosts=("example.com", host))
    assert repr(host) in str(caught.value)


SECRETS = ("s3cr3t", "t0k3n", "passw0rd")


@pytest.mark.parametrize("url", [
    "https://s3cr3t:passw0rd@example.com/t0k3n", "https://localhost/s3cr3t?t0k3n", "https://127.0.0.1/s3cr3t?t0k3n",
    "ftp://example.com/s3cr3t?t0k3n", "https://example.com:1/s3cr3t#t0k3n", "https://example.com/s3cr3t t0k3n",
    "https://s3cr3t/t0k3n", "https://[s3cr3t]/", f"https://example.com/s3cr3t{'a' * MAX_URL_BYTES}",
])  # fmt: skip
def test_reasons_hold_nothing_of_the_url(url: str) -> None:
    with pytest.raises(UrlRefused) as caught:
        check_url(url, UrlRules())
    assert not any(secret in str(caught.value) for secret in SECRETS)


def test_a_checked_url_does_not_show_its_path() -> None:
    assert "s3cr3t" not in repr(check_url("https://example.com/s3cr3t?s3cr3t", UrlRules()))


@given(st.text(max_size=60) | st.text(string.punctuation + "0123456789abfx.", max_size=30).map("https://".__add__))
def test_whatever_passes_means_the_same_to_another_parser(text: str) -> None:
    """What we connect to is what the standard library finds in the same text, or nothing."""
    try:
        checked = check_url(text, ANY)
    except UrlRefused:
        return
    split = urlsplit(text)
    assert (split.scheme, split.username, split.password) == (checked.scheme, None, None)
    assert split.port in (None, checked.port)
    assert checked.host.isascii()
    if split.hostname is not None and split.hostname.isascii() and literal_address(checked.host) is None:
        assert split.hostname.removesuffix(".") == checked.host
    assert set(checked.target) <= set(map(chr, range(0x21, 0x7F)))


# --- redirects -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("location", "expected"),
    [
        ("/b", "https://example.com/b"),
        ("b", "https://example.com/dir/b"),
        ("../b?x", "https://example.com/b?x"),
        ("?x=1", "https://example.com/dir/a?x=1"),
        ("//cdn.example.com/b", "https://cdn.example.com/b"),
        ("https://other.com/b#frag", "https://other.com/b"),
    ],
)
def test_redirects_lead_where_they_say(location: str, expected: str) -> None:
    start = check_url("https://example.com/dir/a?old", UrlRules())
    target = check_redirect(start, location, UrlRules())
    assert f"{target.scheme}://{target.authority}{target.target}" == expected


def test_an_address_in_brackets_can_redirect_to_itself() -> None:
    start = check_url("https://[2606:4700::1]/a", UrlRules())
    assert check_redirect(start, "/b", UrlRules()).host == "2606:4700::1"


@pytest.mark.parametrize("url", [url for url in REFUSED_URLS if "//" in url])
def test_a_redirect_to_what_is_not_fetched_is_refused(url: str) -> None:
    start = check_url("http://example.com/a", ANY)
    try:
        target = check_redirect(start, url, ANY)
    except UrlRefused:
        return
    assert target.host == "example.com"  # a relative reference stays where it was


@pytest.mark.parametrize(
    "location", ["//127.0.0.1/", "//localhost/", "//[::1]/", "//[", "https://[", "//0x7f.1", "\\\\a"]
)
def test_relative_redirects_are_checked_too(location: str) -> None:
    with pytest.raises(UrlRefused, match="redirects to"):
        check_redirect(check_url("https://example.com/", ANY), location, ANY)


def test_a_redirect_never_leaves_https() -> None:
    with pytest.raises(UrlRefused, match="from https to http"):
        check_redirect(check_url("https://example.com/", ANY), "http://example.com/", ANY)
    assert check_redirect(check_url("http://example.com/", ANY), "https://example.com/", ANY).scheme == "https"


def test_a_redirect_stays_among_the_listed_hosts() -> None:
    rules = UrlRules(hosts=("example.com",))
    with pytest.raises(UrlRefused, match="not one that this service fetches from"):
        check_redirect(check_url("https://example.com/", rules), "https://other.com/", rules)
