"""What is never fetched, in the spellings by which people have tried: addresses with the reason, and URLs."""

# ruff: noqa: RUF001 - characters that look like others are the point

REFUSED_ADDRESSES = {
    "0.0.0.0": "of this host", "0.1.2.3": "of this host", "10.0.0.1": "private", "100.64.0.1": "carrier",
    "100.127.255.255": "carrier", "127.0.0.1": "loopback", "127.255.255.254": "loopback", "169.254.1.1": "link-local",
    "172.16.0.1": "private", "172.31.255.255": "private", "192.0.0.1": "protocols", "192.0.0.9": "protocols",
    "192.0.0.170": "protocols", "192.0.2.1": "documentation", "192.52.193.1": "relay", "192.88.99.1": "6to4",
    "192.168.0.1": "private", "198.18.0.1": "benchmarks", "198.19.255.255": "benchmarks",
    "198.51.100.1": "documentation", "203.0.113.1": "documentation", "224.0.0.1": "multicast",
    "239.255.255.255": "multicast", "240.0.0.1": "reserved", "255.255.255.255": "broadcast",
    "169.254.169.254": "metadata", "169.254.170.2": "metadata", "100.100.100.200": "metadata",
    "168.63.129.16": "metadata", "192.0.0.192": "metadata", "fd00:ec2::254": "metadata", "fd20:ce::254": "metadata",
    "::": "IPv4", "::1": "loopback", "::127.0.0.1": "IPv4", "::8.8.8.8": "IPv4", "::ffff:127.0.0.1": "IPv4",
    "::ffff:8.8.8.8": "IPv4", "::ffff:0:8.8.8.8": "not global unicast", "64:ff9b::7f00:1": "NAT64",
    "64:ff9b::8.8.8.8": "NAT64", "64:ff9b:1::a00:1": "NAT64", "100::1": "not global unicast",
    "2001::1": "Teredo", "2001:0:4136:e378:8000:63bf:3fff:fdd2": "Teredo", "2001:2::1": "protocols",
    "2001:10::1": "protocols", "2001:20::1": "protocols", "2001:1::1": "protocols", "2001:db8::1": "documentation",
    "2002:7f00:1::": "6to4", "2002:808:808::1": "6to4", "3ffe::1": "ended", "3fff::1": "documentation",
    "4000::1": "not global unicast", "5f00::1": "not global unicast", "fc00::1": "private", "fd12:3456::1": "private",
    "fe80::1": "link-local", "fe80::1%eth0": "one interface", "2606:4700::1111%1": "one interface",
    "fec0::1": "site-local", "ff02::1": "multicast", "ff0e::1": "multicast",
    "2606:4700::5efe:7f00:1": "ISATAP", "2606:4700::200:5efe:7f00:1": "ISATAP",
}  # fmt: skip

REFUSED_URLS = [
    # schemes and forms
    "", "example.com/a.jpg", "//example.com/a.jpg", "https:", "https:/example.com", "https:example.com", "https://",
    "https:///a.jpg", "https://?x", "file:///etc/passwd", "file://example.com/etc/passwd", "ftp://example.com/a",
    "gopher://example.com:70/_x", "dict://example.com:11211/stat", "data:image/png;base64,AAAA", "javascript:alert(1)",
    "unix:/run/docker.sock", "http+unix://%2Frun%2Fdocker.sock/", "ws://example.com/", "jar:https://example.com!/a",
    "ldap://example.com/", "tftp://example.com/", "blob:https://example.com/x", "view-source:https://example.com/",
    # credentials, and hosts that hide behind them
    "https://user@example.com/", "https://user:secret@example.com/", "https://@example.com/", "https://:@example.com/",
    "https://example.com@127.0.0.1/", "https://127.0.0.1@example.com/", "https://example.com%40127.0.0.1/",
    "https://example.com\\@127.0.0.1/", "https://example.com:443@127.0.0.1/", "https://a@b@127.0.0.1/",
    # white space and control characters
    " https://example.com/", "https://example.com/ ", "https://exa mple.com/", "https://example.com/a b",
    "https://example.com\t/", "https://example.com\n.127.0.0.1/", "https://example.com/\r\nHost: x", "\x00https://a.com",
    "https://example.com/\x7f", "https://example.com/\x00", "https://ex\u00adample.com/", "https://exam\u200bple.com/",
    "https://\u202eexample.com/", "https://example.com\\.127.0.0.1/", "https:\\\\127.0.0.1\\", "https://\ud800.com/",
    # escapes and dots in hosts
    "https://%6c%6f%63%61%6c%68%6f%73%74/", "https://127%2e0%2e0%2e1/", "https://example%2ecom/", "https://127。0。0。1/",
    "https://127．0．0．1/", "https://127｡0｡0｡1/", "https://example。com/", "https://１２７.0.0.1/", "https://①②⑦.⓪.⓪.①/",
    "https://ⓛⓞⓒⓐⓛⓗⓞⓢⓣ/", "https://.example.com/", "https://example..com/", "https://example.com../", "https://./",
    "https://-a.example.com/", "https://a-.example.com/", "https://a,b.example.com/", "https://a+b.com/",
    "https://*.example.com/", "https://exam;ple.com/", "https://$HOME.com/", "https://xn--.☃☃/", "https://℀.com/",
    f"https://{'a' * 64}.com/", f"https://{'a.' * 130}com/", f"https://example.com/{'a' * 2048}",
    f"https://example.com/{'ü' * 1024}",
    # numbers
    "https://127.0.0.1/", "https://127.1/", "https://127.0.1/", "https://2130706433/", "https://017700000001/",
    "https://0x7f000001/", "https://0x7F.1/", "https://0x7f.0x0.0x0.0x1/", "https://0177.0.0.1/", "https://0/",
    "https://0x/", "https://00000/", "https://127.0.0.01/", "https://127.0.0.1.1/", "https://256.256.256.256/",
    "https://1.1.1/", "https://1.1.1.01/", "https://16843009/", "https://0x1.0x1.0x1.0x1/", "https://a.b.0x1/",
    "https://example.1/", "https://4294967297/", "https://127.0.0.1./", "https://0.0.0.0/", "https://169.254.169.254/",
    "https://2852039166/", "https://0xa9fea9fe/", "https://0251.0376.0251.0376/", "https://100.100.100.200/",
    "https://168.63.129.16/", "https://192.0.0.192/", "https://255.255.255.255/", "https://224.0.0.1/",
    # IPv6
    "https://[::1]/", "https://[::]/", "https://[0:0:0:0:0:0:0:1]/", "https://[::ffff:127.0.0.1]/",
    "https://[::ffff:7f00:1]/", "https://[::ffff:8.8.8.8]/", "https://[::127.0.0.1]/", "https://[64:ff9b::127.0.0.1]/",
    "https://[64:ff9b::a9fe:a9fe]/", "https://[64:ff9b:1::1]/", "https://[2002:7f00:1::]/", "https://[2001::1]/",
    "https://[fe80::1]/", "https://[fe80::1%eth0]/", "https://[fe80::1%25eth0]/", "https://[2606:4700::1%25lo]/",
    "https://[fd00:ec2::254]/", "https://[fec0::1]/", "https://[ff02::1]/", "https://[::1/", "https://::1/",
    "https://::1]/", "https://[]/", "https://[::1]x/", "https://x[::1]/", "https://[[::1]]/", "https://[v1.a]/",
    "https://[127.0.0.1]/", "https://[example.com]/", "https://2606:4700::1/", "https://[2606:4700::1]:22/",
    "https://[2606:4700:::1]/",
    # names of local networks
    "https://localhost/", "https://LOCALHOST/", "https://localhost./", "https://foo.localhost/", "https://intranet/",
    "https://metadata/", "https://metadata.google.internal/", "https://metadata.google.internal./",
    "https://instance-data.ec2.internal/", "https://printer.local/", "https://localhost.localdomain/",
    "https://router.lan/", "https://nas.home/", "https://db.corp/", "https://1.0.0.127.in-addr.arpa/",
    "https://ipv4only.arpa/", "https://x.onion/", "https://com/",
    # ports
    "https://example.com:80/", "http://example.com:443/", "https://example.com:22/", "https://example.com:8443/",
    "https://example.com:/", "https://example.com:0/", "https://example.com:0443/", "https://example.com:+443/",
    "https://example.com:443:443/", "https://example.com:-1/", "https://example.com:65979/", "https://example.com:４４３/",
    "https://example.com: 443/", "https://example.com:x/",
]  # fmt: skip
