"""Bins of flipped verdicts: who takes part, and where they end."""

from hypothesis import given
from hypothesis import strategies as st

from offline.audit.calibrate_flips import LEAST_IMAGES, flip_bins
from perception.replay import Answered
from perception.verdict import Verdict, VerdictLabel
from tests.offline.calibration_runs import STRONG

SAFE, UNSAFE, REVIEW = VerdictLabel.SAFE, VerdictLabel.UNSAFE, VerdictLabel.REVIEW


def answered(label: VerdictLabel, clean: VerdictLabel, margin: float | None, attacked: VerdictLabel) -> Answered:
    def verdict(said: VerdictLabel, of: float | None) -> Verdict:
        return Verdict(said, None, of, (), "", "")

    return Answered(label, verdict(clean, margin), verdict(attacked, None))


def test_only_what_is_right_when_clean_can_flip() -> None:
    found = flip_bins(
        STRONG,
        [
            answered(SAFE, SAFE, 0.1, UNSAFE),
            answered(SAFE, SAFE, 0.2, SAFE),
            answered(SAFE, SAFE, 0.3, REVIEW),
            answered(SAFE, REVIEW, 0.3, UNSAFE),
            answered(SAFE, UNSAFE, 0.3, UNSAFE),
            answered(UNSAFE, SAFE, 0.3, SAFE),
        ],
    )
    assert [(b.verdict, b.margin_from, b.margin_to, b.flipped, b.total) for b in found] == [(SAFE, 0.1, 0.300002, 2, 3)]


@given(st.lists(st.tuples(st.integers(0, 30), st.booleans()), max_size=400))
def test_bins_are_wide_enough_and_equal_margins_share_one(values: list[tuple[int, bool]]) -> None:
    everyone = [answered(SAFE, SAFE, margin / 100, UNSAFE if flipped else SAFE) for margin, flipped in values]
    bins = flip_bins(STRONG, everyone)
    assert len(bins) <= 10
    assert all(b.total >= LEAST_IMAGES for b in bins) or len(bins) == 1
    for b in bins:
        inside = [flipped for margin, flipped in values if b.margin_from <= margin / 100 < b.margin_to]
        assert (len(inside), sum(inside)) == (b.total, b.flipped)
    assert sum(b.total for b in bins) == len(values)
