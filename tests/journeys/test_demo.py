"""The demo is what a new user sees first: it must run, and fail when the service answers wrongly."""

from pathlib import Path

import pytest

from service import demo


@pytest.mark.slow
def test_the_demo_runs_and_says_what_it_did(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        demo.main([])
    out = capfd.readouterr().out
    assert ended.value.code == 0, out
    assert "bundled/fare4, chosen explicitly" in out
    assert "WRONG" not in out
    assert "everything was answered as it must be" in out


@pytest.mark.slow
def test_a_wrong_answer_is_counted_and_ends_the_demo_with_1(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    sample = next(iter(demo.samples()))
    wrong = demo.Sample(sample.name, sample.guise, sample.file, "safe")
    monkeypatch.setattr(demo, "samples", lambda: iter([wrong]))
    with pytest.raises(SystemExit) as ended:
        demo.main([])
    assert ended.value.code == 1
    assert "WRONG" in capfd.readouterr().out


def test_prepare_only_publishes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    demo.main(["--prepare", str(tmp_path)])
    assert (tmp_path / "pools" / "CURRENT").is_file()
    assert "published the demo pools" in capsys.readouterr().out
