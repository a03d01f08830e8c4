"""Rate limits: what passes, what waits and how long, what is never mixed up, and that memory stays bounded."""

import asyncio
import time
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.errors import RateLimited, SettingsError, TooManyImages
from service.keys import Caller, anonymous
from service.rate_limits import MAX_COUNTERS, RateLimits, parse_limits

START_S = 1_800_000_000.0


class Clock:
    """Stands in for `time.time`, which the library reads."""

    now_s = START_S

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "time", clock)
    return clock


def keyed(rate_limit: str | None = None, key_id: str = "0123456789ab") -> Caller:
    return Caller(key_id, "a", frozenset(), rate_limit)


def admitted(limits: RateLimits, caller: Caller, cost: int = 1) -> bool:
    try:
        asyncio.run(limits.hit(caller, cost))
    except RateLimited:
        return False
    return True


def refused(limits: RateLimits, caller: Caller, cost: int = 1) -> RateLimited:
    with pytest.raises(RateLimited) as caught:
        asyncio.run(limits.hit(caller, cost))
    return caught.value


def test_so_many_pass_and_no_more(clock: Clock) -> None:
    limits = RateLimits("5/minute")
    assert [admitted(limits, keyed()) for _ in range(7)] == [True] * 5 + [False] * 2
    error = refused(limits, keyed())
    assert error.limit == "5 per 1 minute"
    clock.now_s += 120
    assert admitted(limits, keyed(), 5)


def test_images_count_not_requests(clock: Clock) -> None:
    limits = RateLimits("10/minute")
    assert admitted(limits, keyed(), 8)
    assert not admitted(limits, keyed(), 3)
    assert admitted(limits, keyed(), 2)


def test_callers_do_not_share(clock: Clock) -> None:
    limits = RateLimits("1/minute")
    callers = [keyed(), keyed(key_id="ba9876543210"), *(anonymous(f"192.0.2.{i}", frozenset()) for i in range(3))]
    assert all(admitted(limits, caller) for caller in callers)
    assert not any(admitted(limits, caller) for caller in callers)
    assert not admitted(limits, anonymous("::ffff:192.0.2.1", frozenset()))


def test_the_limit_of_a_key_takes_the_place_of_the_default(clock: Clock) -> None:
    limits = RateLimits("1/minute")
    assert [admitted(limits, keyed("3/minute")) for _ in range(4)] == [True] * 3 + [False]
    assert all(admitted(limits, keyed("", "f" * 12)) for _ in range(10))


def test_no_limits_count_nothing() -> None:
    limits = RateLimits("")
    assert all(admitted(limits, keyed(), 1000) for _ in range(10))
    assert limits.counters == 0


def test_a_request_that_one_limit_refuses_counts_against_none(clock: Clock) -> None:
    limits = RateLimits("4/second;6/minute")
    assert admitted(limits, keyed(), 4)
    assert not any(admitted(limits, keyed()) for _ in range(50))  # the second is full, the minute not
    clock.now_s += 2
    assert admitted(limits, keyed(), 2)
    assert refused(limits, keyed()).limit == "6 per 1 minute"
    clock.now_s += 2
    assert not admitted(limits, keyed())  # the minute is full, the second not
    clock.now_s += 120
    assert admitted(limits, keyed(), 4)


def test_more_than_a_limit_ever_allows_is_not_a_matter_of_time(clock: Clock) -> None:
    limits = RateLimits("10/second;4/minute")
    with pytest.raises(TooManyImages) as caught:
        asyncio.run(limits.hit(keyed(), 5))
    assert caught.value.limit == limits.most_at_once(keyed()) == 4
    assert limits.most_at_once(keyed("")) is RateLimits("").most_at_once(keyed()) is None
    assert admitted(limits, keyed(), 4)


@given(
    amount=st.integers(1, 40),
    per=st.sampled_from(["second", "5 second", "minute", "2 hour"]),
    costs=st.lists(st.tuples(st.integers(1, 40), st.floats(0, 1.5)), max_size=12),
)
def test_there_is_room_at_the_promised_time_and_not_before(
    amount: int, per: str, costs: list[tuple[int, float]]
) -> None:
    clock = Clock()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "time", clock)
        limits = RateLimits(f"{amount}/{per}")
        window_s = parse_limits(f"{amount}/{per}", "")[0].get_expiry()
        for cost, share in costs:
            if cost > amount:
                continue
            clock.now_s += share * window_s
            if admitted(limits, keyed(), cost):
                continue
            wait_s = refused(limits, keyed(), cost).retry_after_s
            assert 1 <= wait_s <= max(1.0, 2 * window_s + 0.01)
            if wait_s > 1:
                clock.now_s += wait_s - 0.01
                assert not admitted(limits, keyed(), cost)
                clock.now_s -= wait_s - 0.01
            clock.now_s += wait_s
            assert admitted(limits, keyed(), cost)


@given(st.lists(st.tuples(st.integers(1, 5), st.floats(0, 3)), min_size=1, max_size=60))
def test_no_window_has_more_than_twice_the_limit_and_no_quiet_caller_waits(hits: list[tuple[int, float]]) -> None:
    """The strategy estimates the window before: what it lets through in any window is bounded all the same."""
    clock, amount, window_s = Clock(), 10, 5.0
    passed: list[tuple[float, int]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "time", clock)
        limits = RateLimits(f"{amount}/5 second")
        for cost, pause_s in hits:
            clock.now_s += pause_s
            recent = sum(c for at, c in passed if at > clock.now_s - 2 * window_s)
            if admitted(limits, keyed(), cost):
                passed.append((clock.now_s, cost))
            else:
                assert recent + cost > amount
            assert sum(c for at, c in passed if at > clock.now_s - window_s) <= 2 * amount


def test_concurrent_requests_together_stay_within_the_limit() -> None:
    async def run() -> int:
        limits = RateLimits("50/minute;200/hour")
        results = await asyncio.gather(*(limits.hit(keyed(), 3) for _ in range(100)), return_exceptions=True)
        assert all(result is None or isinstance(result, RateLimited) for result in results)
        assert len(asyncio.all_tasks()) == 1  # the library's own sweep, which looks at everything, never starts
        return results.count(None)

    assert asyncio.run(run()) == 16


def test_counters_of_past_windows_are_dropped(clock: Clock) -> None:
    limits = RateLimits("10/second")

    async def visit(block: int) -> None:
        for i in range(50_000):
            await limits.hit(anonymous(f"10.{block}.{i >> 8}.{i & 255}", frozenset()), 1)

    asyncio.run(visit(0))
    assert limits.counters == 50_000
    clock.now_s += 3
    asyncio.run(visit(1))
    assert limits.counters == 50_000


def test_anonymous_counters_have_a_bound_and_keys_are_not_pushed_out(clock: Clock) -> None:
    limits = RateLimits("1/day", max_counters=1000)
    assert admitted(limits, keyed())

    async def visit() -> None:
        for i in range(5000):
            await limits.hit(anonymous(f"10.0.{i >> 8}.{i & 255}", frozenset()), 1)
            assert limits.counters <= 1001

    asyncio.run(visit())
    assert not admitted(limits, keyed())
    assert not admitted(limits, anonymous(f"10.0.{4999 >> 8}.{4999 & 255}", frozenset()))
    assert admitted(limits, anonymous("10.0.0.0", frozenset()))  # forgotten long ago


def test_a_counter_takes_what_is_promised() -> None:
    async def visit(limits: RateLimits) -> None:
        for i in range(20_000):
            await limits.hit(anonymous(f"2001:db8:{i:x}::1", frozenset()), 1)

    limits = RateLimits("100/day")
    tracemalloc.start()
    try:
        asyncio.run(visit(limits))
        used, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert limits.counters == 20_000
    assert used / limits.counters < 450
    assert MAX_COUNTERS * 450 < 100e6


@pytest.mark.parametrize(
    ("text", "windows"),
    [
        ("", []),
        ("  ", []),
        ("10/second", [(10, 1)]),
        ("100 per 5 minutes", [(100, 300)]),
        ("100/second;3000/minute", [(100, 1), (3000, 60)]),
        ("1/hour, 2/day", [(1, 3600), (2, 86400)]),
    ],
)
def test_what_limits_mean(text: str, windows: list[tuple[int, int]]) -> None:
    assert [(item.amount, item.get_expiry()) for item in parse_limits(text, "X")] == windows


@pytest.mark.parametrize(
    "text", ["10", "many", "10/fortnight", "0/second", "0 per second", "10/0 seconds", "-1/second", "1.5/second", ";"]
)
def test_what_is_no_limit_is_named(text: str) -> None:
    with pytest.raises(SettingsError, match=r"HARDLOOK_RATE_LIMIT: .* is no rate limit"):
        RateLimits(text)
    with pytest.raises(SettingsError, match="key 0123"):
        parse_limits(text, "key 0123")
