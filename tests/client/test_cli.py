"""The command line: every exit code, resumption, lists, interruption, and what goes wrong on the way."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from service.client.bulk import GIVE_UP_AFTER
from service.client.cli import main
from service.client.commands.options import ALL_ANSWERED, NOT_DONE, SOME_ERRORS, VERDICT_FOUND
from tests.client.conftest import Guarded
from tests.client.scripted import CUT, HANG, pools, problem, response, scripted, verdicts

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-c", "from service.client.cli import main; main()"]
VERSIONS = {"model", "snapshot", "policy", "request_id"}


def run(*tokens: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(token) for token in tokens])
    assert isinstance(ended.value.code, int)
    return ended.value.code


def records(text: str) -> dict[str, dict[str, Any]]:
    return {record["path"]: record for record in map(json.loads, text.splitlines())}


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HARDLOOK_URL", raising=False)
    monkeypatch.delenv("HARDLOOK_API_KEY", raising=False)


# --- classify --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("per_request", [1, 2, 4])
def test_0_a_folder_is_answered(
    service: str, images: dict[str, Path], capsys: pytest.CaptureFixture[str], per_request: int
) -> None:
    folder = images["safe"].parent
    assert run("classify", folder, "--url", service, "--per-request", per_request) == ALL_ANSWERED
    printed = capsys.readouterr()
    found = records(printed.out)
    assert {path: record["verdict"] for path, record in found.items()} == {
        str(images["safe"]): "safe",
        str(images["buffer"]): "review",
        str(images["unsafe"]): "unsafe",
    }
    for record in found.values():
        assert record.keys() == {"path", "status", "verdict", "pool", "margin", "reason", "detail"} | VERSIONS
    assert printed.err == "1 review, 1 safe, 1 unsafe\n"


def test_0_no_images(service: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("classify", tmp_path, "--url", service) == ALL_ANSWERED
    assert capsys.readouterr().err == "no images\n"


@pytest.mark.parametrize("per_request", [1, 4])
def test_1_bad_images_have_errors_and_stop_nothing(
    service: str, images: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], per_request: int
) -> None:
    shutil.copy(images["safe"], tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"no image")
    (tmp_path / "broken.png").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "loop").symlink_to(".")
    arguments = (tmp_path, "missing.png", "--url", service, "--per-request", per_request)
    assert run("classify", *arguments, "--fail-on", "unsafe") == SOME_ERRORS
    printed = capsys.readouterr()
    found = records(printed.out)
    assert found.pop(str(tmp_path / "good.png"))["verdict"] == "safe"
    assert {Path(path).name: record["error"]["type"] for path, record in found.items()} == {
        "bad.png": "urn:hardlook:problem:unsupported-format",
        "broken.png": "urn:hardlook:client:unreadable",
        "pipe.png": "urn:hardlook:client:unreadable",
        "missing.png": "urn:hardlook:client:unreadable",
    }
    assert not any("verdict" in record for record in found.values())
    assert printed.err == "1 safe, 4 errors\n1 linked folders were not followed\n"


def test_3_a_verdict_of_fail_on(service: str, images: dict[str, Path], tmp_path: Path) -> None:
    given = ("classify", images["unsafe"], "missing.png", "--url", service)
    assert run(*given, "--fail-on", "unsafe,review") == VERDICT_FOUND
    assert run(*given, "--fail-on", "review") == SOME_ERRORS
    output = tmp_path / "out.jsonl"
    assert run("classify", images["unsafe"], "--url", service, "--output", output) == ALL_ANSWERED
    resumed = ("classify", images["unsafe"], "--url", service, "--output", output)
    assert run(*resumed, "--fail-on", "unsafe") == VERDICT_FOUND
    assert run(*resumed, "--fail-on", "safe") == ALL_ANSWERED


@pytest.mark.parametrize(
    ("tokens", "reason"),
    [
        ((), "name files"),
        (("x", "--fail-on", "bad"), "--fail-on takes"),
        (("x", "--concurrency", "0"), "--concurrency"),
        (("x", "--per-request", "0"), "--per-request"),
        (("x", "--format", "table", "--output", "o"), "--format"),
        (("x", "--api-key", "hlk_secret"), "--api-key"),
        (("x", "--api-key-file", "missing"), "missing"),
        (("x", "--ca-file", "missing"), "No such file"),
        (("x", "--url", "example.org"), "base_url"),
        (("x", "--timeout", "0"), "timeout_s"),
        (("x", "--url", "http://127.0.0.1:9"), "no answer"),
    ],
)
def test_2_what_cannot_start(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tokens: tuple[str, ...],
    reason: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("classify", *tokens) == NOT_DONE
    error = capsys.readouterr().err
    assert reason in error
    assert error.count("\n") == 1


def test_2_a_refused_key_is_said_once(
    guarded: Guarded, images: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ("classify", images["safe"].parent, "--url", guarded.url)
    assert run(*given) == NOT_DONE
    assert "401" in capsys.readouterr().err
    key = tmp_path / "key"
    key.write_text(guarded.keys["metrics"] + "\n")
    assert run(*given, "--api-key-file", key) == NOT_DONE
    printed = capsys.readouterr()
    assert (printed.out, "403" in printed.err) == ("", True)
    key.write_text("\n")
    assert run(*given, "--api-key-file", key) == NOT_DONE
    assert "holds no API key" in capsys.readouterr().err


def test_keys_come_from_a_file_or_the_environment(
    guarded: Guarded, images: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HARDLOOK_URL", guarded.url)
    monkeypatch.setenv("HARDLOOK_API_KEY", guarded.keys["classify"])
    assert run("classify", images["safe"]) == ALL_ANSWERED
    monkeypatch.setenv("HARDLOOK_API_KEY", "wrong")
    (tmp_path / "key").write_text(guarded.keys["classify"] + "\n")
    assert run("classify", images["safe"], "--api-key-file", tmp_path / "key") == ALL_ANSWERED
    assert run("classify", images["safe"]) == NOT_DONE


def test_a_table_for_people(service: str, images: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert run("classify", images["unsafe"], "missing", "--url", service, "--format", "table") == SOME_ERRORS
    lines = sorted(capsys.readouterr().out.splitlines())
    assert lines[0].split()[:2] == ["error", "missing:"]
    assert (lines[1].split()[0], lines[1].split()[-1]) == ("unsafe", str(images["unsafe"]))


# --- output files ----------------------------------------------------------------------------------------------------


def test_output_resumes_with_what_has_no_answer(
    service: str, images: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, output = tmp_path / "images", tmp_path / "out.jsonl"
    shutil.copytree(images["safe"].parent, folder)
    (folder / "late.png").write_bytes(b"not yet")
    given = ("classify", folder, "--url", service, "--output", output)
    assert run(*given) == SOME_ERRORS
    first = records(output.read_text())
    assert capsys.readouterr().out == ""
    shutil.copy(images["safe"], folder / "late.png")
    lines = output.read_bytes().splitlines(keepends=True)
    cut = next(line for line in lines if b"unsafe.png" in line)
    lines.remove(cut)
    output.write_bytes(b"".join(lines) + cut[: len(cut) // 2])
    assert run(*given) == ALL_ANSWERED
    assert capsys.readouterr().err == "1 safe, 1 unsafe, 2 skipped\n"
    second = records(output.read_text())
    assert {record["status"] for record in second.values()} == {"ok"}
    assert second[str(folder / "safe.png")] == first[str(folder / "safe.png")]
    assert len(second) == 4


def test_2_an_output_that_is_something_else(
    service: str, images: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photo = tmp_path / "photo.png"
    shutil.copy(images["safe"], photo)
    assert run("classify", images["unsafe"], "--url", service, "--output", photo) == NOT_DONE
    assert "nothing was changed" in capsys.readouterr().err
    assert photo.read_bytes() == images["safe"].read_bytes()
    assert run("classify", images["unsafe"], "--url", service, "--output", tmp_path / "none" / "o") == NOT_DONE


# --- a service that misbehaves ---------------------------------------------------------------------------------------


def test_a_busy_service_is_waited_for(images: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    busy = 3 * [problem(503, retry_after="0")]
    with scripted(pools=[busy[0], pools()], classify=[*busy, verdicts("safe")]) as server:
        assert run("classify", images["safe"], "--url", server.url) == ALL_ANSWERED
    assert records(capsys.readouterr().out)[str(images["safe"])]["verdict"] == "safe"


def test_an_answer_that_is_none_is_an_error_of_its_image(
    images: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    with scripted(pools=[pools()], classify=[response(200, b"{}"), verdicts("safe")]) as server:
        given = ("classify", *images.values(), "--url", server.url, "--concurrency", 1)
        assert run(*given) == SOME_ERRORS
    found = list(records(capsys.readouterr().out).values())
    assert [record["status"] for record in found] == ["error", "ok", "ok"]
    assert found[0]["error"]["type"] == "urn:hardlook:client:answer-not-understood"


@pytest.mark.parametrize("reply", [response(500, b"<html>", "text/html"), response(302, b"", location="http://a/")])
def test_2_a_service_that_is_gone_ends_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], reply: bytes
) -> None:
    for i in range(2 * GIVE_UP_AFTER):
        (tmp_path / f"{i:03}.png").write_bytes(b"x")
    with scripted(pools=[pools()], classify=[verdicts("safe"), reply]) as server:
        assert run("classify", tmp_path, "--url", server.url, "--concurrency", 1) == NOT_DONE
        assert len(server.of("/classify")) == 1 + GIVE_UP_AFTER
    printed = capsys.readouterr()
    assert len(printed.out.splitlines()) == 1 + GIVE_UP_AFTER
    assert f"broken off: 1 safe, {GIVE_UP_AFTER} errors\n" in printed.err


def test_no_answer_within_the_timeout_is_an_error(images: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    with scripted(pools=[pools()], classify=[CUT]) as server:
        assert run("classify", images["safe"], "--url", server.url, "--timeout", 0.5) == SOME_ERRORS
        assert len(server.of("/classify")) > 1
    [record] = records(capsys.readouterr().out).values()
    assert record["error"]["type"] == "urn:hardlook:client:no-answer"


# --- in a process of its own -----------------------------------------------------------------------------------------


def start(*tokens: object, **options: Any) -> "subprocess.Popen[str]":
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}

    def heed_interrupts() -> None:  # which are ignored in what a shell has put in the background
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    return subprocess.Popen(
        [*COMMAND, *map(str, tokens)], cwd=ROOT, text=True, preexec_fn=heed_interrupts, **(pipes | options)
    )


def test_lists_from_stdin(service: str, images: dict[str, Path]) -> None:
    with start("classify", "--list", "-", "--url", service) as process:
        out, err = process.communicate("".join(f"{path}\n" for path in images.values()) + "https://example.org/a.png\n")
    found = records(out)
    assert (process.returncode, len(found)) == (SOME_ERRORS, 4)
    assert found["https://example.org/a.png"]["error"]["type"] == "urn:hardlook:problem:fetch-disabled"
    assert err == "1 review, 1 safe, 1 unsafe, 1 errors\n"


def test_2_an_interrupt_keeps_what_was_answered(images: dict[str, Path], tmp_path: Path) -> None:
    """With an answer written, one awaited, and stdin still open."""
    output = tmp_path / "out.jsonl"
    with scripted(pools=[pools()], classify=[verdicts("safe"), HANG]) as server:
        given = ("classify", "--list", "-", "--url", server.url, "--concurrency", 1, "--output", output)
        with start(*given) as process:
            assert process.stdin is not None
            process.stdin.write(f"{images['safe']}\n{images['unsafe']}\n")
            process.stdin.flush()
            assert server.hanging.wait(30)
            process.send_signal(signal.SIGINT)
            assert process.wait(10) == NOT_DONE
            assert process.stderr is not None
            assert process.stderr.read() == "broken off: 1 safe\nhardlook: interrupted\n"
    assert list(records(output.read_text())) == [str(images["safe"])]


def test_2_nobody_reads_the_output(images: dict[str, Path]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with (
        scripted(pools=[pools()], classify=[verdicts("safe")]) as server,
        start("classify", *images.values(), "--url", server.url, stdout=writing) as process,
    ):
        os.close(writing)
        _, err = process.communicate()
    assert process.returncode == NOT_DONE
    assert "the output cannot be written: Broken pipe" in err
    assert "Traceback" not in err


# --- the other commands ----------------------------------------------------------------------------------------------


def test_similar(service: str, images: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    given = ("similar", images["unsafe"], "--pool", "unsafe", "--k", 1, "--url", service)
    assert run(*given) == ALL_ANSWERED
    record = records(capsys.readouterr().out)[str(images["unsafe"])]
    assert record.keys() == {"path", "status", "neighbors", "detail"} | VERSIONS
    assert [near["id"] for near in record["neighbors"]] == ["unsafe-0"]
    assert run(*given, "--format", "table") == ALL_ANSWERED
    assert "unsafe-0" in capsys.readouterr().out
    assert run("similar", images["safe"], "--gallery", "none", "--url", service) == NOT_DONE
    assert "no published gallery" in capsys.readouterr().err


def test_similar_to_a_text(service: str, images: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert run("similar", "--text", "a dog", "--k", 2, "--min-similarity", -1, "--url", service) == ALL_ANSWERED
    record = json.loads(capsys.readouterr().out)
    assert (record["path"], len(record["neighbors"])) == (None, 2)
    assert run("similar", images["safe"], "--text", "a dog", "--url", service) == NOT_DONE
    assert run("similar", "--text", "a dog", "--gallery", "none", "--url", service) == NOT_DONE


def test_pools(service: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("pools", "--url", service) == ALL_ANSWERED
    assert "3 buffer, 3 safe, 3 unsafe" in capsys.readouterr().out
    assert run("pools", "--url", service, "--format", "jsonl") == ALL_ANSWERED
    assert json.loads(capsys.readouterr().out)["collections"][0]["name"] == "pools"


def test_ready(service: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("ready", "--url", service) == ALL_ANSWERED
    assert run("ready", "--url", "http://127.0.0.1:9") == SOME_ERRORS
    assert run("ready", "--url", "http://127.0.0.1:9", "--wait", "0.1") == SOME_ERRORS
    assert run("ready", "--url", "nowhere") == NOT_DONE
    assert capsys.readouterr().out == "ready\nnot ready\nnot ready\n"


def test_ready_waits() -> None:
    body = {
        "status": "ready",
        "model": {"name": "toy", "fingerprint": "f", "precision": "fp32"},
        "snapshot": {"collection": "pools", "version": "1", "created_at": "2026-01-01T00:00:00+00:00"},
    }
    with scripted(readyz=[problem(503, "not-ready"), response(200, json.dumps(body).encode())]) as server:
        assert run("ready", "--url", server.url, "--wait", 30) == ALL_ANSWERED
        assert len(server.received) == 2
