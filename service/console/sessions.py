"""Sessions: who has signed in, kept in a signed cookie that names a key and holds nothing of it.

A session is what the cookie says as long as its signature is right, it is young enough, and its key is in force: a
revoked key ends its sessions within seconds. Signing out ends a session in this process at once; another process that
shares the secret takes the cookie until it has expired, where somebody has kept it.
"""

import base64
import hashlib
import hmac
import re
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass

MIN_SECRET_BYTES = 32
_COOKIE = re.compile(r"([A-Za-z0-9_-]{22})\.([0-9a-f]{12}|-)\.([0-9]{1,12})\.([A-Za-z0-9_-]{43})")
_NOBODY = "-"
_MOST_CLOSED = 10_000


@dataclass(frozen=True)
class Session:
    """One sign-in, or one visit without.

    Attributes:
        id: random.
        key_id: of the API key that was signed in with; None for a visitor without one.
        opened_s: when, in seconds since 1970.
    """

    id: str
    key_id: str | None
    opened_s: int


class Sessions:
    """Opens sessions, and tells which cookies are of one.

    Args:
        secret: that cookies are signed with; at least `MIN_SECRET_BYTES` that cannot be guessed.
        lasts_s: how long a session holds.
        clock: seconds since 1970.

    Raises:
        ValueError: the secret is too short.
    """

    def __init__(self, secret: bytes, lasts_s: float, clock: Callable[[], float] = time.time) -> None:
        if len(secret) < MIN_SECRET_BYTES:
            raise ValueError(f"a secret has at least {MIN_SECRET_BYTES} bytes, got {len(secret)}")
        self._secret, self._clock = secret, clock
        self.lasts_s = lasts_s
        self._closed: dict[str, float] = {}

    def open(self, key_id: str | None) -> Session:
        """A new session of a key, or of a visitor without one."""
        return Session(secrets.token_urlsafe(16), key_id, int(self._clock()))

    def cookie(self, session: Session) -> str:
        """What the browser keeps."""
        content = f"{session.id}.{session.key_id or _NOBODY}.{session.opened_s}"
        return f"{content}.{self._sign('session', content)}"

    def read(self, cookie: str | None) -> Session | None:
        """The session of a cookie; None where it is forged, too old, from the future, or closed."""
        match = _COOKIE.fullmatch(cookie or "")
        if match is None or not hmac.compare_digest(match[4], self._sign("session", match[0].rpartition(".")[0])):
            return None
        session = Session(match[1], None if match[2] == _NOBODY else match[2], int(match[3]))
        age_s = self._clock() - session.opened_s
        if not -1 <= age_s < self.lasts_s or session.id in self._closed:
            return None
        return session

    def close(self, session: Session) -> None:
        """End a session before its time, in this process."""
        now_s = self._clock()
        if len(self._closed) >= _MOST_CLOSED:
            self._closed = {id: until_s for id, until_s in self._closed.items() if until_s > now_s}
        self._closed[session.id] = session.opened_s + self.lasts_s

    def form_token(self, session: Session) -> str:
        """What every form of a session brings back, and no page of another origin can know."""
        return self._sign("form", session.id)

    def _sign(self, purpose: str, content: str) -> str:
        digest = hmac.digest(self._secret, f"hardlook console {purpose}\n{content}".encode(), hashlib.sha256)
        return base64.urlsafe_b64encode(digest).rstrip(b"=").decode()
