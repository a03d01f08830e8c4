"""What may be fetched: which URLs, and which addresses behind them.

Pure: nothing here resolves, connects or logs. `service.fetch` asks it about the first URL, about every redirect and
about every address that a name resolves to. Refusals say why without any part of the URL, which may hold secrets.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from urllib.parse import quote, urljoin

import idna

from service.errors import UrlRefused

Address = IPv4Address | IPv6Address

MAX_URL_BYTES = 2048
_MAX_HOST_CHARS = 253
_PORTS = {"https": 443, "http": 80}


# --- addresses -------------------------------------------------------------------------------------------------------

# Metadata services first, as the more telling reason; 168.63.129.16 lies in public space.
_METADATA_V4 = ("169.254.169.254", "169.254.170.2", "100.100.100.200", "168.63.129.16", "192.0.0.192")
_METADATA_V6 = ("fd00:ec2::254", "fd20:ce::254")
_METADATA = frozenset(map(ip_address, _METADATA_V4 + _METADATA_V6))
_REFUSED_V4 = [
    (IPv4Network("0.0.0.0/8"), "of this host"),
    (IPv4Network("10.0.0.0/8"), "private"),
    (IPv4Network("100.64.0.0/10"), "private, behind a carrier's translation"),
    (IPv4Network("127.0.0.0/8"), "loopback"),
    (IPv4Network("169.254.0.0/16"), "link-local"),
    (IPv4Network("172.16.0.0/12"), "private"),
    (IPv4Network("192.0.0.0/24"), "reserved for protocols"),
    (IPv4Network("192.0.2.0/24"), "for documentation"),
    (IPv4Network("192.52.193.0/24"), "a multicast relay"),
    (IPv4Network("192.88.99.0/24"), "a 6to4 relay"),
    (IPv4Network("192.168.0.0/16"), "private"),
    (IPv4Network("198.18.0.0/15"), "for benchmarks"),
    (IPv4Network("198.51.100.0/24"), "for documentation"),
    (IPv4Network("203.0.113.0/24"), "for documentation"),
    (IPv4Network("224.0.0.0/4"), "multicast"),
    (IPv4Network("240.0.0.0/4"), "reserved or broadcast"),
]
# Of IPv6 only this block is given out as global unicast. What lies outside (mapped, compatible, NAT64, site-local,
# unique local, multicast, segment routing) needs no list, nor will what is invented there.
_GLOBAL_V6 = IPv6Network("2000::/3")
_REFUSED_V6 = [
    (IPv6Network("2001::/32"), "a Teredo tunnel"),
    (IPv6Network("2001::/23"), "reserved for protocols"),
    (IPv6Network("2001:db8::/32"), "for documentation"),
    (IPv6Network("2002::/16"), "a 6to4 tunnel"),
    (IPv6Network("3ffe::/16"), "of a network that has ended"),
    (IPv6Network("3fff::/20"), "for documentation"),
]
_OUTSIDE_V6 = [
    (IPv6Network("::1/128"), "loopback"),
    (IPv6Network("::ffff:0:0/96"), "an IPv4 address in IPv6"),
    (IPv6Network("::/96"), "an IPv4 address in IPv6, or none"),
    (IPv6Network("64:ff9b::/96"), "translated to IPv4 (NAT64)"),
    (IPv6Network("64:ff9b:1::/48"), "translated to IPv4 (NAT64)"),
    (IPv6Network("fc00::/7"), "private"),
    (IPv6Network("fe80::/10"), "link-local"),
    (IPv6Network("fec0::/10"), "site-local"),
    (IPv6Network("ff00::/8"), "multicast"),
]
# RFC 5214: interface identifiers 0000:5EFE and 0200:5EFE, and the same with the group bit, go before an IPv4 address.
_ISATAP, _ISATAP_MASK = 0x00005EFE, 0xFCFFFFFF


def refuse_reason(address: Address) -> str | None:
    """Why an address is not connected to; None for globally routable unicast that no known translation leads elsewhere.

    An IPv4 address inside an IPv6 one is refused whatever it is: public hosts have no such addresses in DNS, and which
    host they reach depends on the system. Python's `is_global` is asked last, and would not do alone: it calls NAT64,
    6to4 and multicast public.
    """
    if address in _METADATA:
        return "a metadata service"
    if isinstance(address, IPv4Address):
        reasons = [reason for network, reason in _REFUSED_V4 if address in network]
    elif address.scope_id is not None:
        reasons = ["of one interface"]
    elif address not in _GLOBAL_V6:
        reasons = [reason for network, reason in _OUTSIDE_V6 if address in network] + ["not global unicast"]
    else:
        reasons = [reason for network, reason in _REFUSED_V6 if address in network]
        if (int(address) >> 32) & _ISATAP_MASK == _ISATAP:
            reasons.append("translated to IPv4 (ISATAP)")
    if not reasons and not address.is_global:
        reasons.append("not global")
    return reasons[0] if reasons else None


def literal_address(host: str) -> Address | None:
    """The address that a canonical host is, or None for a name."""
    try:
        return ip_address(host)
    except ValueError:
        return None


# --- URLs ------------------------------------------------------------------------------------------------------------

_URL = re.compile(
    r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://(?P<authority>[^/?#]*)(?P<path>/[^?#]*)?(\?(?P<query>[^#]*))?(#.*)?"
)
_BRACKETED = re.compile(r"\[(?P<address>[0-9A-Fa-f:.]+)\](?P<port>:.*)?")
_NAMED = re.compile(r"(?P<name>[^:\[\]]*)(?P<port>:[^:]*)?")
_LABEL = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?")
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")
_DOTS_LIKE = frozenset("\u3002\uff0e\uff61")  # which IDNA takes for dots
# Last labels that name nothing on the public internet (RFC 6761, RFC 6762, RFC 9476), or are widely used inside.
_RESERVED_NAMES = ("localhost", "local", "internal", "arpa", "test", "invalid", "example", "onion", "alt")
_INSIDE = frozenset((*_RESERVED_NAMES, "localdomain", "intranet", "private", "corp", "home", "lan"))
_VISIBLE = "".join(map(chr, range(0x21, 0x7F)))
# What browsers send as it is; signatures of URLs are over exactly that. The rest is percent-encoded.
_IN_PATH = "".join(c for c in _VISIBLE if c not in '"#<>?`{}')
_IN_QUERY = "".join(c for c in _VISIBLE if c not in "\"#'<>")


@dataclass(frozen=True)
class UrlRules:
    """Which URLs are fetched.

    Attributes:
        http: whether http:// URLs are, besides https:// ones.
        hosts: the hosts that are, each with its subdomains, in canonical form; all public ones if empty.

    Raises:
        ValueError: an entry of `hosts` is not a public host; names it.
    """

    http: bool = False
    hosts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        canonical = []
        for host in self.hosts:
            try:
                canonical.append(_canonical_host(host))
            except UrlRefused as refused:
                raise ValueError(f"{host!r} cannot be fetched from: {refused.reason}") from refused
        object.__setattr__(self, "hosts", tuple(canonical))

    @property
    def schemes(self) -> Sequence[str]:
        """Accepted schemes."""
        return ("https", "http") if self.http else ("https",)

    def allow_host(self, host: str) -> bool:
        """Whether a canonical host is among `hosts`, or below one of them."""
        return not self.hosts or any(host == known or host.endswith(f".{known}") for known in self.hosts)


@dataclass(frozen=True)
class CheckedUrl:
    """A URL in parts, so that nobody parses it a second time and finds something else.

    Attributes:
        scheme: 'https' or 'http'.
        host: ASCII in lower case: a name without trailing dot, or an address without brackets.
        target: path and query as sent; may hold secrets.
    """

    scheme: str
    host: str
    target: str = field(repr=False)

    @property
    def port(self) -> int:
        """The only port that the scheme is fetched from."""
        return _PORTS[self.scheme]

    @property
    def authority(self) -> str:
        """The host as URLs and the header Host have it."""
        return f"[{self.host}]" if ":" in self.host else self.host


def check_url(url: str, rules: UrlRules) -> CheckedUrl:
    """Take a URL apart and refuse it unless each part is plain.

    Args:
        url: absolute; a fragment is dropped.
        rules: of the operator.

    Raises:
        UrlRefused: the reason holds no part of the URL.
    """
    _require_clean(url)
    parts = _URL.fullmatch(url)
    if parts is None or (scheme := parts["scheme"].lower()) not in rules.schemes:
        raise UrlRefused(f"only {' and '.join(rules.schemes)} URLs of the form scheme://host/path are fetched")
    authority = parts["authority"]
    if "@" in authority:
        raise UrlRefused("it has a user name or a password")
    split = _BRACKETED.fullmatch(authority) or _NAMED.fullmatch(authority)
    if split is None:
        raise UrlRefused("its host is not a name or an address")
    if split["port"] not in (None, f":{_PORTS[scheme]}"):
        raise UrlRefused(f"only port {_PORTS[scheme]} is fetched from over {scheme}")
    host = _canonical_host(authority.removesuffix(split["port"] or ""))
    if not rules.allow_host(host):
        raise UrlRefused("its host is not one that this service fetches from")
    target = quote(parts["path"] or "/", safe=_IN_PATH)
    if parts["query"] is not None:
        target += "?" + quote(parts["query"], safe=_IN_QUERY)
    return CheckedUrl(scheme, host, target)


def check_redirect(url: CheckedUrl, location: str, rules: UrlRules) -> CheckedUrl:
    """Where a redirect leads, refused by the rules for a first URL, and where it leaves https.

    Args:
        url: that was asked for.
        location: the answer's; absolute or relative to `url`.
        rules: of the operator.

    Raises:
        UrlRefused: the reason holds no part of either URL.
    """
    try:
        _require_clean(location)
        target = check_url(urljoin(f"{url.scheme}://{url.authority}{url.target}", location), rules)
    except UrlRefused as refused:
        raise UrlRefused(f"it redirects to a URL that is refused: {refused.reason}") from refused
    except ValueError as error:  # brackets that do not close
        raise UrlRefused("it redirects to what is not a URL") from error
    if (url.scheme, target.scheme) == ("https", "http"):
        raise UrlRefused("it redirects from https to http")
    return target


def _require_clean(text: str) -> None:
    """No URL has these, and parsers differ in whether they drop, split at or send them."""
    if len(text) > MAX_URL_BYTES or len(text.encode(errors="replace")) > MAX_URL_BYTES:
        raise UrlRefused(f"it is longer than {MAX_URL_BYTES} bytes")
    if not text.isprintable() or " " in text or "\\" in text:
        raise UrlRefused("it has white space, a backslash, or characters that do not print")


def _canonical_host(host: str) -> str:
    """A host in the one spelling that it is looked up, compared and connected to with.

    Raises:
        UrlRefused: no host that could be public.
    """
    if bracketed := _BRACKETED.fullmatch(host):
        try:
            address: Address = IPv6Address(bracketed["address"])
        except ValueError as error:
            raise UrlRefused("its host is not an IPv6 address") from error
    else:
        name = _canonical_name(host)
        if not _NUMBER.fullmatch(name.rpartition(".")[2]):
            return name
        # A host that ends in a number is an address to browsers and to the C library, which take octal, hexadecimal
        # and missing parts too: `0x7f.1` is 127.0.0.1. There is one spelling without a doubt.
        try:
            address = IPv4Address(name)
        except ValueError as error:
            raise UrlRefused("its host is a number, and not an IPv4 address in four decimal parts") from error
    if reason := refuse_reason(address):
        raise UrlRefused(f"its host is an address that is not public: {reason}")
    return str(address)


def _canonical_name(host: str) -> str:
    """A domain name in ASCII and lower case, without trailing dot; may still be an IPv4 address."""
    name = host.removesuffix(".")
    if not name or len(name) > _MAX_HOST_CHARS or not _DOTS_LIKE.isdisjoint(name):
        raise UrlRefused("its host is empty, too long, or has dots of other scripts")
    if not name.isascii():
        try:
            name = idna.encode(name.lower()).decode("ascii")
        except UnicodeError as error:
            raise UrlRefused("its host is not an internationalised domain name (IDNA 2008)") from error
    name = name.lower()
    labels = name.split(".")
    if len(name) > _MAX_HOST_CHARS or not all(_LABEL.fullmatch(label) for label in labels):
        raise UrlRefused("its host is not a domain name")
    if labels[-1] in _INSIDE:
        raise UrlRefused("its host is a name of local networks")
    if len(labels) == 1 and not _NUMBER.fullmatch(name):
        raise UrlRefused("its host is a single word, which only local networks know")
    return name
