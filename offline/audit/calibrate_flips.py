"""How often an audit's verdicts flipped, by their margin: what a service can say beside a verdict."""

from collections.abc import Iterator, Sequence

from offline.audit.record import DECIMALS, Setting
from perception.policy_file import FlipBin
from perception.replay import Answered
from perception.verdict import VerdictLabel

LEAST_IMAGES, MOST_BINS = 20, 10


def flip_bins(setting: Setting, answered: Sequence[Answered]) -> list[FlipBin]:
    """Bins of about equally many images, for each label.

    Only images that are answered rightly when clean take part: of the others an attacker wants nothing.

    Args:
        setting: how the images were attacked.
        answered: under the policy of which the verdicts are.
    """
    bins = []
    for label in (VerdictLabel.SAFE, VerdictLabel.UNSAFE):
        right = [a for a in answered if a.label is label and a.clean.label is label]
        found = sorted((a.clean.margin, a.attacked.label is not label) for a in right if a.clean.margin is not None)
        for (margin_from, margin_to), flips in _quantiles(found):
            bins.append(
                FlipBin(setting.norm, setting.eps, setting.steps, label, margin_from, margin_to, sum(flips), len(flips))
            )
    return bins


def _quantiles(found: Sequence[tuple[float, bool]]) -> Iterator[tuple[tuple[float, float], list[bool]]]:
    """Ranges of margins, each from the end of the one before, and the flips in them; equal margins stay together.

    Args:
        found: (margin, flipped), least margin first.
    """
    least = max(LEAST_IMAGES, -(-len(found) // MOST_BINS))
    start = 0
    while start < len(found):
        end = start + least
        while end < len(found) and found[end][0] == found[end - 1][0]:
            end += 1
        if len(found) - end < least:  # too few for a bin of their own
            end = len(found)
        # Up to and with the largest margin, of which the record holds so many decimals.
        last = found[end][0] if end < len(found) else round(found[-1][0] + 2 * 10.0**-DECIMALS, DECIMALS)
        yield (found[start][0], last), [flipped for _, flipped in found[start:end]]
        start = end
