"""Webhooks: what happens is told to those who asked for it, at least once, signed, and again until they have taken it.

Owns when a message is sent, and when it is given up. Messages are stored in the transaction that makes what they tell
of, so that neither is there without the other. Each hook has a task of its own: a slow one holds up no other.
"""

import asyncio
import logging
import random
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from sqlalchemy import Connection

from indexer.catalog import deliveries
from indexer.catalog.deliveries import Delivery
from indexer.errors import CatalogError
from service.editing import Editor
from service.errors import Unavailable
from service.webhook_file import EventType, Hook
from service.webhook_sender import Message, NotSent, Sender

Result = Literal["delivered", "failed", "given-up", "dropped"]
ATTEMPTS = 12
FIRST_WAIT_S, LAST_WAIT_S = 5.0, 6 * 3600.0
KEEP_S = 7 * 86400.0
_ABANDONED_S = 4 * KEEP_S
_GROWTH = (LAST_WAIT_S / FIRST_WAIT_S) ** (1 / (ATTEMPTS - 2))
_JITTER = 0.2
_AT_A_TIME = 4  # messages on their way to one hook
_HOLD_S = 60.0  # far longer than sending takes
_MAX_WAITING = 100_000
_HOUSEKEEPING_S = 60.0
_log = logging.getLogger("hardlook.webhooks")


@dataclass(frozen=True)
class Event:
    """What happened.

    Attributes:
        type: of `EventType`.
        data: ready for JSON; never an image or an embedding.
    """

    type: EventType
    data: dict[str, Any]


def wait_s(attempts: int) -> float:
    """How long to wait after a number of attempts: from 5 s to 6 h, in equal proportions, half a day in all."""
    return float(min(FIRST_WAIT_S * _GROWTH ** (attempts - 1), LAST_WAIT_S))


class Webhooks:
    """Stores messages and sends them.

    Args:
        editor: of the database in which messages wait.
        hooks: whom to tell of what.
        sender: entered by `run`.
        observe: told of each attempt by name of the hook; from any thread.
        poll_s: how often to look for messages that are due, besides those that this process has just stored.
        wait_s: seconds after a number of attempts in vain.
        max_waiting: messages for one hook; more are dropped, since a dead receiver must not fill the disk.
    """

    def __init__(
        self,
        editor: Editor,
        hooks: Sequence[Hook],
        sender: Sender | None = None,
        *,
        observe: Callable[[str, Result], None] = lambda hook, result: None,
        poll_s: float = 2.0,
        wait_s: Callable[[int], float] = wait_s,
        max_waiting: int = _MAX_WAITING,
    ) -> None:
        self._editor, self._hooks, self._sender = editor, {hook.name: hook for hook in hooks}, sender or Sender()
        self._observe, self._poll_s, self._wait_s, self._max_waiting = observe, poll_s, wait_s, max_waiting
        self._news = {name: asyncio.Event() for name in self._hooks}
        self._waiting = dict.fromkeys(self._hooks, 0)
        self._gone: set[str] = set()
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def depth(self) -> int:
        """How many messages wait, about."""
        return sum(self._waiting.values())

    def wanted(self, event: EventType) -> bool:
        """Whether anybody is to be told of such events."""
        return bool(self._receivers(event))

    def enqueue(self, connection: Connection, events: Sequence[Event]) -> None:
        """Store messages for everybody who wants them, in the transaction that makes what they tell of.

        Args:
            connection: of a transaction that writes, in whichever thread.
            events: in order; those that nobody wants are left out.
        """
        for event in events:
            for hook in self._receivers(event.type):
                if self._waiting[hook.name] >= self._max_waiting:
                    self._observe(hook.name, "dropped")
                    continue
                deliveries.enqueue(connection, hook.name, event.type, event.data)
                self._waiting[hook.name] += 1
                self._wake(hook.name)

    async def run(self) -> None:
        """Send what waits, until cancelled."""
        self._loop = asyncio.get_running_loop()
        try:
            async with self._sender, asyncio.TaskGroup() as tasks:
                tasks.create_task(self._keep_house())
                for hook in self._hooks.values():
                    tasks.create_task(self._serve(hook))
        finally:
            self._loop = None

    def _receivers(self, event: EventType) -> list[Hook]:
        return [hook for hook in self._hooks.values() if event in hook.events and hook.name not in self._gone]

    def _wake(self, name: str) -> None:
        loop = self._loop
        if loop is not None:
            with suppress(RuntimeError):  # it has just ended: the next process sends it
                loop.call_soon_threadsafe(self._news[name].set)

    async def _serve(self, hook: Hook) -> None:
        """Send what waits for one hook."""
        news, told = self._news[hook.name], False
        while hook.name not in self._gone:
            sent = 0
            try:
                # News come before the commit; claiming is behind it in the writer's line, reading would not be.
                if told or await self._editor.read(partial(deliveries.is_due, hook=hook.name)):
                    sent = await self._send_some(hook)
            except (CatalogError, Unavailable) as error:
                _log.warning("webhook %s: cannot look what to send: %s", hook.name, error)
                await asyncio.sleep(self._poll_s)
            except Exception:
                _log.exception("a bug")
                await asyncio.sleep(self._poll_s)
            told = sent == _AT_A_TIME
            if not told:
                with suppress(TimeoutError):
                    async with asyncio.timeout(self._poll_s):
                        await news.wait()
                told = news.is_set()
            news.clear()

    async def _send_some(self, hook: Hook) -> int:
        """Send some of what is due; how many messages that were."""
        claimed = await self._editor.write(partial(deliveries.claim, hook=hook.name, limit=_AT_A_TIME, hold_s=_HOLD_S))
        attempts = (self._attempt(hook, delivery) for delivery in claimed)
        failures = [found for found in await asyncio.gather(*attempts, return_exceptions=True) if found is not None]
        if failures:
            raise failures[0]
        return len(claimed)

    async def _attempt(self, hook: Hook, delivery: Delivery) -> None:
        try:
            await self._sender.send(hook, Message(delivery.id, delivery.body))
        except NotSent as failure:
            await self._failed(hook, delivery, failure)
        except Exception:
            _log.exception("a bug")
            await self._failed(hook, delivery, NotSent("a bug of this service"))
        else:
            await self._editor.write(partial(deliveries.delivered, id=delivery.id))
            self._ended(hook, "delivered")

    async def _failed(self, hook: Hook, delivery: Delivery, failure: NotSent) -> None:
        if failure.gone:
            self._gone.add(hook.name)
            given_up = await self._editor.write(partial(deliveries.give_up_all, hook=hook.name, error=failure.reason))
            self._waiting[hook.name] = 0
            _log.error("webhook %s: %s: it gets nothing more until a restart", hook.name, failure.reason)
            for _ in range(given_up):
                self._observe(hook.name, "given-up")
        elif delivery.attempts >= ATTEMPTS:
            await self._editor.write(partial(deliveries.give_up, id=delivery.id, error=failure.reason))
            self._ended(hook, "given-up")
            _log.error(
                "webhook %s: %s %s is given up after %d attempts: %s",
                hook.name, delivery.event, delivery.id, delivery.attempts, failure.reason,
            )  # fmt: skip
        else:
            jitter = random.uniform(1 - _JITTER, 1 + _JITTER)  # those that failed together do not come back together
            after_s = max(self._wait_s(delivery.attempts) * jitter, min(failure.retry_after_s, LAST_WAIT_S))
            await self._editor.write(partial(deliveries.retry, id=delivery.id, after_s=after_s, error=failure.reason))
            self._observe(hook.name, "failed")
            _log.warning(
                "webhook %s: %s %s not delivered, attempt %d: %s; again in %.0f s",
                hook.name, delivery.event, delivery.id, delivery.attempts, failure.reason, after_s,
            )  # fmt: skip

    def _ended(self, hook: Hook, result: Result) -> None:
        self._waiting[hook.name] = max(0, self._waiting[hook.name] - 1)
        self._observe(hook.name, result)

    async def _keep_house(self) -> None:
        """Count what waits, and erase what is long over."""
        while True:
            try:
                for name in self._hooks:
                    self._waiting[name] = await self._editor.read(partial(deliveries.waiting, hook=name))
                purge = partial(deliveries.purge, ended_s=KEEP_S, abandoned_s=_ABANDONED_S)
                while await self._editor.write(purge):
                    pass
            except (CatalogError, Unavailable) as error:
                _log.warning("webhooks: cannot look what waits: %s", error)
            except Exception:
                _log.exception("a bug")
            await asyncio.sleep(_HOUSEKEEPING_S)
