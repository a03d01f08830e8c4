"""Asking for one page of what the client's own methods iterate over, so that a person can leaf through it."""

from functools import partial
from typing import TypeVar

from pydantic import BaseModel

from service.client.calls import Call
from service.client.parts import ask
from service.console.gate import Visit

AnswerT = TypeVar("AnswerT", bound=BaseModel)


async def answer_to_call(visit: Visit, call: Call[AnswerT]) -> AnswerT:
    """Make a call in the name of a visitor, as the client's methods make theirs, with their errors.

    Args:
        visit: in whose name.
        call: such as `Call("GET", "/reviews", ReviewsAnswer, {"after": id})`.
    """
    answer: AnswerT = await visit.client.reviews.carrier.carry_out(partial(ask, call))
    return answer
