"""hardlook-serve: a start that fails is one line on stderr and exit code 2."""

import os
from pathlib import Path

import pytest

import service.request_log
import service.startup
from perception.policy_file import CalibratedPolicy
from perception.testing import ToyEncoder
from service.cli import main
from service.testing import publish, toy_pools
from tests.perception.calibrated_policies import a_policy


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in list(os.environ):
        if name.upper().startswith("HARDLOOK_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HARDLOOK_POOLS", str(tmp_path))
    monkeypatch.setattr(service.request_log, "configure_logging", lambda level: None)


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    [line] = captured.err.splitlines()
    assert line.startswith("hardlook-serve: ")
    return line


def test_unknown_setting(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("HARDLOOK_MAX_PIXEL", "1")
    assert "nearest known one is HARDLOOK_MAX_PIXELS" in refusal(capsys)


def test_bad_value(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("HARDLOOK_PORT", "eighty")
    assert "HARDLOOK_PORT" in refusal(capsys)


def test_arguments_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--port" in refusal(capsys, "--port", "80")


def test_unknown_encoder(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("HARDLOOK_ENCODER", "resnet")
    assert "unknown encoder 'resnet'" in refusal(capsys)


def test_encoder_without_its_files(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("HARDLOOK_ENCODER", f"local-dir:{tmp_path / 'absent'}")
    assert "absent" in refusal(capsys)


def test_snapshot_of_another_encoder(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    built_with, serving = ToyEncoder(seed=1), ToyEncoder(seed=0)
    publish(tmp_path, built_with, toy_pools())
    monkeypatch.setattr(service.startup, "_load_encoder", lambda settings, device: serving)
    line = refusal(capsys)
    assert built_with.fingerprint in line
    assert serving.fingerprint in line


def test_damaged_snapshot(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    publish(tmp_path, ToyEncoder(), toy_pools())
    [manifest] = tmp_path.glob("pools/versions/*/manifest.json")
    manifest.write_text(manifest.read_text().replace("toy/0", "toy/9"))
    monkeypatch.setattr(service.startup, "_load_encoder", lambda settings, device: ToyEncoder())
    assert "damaged" in refusal(capsys)


def policy_file(monkeypatch: pytest.MonkeyPatch, path: Path, policy: CalibratedPolicy) -> None:
    policy.save(path)
    monkeypatch.setenv("HARDLOOK_POLICY_FILE", str(path))
    monkeypatch.setattr(service.startup, "_load_encoder", lambda settings, device: ToyEncoder())


def test_policy_of_another_encoder(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    policy_file(monkeypatch, tmp_path / "policy.json", a_policy())
    line = refusal(capsys)
    assert "policy.json was made by encoder an encoder" in line
    assert ToyEncoder().fingerprint in line


def test_changed_policy(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "policy.json"
    policy_file(monkeypatch, path, a_policy(encoder_fingerprint=ToyEncoder().fingerprint))
    path.write_text(path.read_text().replace('"min_margin": 0.05', '"min_margin": 0.0'))
    line = refusal(capsys)
    assert "policy.json" in line
    assert "changed since it was written" in line


def test_damaged_policy(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "policy.json"
    policy_file(monkeypatch, path, a_policy())
    path.write_bytes(path.read_bytes()[:100])
    assert "cannot read policy" in refusal(capsys)
    path.write_text('{"format": "hardlook-policy-1", "content": {}}')  # of which pydantic says more than a line
    assert "cannot read policy" in refusal(capsys)


def test_absent_policy(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    monkeypatch.setenv("HARDLOOK_POLICY_FILE", str(tmp_path / "absent.json"))
    assert "absent.json" in refusal(capsys)


def test_policy_beside_its_parameters(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("HARDLOOK_POLICY_FILE", "policy.json")
    monkeypatch.setenv("HARDLOOK_POLICY_K", "3")
    line = refusal(capsys)
    assert "HARDLOOK_POLICY_FILE" in line
    assert "HARDLOOK_POLICY_K" in line


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert not caught.value.code
    assert "HARDLOOK_" in capsys.readouterr().out
