"""The gate: who visits, what they may do, and whether a form is one that this console handed out to them.

A form is believed where its token is that of the visitor's session, and where the browser does not say that a page of
another site has sent it.
"""

import hmac
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass
from urllib.parse import urlsplit

from fastapi import Request

from perception.errors import ImageTooLarge
from service.client import AsyncHardlookClient
from service.console.errors import FormRefused, SignInNeeded
from service.console.in_process import client_of
from service.console.sessions import Session, Sessions
from service.errors import Forbidden
from service.intake import Form, read_form
from service.keys import Caller, anonymous
from service.runtime import Runtime, runtime_of
from service.settings import Scope

COOKIE = "hardlook_console"
COOKIE_PATH = "/console"
FORM_TOKEN = "form_token"


@dataclass(frozen=True)
class Visit:
    """One request of a browser, and who it is of.

    Attributes:
        request: as it came.
        runtime: of the service.
        session: that it belongs to; a fresh one where it brought none.
        fresh: whether the browser has to be told of the session.
        caller: in whose name the API is asked.
        client: asks it.
    """

    request: Request
    runtime: Runtime
    session: Session
    fresh: bool
    caller: Caller
    client: AsyncHardlookClient

    @property
    def signed_in(self) -> bool:
        """Whether there is a key."""
        return self.session.key_id is not None

    @property
    def form_token(self) -> str:
        """For every form of the page, as a hidden field of the name `FORM_TOKEN`."""
        return sessions_of(self.request).form_token(self.session)

    def may(self, *scopes: Scope) -> bool:
        """Whether the visitor has one of these scopes, or any at all where none is named."""
        return may(self.caller.scopes, scopes)

    async def form(self) -> Form:
        """Read the form that was sent.

        Raises:
            FormRefused: it is not one of this session's, or comes from another site.
            RequestError: it cannot be read.
        """
        refuse_other_sites(self.request)
        form = await read_form(self.request, self.runtime.settings)
        require_token(form, self.form_token)
        return form


def may(held: Collection[Scope], scopes: Collection[Scope]) -> bool:
    """Whether somebody who holds some scopes has one of those that are asked for, or any at all where none is."""
    return bool(held) and (not scopes or "admin" in held or not set(held).isdisjoint(scopes))


def sessions_of(request: Request) -> Sessions:
    """The sessions of the application."""
    sessions: Sessions = request.app.state.console_sessions
    return sessions


def session_of(request: Request) -> Session | None:
    """The session that a request belongs to; None where its cookie is of none."""
    return sessions_of(request).read(request.cookies.get(COOKIE))


@asynccontextmanager
async def visit_of(request: Request, *scopes: Scope) -> AsyncIterator[Visit]:
    """Let a visitor in; the first thing that every page does.

    Args:
        request: of the browser.
        scopes: of which the visitor must have one; none where any will do.

    Raises:
        SignInNeeded: there is no sign-in, and those who have none may not see the page.
        Forbidden: the key has none of the scopes.
        NotReady: the service has not started.
    """
    runtime = runtime_of(request)
    present = session_of(request)
    caller = caller_of_session(request, runtime, present)
    if caller is None:  # its key is not in force any more
        present, caller = None, _nobody(request, runtime)
    request.state.caller_id = caller.id
    session = present or sessions_of(request).open(None)
    async with client_of(request, caller) as client:
        visit = Visit(request, runtime, session, present is None, caller, client)
        if not visit.may(*scopes):
            if caller.anonymous:
                raise SignInNeeded
            raise Forbidden(" or ".join(scopes) or "any")
        yield visit


def refuse_other_sites(request: Request) -> None:
    """Raise FormRefused where the browser says that the form is from a page of another site."""
    site, origin = request.headers.get("sec-fetch-site"), request.headers.get("origin")
    if site is not None:
        if site not in ("same-origin", "none"):
            raise FormRefused("it comes from another site")
    elif origin is not None and urlsplit(origin).netloc != request.headers.get("host", ""):
        raise FormRefused("it comes from another origin")


def require_token(form: Form, token: str) -> None:
    """Raise FormRefused where a form does not bring the token of the session."""
    if not hmac.compare_digest(form.fields.get(FORM_TOKEN, "").encode(), token.encode()):
        raise FormRefused("it is of another session, or the sign-in has ended; go back, reload the page, and try again")


def image_of(form: Form, field: str = "image") -> tuple[str, bytes]:
    """The file that was chosen in a form: its name, and its content.

    Raises:
        FormRefused: none was.
        ImageTooLarge: more bytes than an image may have.
    """
    if field not in form.files:
        raise FormRefused("no image was chosen")
    name, content = form.files[field]
    if isinstance(content, ImageTooLarge):
        raise content
    return name, content


def caller_of_session(request: Request, runtime: Runtime, session: Session | None) -> Caller | None:
    """In whose name a session asks; None where its key is not in force any more."""
    if session is None or session.key_id is None:
        return _nobody(request, runtime)
    return runtime.keys.caller_of(session.key_id)


def _nobody(request: Request, runtime: Runtime) -> Caller:
    return anonymous(request.client.host if request.client else None, runtime.anonymous_scopes)


def scopes_in_words(scopes: Collection[str]) -> str:
    """For people, in a fixed order."""
    return ", ".join(sorted(scopes)) or "none"
