"""Going back in the queue: what a look through all of it would find, in few looks."""

import asyncio
from collections.abc import Sequence

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from service.console.pages.review_order import LOOK, item_before
from service.wire_reviews import ReviewItem, ReviewsAnswer

NOW_US = 1_790_000_000_000_000


def id_at(time_us: int, number: int = 0) -> str:
    return f"{time_us:016x}{number:016x}"


def item(id: str) -> ReviewItem:
    blank = dict.fromkeys(ReviewItem.model_fields, "")
    absent = dict.fromkeys(("claimed_by", "claimed_until", "decided_by", "decided_at", "decision", "exemplar_id"))
    said = {"origin": "verdict", "state": "open", "evidence": {}, "seen": 1, "image_kept": False}
    return ReviewItem.model_validate({**blank, **absent, **said, "id": id})


class Queue:
    """Ids in order, and how often they were asked for."""

    def __init__(self, ids: Sequence[str]) -> None:
        self.ids = sorted(ids)
        self.looks = 0

    async def __call__(self, after: str, limit: int) -> ReviewsAnswer:
        self.looks += 1
        found = [id for id in self.ids if id > after]
        following = found[limit - 1] if len(found) > limit else None
        reviews = [item(id) for id in found[:limit]]
        return ReviewsAnswer(request_id="", counts={}, reviews=reviews, next=following)


def naive(ids: Sequence[str], id: str) -> str | None:
    return max((each for each in ids if each < id), default=None)


ages_us = st.lists(
    st.one_of(st.integers(0, 1000), st.integers(0, 10**9), st.integers(0, NOW_US)), min_size=1, max_size=200
)


@given(ages_us, st.data())
@example([0], None)
def test_it_finds_what_a_look_at_all_of_them_finds(ages: list[int], data: st.DataObject | None) -> None:
    ids = [id_at(NOW_US - age, number) for number, age in enumerate(ages)]
    here = ids[0] if data is None else data.draw(st.sampled_from(ids))
    assert asyncio.run(item_before(here, Queue(ids))) == naive(ids, here)


@pytest.mark.parametrize("ago_us", [1, 10**6, 3600 * 10**6, 30 * 86_400 * 10**6, NOW_US])
def test_a_burst_before_a_pause_is_found_in_few_looks(ago_us: int) -> None:
    burst = [id_at(NOW_US - ago_us, number) for number in range(3 * LOOK)]
    here = id_at(NOW_US)
    queue = Queue([*burst, here])
    assert asyncio.run(item_before(here, queue)) == burst[-1]
    assert queue.looks < 80


def test_an_item_that_has_left_the_list_still_has_one_before_it() -> None:
    assert asyncio.run(item_before(id_at(NOW_US), Queue([id_at(NOW_US - 5)]))) == id_at(NOW_US - 5)
    assert asyncio.run(item_before(id_at(NOW_US), Queue([]))) is None
