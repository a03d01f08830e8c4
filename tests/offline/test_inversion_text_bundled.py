"""Text inversion with the encoders that ship with the package: short, but the real thing."""

from pathlib import Path

import pytest

from offline.errors import PlanError
from offline.inversion.texts import TextPlan, TextSources, invert_texts

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SOURCES = TextSources(("school bus", "bison", "goldfish"), "a photo of a {}")


def test_a_robust_encoders_picture_is_recognised_by_the_clean_one(tmp_path: Path) -> None:
    plan = TextPlan(("bundled/fare4", "bundled/clean"), steps=25, batch=3)
    found = invert_texts(plan, SOURCES, tmp_path)
    by_pair = {(entry.encoder, entry.judge): entry for entry in found.cross}
    for encoder in plan.encoders:
        assert by_pair[encoder, encoder].recognised == 3
    for record in found.results.records:
        assert record.similarity > record.start_similarity + 0.1
        assert record.radius == pytest.approx(100 * 128 / 224)
        assert record.distance <= 100 * 128 / 224 + 1e-3
    # What the robust one draws means something to the clean one; what the clean one draws means less to the robust one.
    assert by_pair["bundled/fare4", "bundled/clean"].similarity > by_pair["bundled/clean", "bundled/fare4"].similarity
    assert by_pair["bundled/fare4", "bundled/clean"].recognised >= 2


def test_views_reach_a_text_too(tmp_path: Path) -> None:
    plan = TextPlan(("bundled/fare4",), optimiser="multi-view", steps=8, views=3)
    found = invert_texts(plan, TextSources(SOURCES.texts[:1], SOURCES.template), tmp_path)
    (record,) = found.results.records
    assert record.similarity > record.start_similarity + 0.1
    assert record.radius is None


def test_a_bundled_encoder_without_a_text_tower_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"1 of 2 have none: bundled/lipsim cannot read text"):
        invert_texts(TextPlan(("bundled/clean", "bundled/lipsim")), SOURCES, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_upper_case_is_the_same_text_to_clips_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"bundled/clean reads 'bison' and 'Bison' as the same text"):
        invert_texts(TextPlan(("bundled/clean",)), TextSources(("bison", "Bison")), tmp_path / "run")
