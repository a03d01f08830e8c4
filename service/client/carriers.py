"""How the two clients take the steps of their parts: one waits, the other awaits."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterator
from functools import partial
from typing import Any, TypeAlias

from service.client.calls import Call
from service.client.errors import HardlookError
from service.client.exchange import Pause
from service.client.parts import Ask, Item, Items, Steps

Resume: TypeAlias = Callable[[], Any]


class BlockingCarrier:
    """Takes steps for HardlookClient.

    Args:
        ask: makes a call; its second argument says whether patiently.
        max_image_bytes: of one image.
    """

    def __init__(self, ask: Callable[[Call[Any], bool], Any], max_image_bytes: int) -> None:
        self._ask, self.max_image_bytes = ask, max_image_bytes

    def carry_out(self, begin: Callable[[], Steps[Any]]) -> Any:
        """Take all steps; what they come to."""
        steps = begin()
        resume: Resume = partial(next, steps)
        while True:
            try:
                step = resume()
            except StopIteration as stop:
                return stop.value
            resume = self._taken(steps, step)

    def iterate(self, begin: Callable[[], Items[Any]]) -> Iterator[Any]:
        """Take steps as items are asked for."""
        steps = begin()
        resume: Resume = partial(next, steps)
        while True:
            try:
                step = resume()
            except StopIteration:
                return
            if isinstance(step, Item):
                yield step.value
                resume = partial(next, steps)
            else:
                resume = self._taken(steps, step)

    def _taken(self, steps: Generator[Any, Any, Any], step: Ask | Pause) -> Resume:
        """Take a step; how to go on."""
        if isinstance(step, Pause):
            time.sleep(step.seconds)
            return partial(next, steps)
        try:
            return partial(steps.send, self._ask(step.call, step.patient))
        except HardlookError as error:
            return partial(steps.throw, error)


class AwaitingCarrier:
    """Takes steps for AsyncHardlookClient; arguments are those of `BlockingCarrier`.

    Beginnings read files, so they are made in threads.
    """

    def __init__(self, ask: Callable[[Call[Any], bool], Awaitable[Any]], max_image_bytes: int) -> None:
        self._ask, self.max_image_bytes = ask, max_image_bytes

    async def carry_out(self, begin: Callable[[], Steps[Any]]) -> Any:
        """Take all steps; what they come to."""
        steps = await asyncio.to_thread(begin)
        resume: Resume = partial(next, steps)
        while True:
            try:
                step = resume()
            except StopIteration as stop:
                return stop.value
            resume = await self._taken(steps, step)

    async def iterate(self, begin: Callable[[], Items[Any]]) -> AsyncIterator[Any]:
        """Take steps as items are asked for."""
        steps = await asyncio.to_thread(begin)
        resume: Resume = partial(next, steps)
        while True:
            try:
                step = resume()
            except StopIteration:
                return
            if isinstance(step, Item):
                yield step.value
                resume = partial(next, steps)
            else:
                resume = await self._taken(steps, step)

    async def _taken(self, steps: Generator[Any, Any, Any], step: Ask | Pause) -> Resume:
        """Take a step; how to go on."""
        if isinstance(step, Pause):
            await asyncio.sleep(step.seconds)
            return partial(next, steps)
        try:
            return partial(steps.send, await self._ask(step.call, step.patient))
        except HardlookError as error:
            return partial(steps.throw, error)
