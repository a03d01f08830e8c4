"""How the parts of a client are written once for both clients: a method says what to ask, and the client asks it.

    class Things(Part[WayT]):
        @asked
        def count(self, name: str) -> Call[CountAnswer]:
            return Call("GET", path_of("things", name), CountAnswer)

`HardlookClient.things.count("a")` is a CountAnswer; `AsyncHardlookClient.things.count("a")` is awaited for one. What
takes several calls is a generator of steps, which either client takes in its way.
"""

from collections.abc import AsyncIterator, Callable, Coroutine, Generator, Iterator
from dataclasses import dataclass
from functools import partial, update_wrapper
from typing import Any, Concatenate, Generic, ParamSpec, Protocol, TypeAlias, TypeVar, overload

from pydantic import BaseModel

from service.client.calls import Call
from service.client.exchange import Pause

P = ParamSpec("P")
T = TypeVar("T")
AnswerT = TypeVar("AnswerT", bound=BaseModel)
WayT = TypeVar("WayT")
_FIRST_PAUSE_S, _GROWTH = 0.1, 1.5


class Blocking:
    """Marks the parts of HardlookClient, whose methods return when they have the answer."""


class Awaiting:
    """Marks the parts of AsyncHardlookClient, whose methods are awaited."""


@dataclass(frozen=True)
class Ask:
    """Make a call; a `patient` one as often as the time allows, since the service may be restarted meanwhile."""

    call: Call[Any]
    patient: bool = False


@dataclass(frozen=True)
class Item(Generic[T]):
    """Hand something out."""

    value: T


Steps: TypeAlias = Generator[Ask | Pause, Any, T]
Items: TypeAlias = Generator[Ask | Pause | Item[T], Any, None]


def ask(call: Call[AnswerT], *, patient: bool = False) -> Steps[AnswerT]:
    """The step that is answered with the answer to a call, or its exception."""
    answer: AnswerT = yield Ask(call, patient)
    return answer


def growing_pauses(most_s: float) -> Iterator[Pause]:
    """Pauses from a tenth of a second on, each half as long again as the one before."""
    seconds = _FIRST_PAUSE_S
    while True:
        yield Pause(min(seconds, most_s))
        seconds = min(seconds * _GROWTH, most_s)


class Carrier(Protocol):
    """A client, as its parts see it.

    Attributes:
        max_image_bytes: of one image.
    """

    max_image_bytes: int

    def carry_out(self, begin: Callable[[], Steps[Any]]) -> Any:
        """Take all steps; what they come to, or what is awaited for that."""
        ...

    def iterate(self, begin: Callable[[], Items[Any]]) -> Any:
        """Take steps as items are asked for."""
        ...


class Part(Generic[WayT]):
    """Some of the methods of a client: of a `Blocking` or of an `Awaiting` one."""

    def __init__(self, carrier: Carrier) -> None:
        self.carrier = carrier


class asked(Generic[P, AnswerT]):  # noqa: N801 - a decorator
    """A method that is one call."""

    def __init__(self, build: Callable[Concatenate[Any, P], Call[AnswerT]]) -> None:
        self._build = build

    @overload
    def __get__(self, part: None, owner: type) -> Callable[..., Any]: ...
    @overload
    def __get__(self, part: Part[Blocking], owner: type) -> Callable[P, AnswerT]: ...
    @overload
    def __get__(self, part: Part[Awaiting], owner: type) -> Callable[P, Coroutine[Any, Any, AnswerT]]: ...
    def __get__(self, part: Part[Any] | None, owner: type) -> Any:
        if part is None:
            return self._build

        def begin(*arguments: Any, **named: Any) -> Steps[AnswerT]:
            return ask(self._build(part, *arguments, **named))  # built at once, asked when the step is taken

        return _method(self._build, part, part.carrier.carry_out, begin)


class stepped(Generic[P, T]):  # noqa: N801 - a decorator
    """A method that is several calls with one result."""

    def __init__(self, build: Callable[Concatenate[Any, P], Steps[T]]) -> None:
        self._build = build

    @overload
    def __get__(self, part: None, owner: type) -> Callable[..., Any]: ...
    @overload
    def __get__(self, part: Part[Blocking], owner: type) -> Callable[P, T]: ...
    @overload
    def __get__(self, part: Part[Awaiting], owner: type) -> Callable[P, Coroutine[Any, Any, T]]: ...
    def __get__(self, part: Part[Any] | None, owner: type) -> Any:
        if part is None:
            return self._build
        return _method(self._build, part, part.carrier.carry_out, partial(self._build, part))


class listed(Generic[P, T]):  # noqa: N801 - a decorator
    """A method that is iterated over, with as many calls as that takes."""

    def __init__(self, build: Callable[Concatenate[Any, P], Items[T]]) -> None:
        self._build = build

    @overload
    def __get__(self, part: None, owner: type) -> Callable[..., Any]: ...
    @overload
    def __get__(self, part: Part[Blocking], owner: type) -> Callable[P, Iterator[T]]: ...
    @overload
    def __get__(self, part: Part[Awaiting], owner: type) -> Callable[P, AsyncIterator[T]]: ...
    def __get__(self, part: Part[Any] | None, owner: type) -> Any:
        if part is None:
            return self._build
        return _method(self._build, part, part.carrier.iterate, partial(self._build, part))


def _method(
    build: Callable[..., Any],
    part: Part[Any],
    carry: Callable[[Callable[[], Any]], Any],
    begin: Callable[..., Any],
) -> Callable[..., Any]:
    """What a caller gets: with the name, the arguments and the description of what was written."""

    def method(*arguments: Any, **named: Any) -> Any:
        return carry(partial(begin, *arguments, **named))

    return update_wrapper(method, build.__get__(part))
