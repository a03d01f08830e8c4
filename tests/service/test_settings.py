"""Settings: a wrong variable or value is one clear error, and never a silent default."""

import os
from pathlib import Path

import pytest

from perception.verdict import DecisionPolicy
from service.errors import SettingsError
from service.settings import Settings, read_settings, variable

# What each variable is set to.
VALUES = {
    "encoder": "bundled/clean",
    "precision": "bf16",
    "device": "cpu",
    "pools": "elsewhere",
    "pools_reload_s": "1.5",
    "host": "0.0.0.0",
    "port": "0",
    "log_level": "WARNING",
    "policy_rule": "vote",
    "policy_k": "7",
    "policy_min_similarity": "0.1",
    "policy_min_margin": "0.2",
    "policy_min_margin_unsafe": "0.3",
    "max_image_bytes": "11",
    "max_body_bytes": "12",
    "max_pixels": "13",
    "max_frames": "14",
    "max_images_per_request": "15",
    "max_neighbors": "16",
    "max_batch": "17",
    "max_queue": "180",
    "max_requests": "19",
    "deadline_s": "20.5",
    "decode_workers": "21",
    "decode_timeout_s": "22.5",
    "decode_memory_bytes": "123456789",
    "replicas": "2",
    "threads": "3",
    "shutdown_delay_s": "23.5",
    "keys_file": "keys.json",
    "rate_limit": "5/second",
    "probing_limit": "24",
    "probing_anonymous": "True",
    "probing_similarity": "0.9",
    "probing_window_s": "25.5",
    "fetch": "True",
    "fetch_http": "True",
    "fetch_timeout_s": "26.5",
    "fetch_max_redirects": "2",
    "search": "fast",
    "catalog": "sqlite:///elsewhere.sqlite3",
    "catalog_password_file": "password",
    "catalog_poll_s": "0.5",
    "compact_after": "270",
    "log_decisions": "False",
    "traffic_kept": "28",
    "review_verdicts": "False",
    "max_open_reviews": "29",
    "flood_share": "0.3",
    "flood_least": "30",
    "flood_window": "310",
    "shadow_encoder": "bundled/fare4",
    "shadow_precision": "bf16",
    "shadow_pools": "candidates",
    "shadow_share": "0.5",
    "keep_images": "all",
    "images": "pictures",
    "images_kept_s": "311.5",
    "images_bytes": "312",
    "audits": "audits",
    "console": "False",
    "console_session_s": "313.5",
    "console_secret_file": "secret",
    "webhooks_file": "webhooks.toml",
    "moderations_flag_review": "False",
    "max_job_images": "32",
    "max_jobs": "33",
    "job_bytes": "34",
    "job_concurrency": "35",
    "job_results_s": "36.5",
    "defense": "ttc",
    "ttc_eps": "0.01",
    "ttc_steps": "3",
    "ttc_step_size": "0.002",
    "ttc_beta": "1.5",
    "ttc_threshold": "0.25",
    "ttc_original": "bundled/clean",
    "ttc_seed_file": "seed",
    "ttc_similar": "True",
    "ttc_together": "4",
}


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.upper().startswith("HARDLOOK_"):
            monkeypatch.delenv(name)


def test_defaults_are_the_production_model_and_the_paper_s_rule() -> None:
    settings = read_settings(os.environ)
    assert settings.encoder == "hf-hub:chs20/FARE4-convnext_base_w-laion2B-s13B-b82K-augreg"
    assert settings.policy == DecisionPolicy()
    assert settings.host == "127.0.0.1"
    assert 1 <= settings.decode_workers <= 4


def test_every_field_is_read_from_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    lists = {"anonymous_scopes", "trusted_proxies", "fetch_hosts"}
    assert VALUES.keys() == Settings.model_fields.keys() - {"policy_file"} - lists  # the file stands in place of others
    for field, value in VALUES.items():
        monkeypatch.setenv(variable(field), value)
    settings = read_settings(os.environ)
    for field, value in VALUES.items():
        assert str(getattr(settings, field)) == value, field
    assert settings.policy == DecisionPolicy("vote", 7, 0.1, 0.2, 0.3)
    assert (settings.image_limits.max_bytes, settings.image_limits.max_pixels, settings.image_limits.max_frames) == (
        11,
        13,
        14,
    )
    assert settings.pools == Path("elsewhere")


def test_a_policy_file_is_a_path(monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_settings(os.environ).policy_file is None
    monkeypatch.setenv("HARDLOOK_POLICY_FILE", "folder/policy.json")
    assert read_settings(os.environ).policy_file == Path("folder/policy.json")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("HARDLOOK_POLICY_RULE", "nearest"),  # the default, but set
        ("HARDLOOK_POLICY_K", "3"),
        ("HARDLOOK_POLICY_MIN_SIMILARITY", "0.1"),
        ("HARDLOOK_POLICY_MIN_MARGIN", "0"),
        ("HARDLOOK_POLICY_MIN_MARGIN_UNSAFE", "0.1"),
    ],
)
def test_a_policy_file_and_a_parameter_contradict_each_other(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv("HARDLOOK_POLICY_FILE", "policy.json")
    monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError, match=f"^HARDLOOK_POLICY_FILE .* {name} as well$"):
        read_settings(os.environ)


@pytest.mark.parametrize(
    ("typo", "nearest"),
    [
        ("HARDLOOK_ENCODR", "HARDLOOK_ENCODER"),
        ("HARDLOOK_MAXPIXELS", "HARDLOOK_MAX_PIXELS"),
        ("hardlook_pool", "HARDLOOK_POOLS"),
        ("HARDLOOK_DATA_", "HARDLOOK_"),
        ("HARDLOOK_", "HARDLOOK_"),
    ],
)
def test_an_unknown_variable_is_refused_and_the_nearest_named(
    monkeypatch: pytest.MonkeyPatch, typo: str, nearest: str
) -> None:
    monkeypatch.setenv(typo, "x")
    with pytest.raises(SettingsError, match=f"unknown setting {typo}; the nearest known one is {nearest}"):
        read_settings(os.environ)


def test_variables_of_offline_jobs_are_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HARDLOOK_DATA", "somewhere")
    read_settings(os.environ)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("HARDLOOK_PORT", "x"),
        ("HARDLOOK_PORT", ""),
        ("HARDLOOK_PORT", "65536"),
        ("HARDLOOK_PRECISION", "fp16"),
        ("HARDLOOK_DEVICE", "tpu"),
        ("HARDLOOK_DEADLINE_S", "0"),
        ("HARDLOOK_DEADLINE_S", "nan"),
        ("HARDLOOK_DECODE_TIMEOUT_S", "inf"),
        ("HARDLOOK_DECODE_MEMORY_BYTES", "1000"),
        ("HARDLOOK_MAX_FRAMES", "0"),
        ("HARDLOOK_MAX_NEIGHBORS", "1001"),
        ("HARDLOOK_DECODE_WORKERS", "0"),
        ("HARDLOOK_LOG_LEVEL", "verbose"),
        ("HARDLOOK_SEARCH", "best"),
        ("HARDLOOK_COMPACT_AFTER", "99"),
        ("HARDLOOK_CATALOG_POLL_S", "0"),
        ("HARDLOOK_LOG_DECISIONS", "perhaps"),
        ("HARDLOOK_TRAFFIC_KEPT", "-1"),
        ("HARDLOOK_FLOOD_SHARE", "1"),
        ("HARDLOOK_FLOOD_SHARE", "nan"),
        ("HARDLOOK_FLOOD_WINDOW", "9"),
        ("HARDLOOK_SHADOW_SHARE", "0"),
        ("HARDLOOK_MAX_JOB_IMAGES", "100001"),
        ("HARDLOOK_JOB_CONCURRENCY", "0"),
        ("HARDLOOK_JOB_RESULTS_S", "inf"),
    ],
)
def test_a_value_that_does_not_fit_names_its_variable(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError, match=f"^{name}: "):
        read_settings(os.environ)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("HARDLOOK_POLICY_RULE", "guess", "HARDLOOK_POLICY_RULE"),
        ("HARDLOOK_POLICY_K", "0", "k must be at least 1"),
        ("HARDLOOK_POLICY_MIN_SIMILARITY", "1.5", "min_similarity"),
        ("HARDLOOK_POLICY_MIN_MARGIN", "-1", "min_margin"),
        ("HARDLOOK_POLICY_MIN_MARGIN", "nan", "min_margin"),
        ("HARDLOOK_POLICY_MIN_MARGIN_UNSAFE", "3", "min_margin_unsafe"),
        ("HARDLOOK_MAX_QUEUE", "8", "MAX_QUEUE"),
        ("HARDLOOK_MAX_FRAMES", "60", "MAX_QUEUE"),
        ("HARDLOOK_SHADOW_ENCODER", "bundled/fare4", "HARDLOOK_SHADOW_ENCODER and HARDLOOK_SHADOW_POOLS go together"),
        ("HARDLOOK_SHADOW_POOLS", "candidates", "HARDLOOK_SHADOW_ENCODER and HARDLOOK_SHADOW_POOLS go together"),
    ],
)
def test_values_that_do_not_fit_together(monkeypatch: pytest.MonkeyPatch, name: str, value: str, said: str) -> None:
    monkeypatch.setenv(name, value)
    if name == "HARDLOOK_MAX_FRAMES":
        monkeypatch.setenv("HARDLOOK_MAX_QUEUE", "100")
    with pytest.raises(SettingsError, match=said):
        read_settings(os.environ)


@pytest.mark.parametrize(
    ("value", "url"),
    [
        (None, "sqlite:///elsewhere/catalog.sqlite3"),
        ("", "sqlite:///elsewhere/catalog.sqlite3"),
        ("postgresql://db/hardlook", "postgresql://db/hardlook"),
        ("off", None),
    ],
)
def test_the_catalogue_is_with_the_pools_unless_said_otherwise(
    monkeypatch: pytest.MonkeyPatch, value: str | None, url: str | None
) -> None:
    monkeypatch.setenv("HARDLOOK_POOLS", "elsewhere")
    if value is not None:
        monkeypatch.setenv("HARDLOOK_CATALOG", value)
    assert read_settings(os.environ).catalog_url == url


def test_settings_do_not_change() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Settings().port = 1  # type: ignore[misc]


def test_lists_are_separated_by_commas(monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_settings(os.environ).anonymous_scopes is None
    monkeypatch.setenv("HARDLOOK_ANONYMOUS_SCOPES", "classify, pools:write")
    monkeypatch.setenv("HARDLOOK_TRUSTED_PROXIES", "10.0.0.1")
    monkeypatch.setenv("HARDLOOK_FETCH_HOSTS", " cdn.example.org,,example.com ")
    settings = read_settings(os.environ)
    assert settings.anonymous_scopes == ("classify", "pools:write")
    assert settings.trusted_proxies == ("10.0.0.1",)
    assert settings.fetch_hosts == ("cdn.example.org", "example.com")
    monkeypatch.setenv("HARDLOOK_ANONYMOUS_SCOPES", "")
    assert read_settings(os.environ).anonymous_scopes == ()
    monkeypatch.setenv("HARDLOOK_ANONYMOUS_SCOPES", "classify,everything")
    with pytest.raises(SettingsError, match="HARDLOOK_ANONYMOUS_SCOPES"):
        read_settings(os.environ)


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda", "cuda:3", "cuda:0,cuda:1", "cpu,cuda"])
def test_devices(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    monkeypatch.setenv("HARDLOOK_DEVICE", device)
    assert read_settings(os.environ).device == device


@pytest.mark.parametrize("device", ["", "gpu", "cuda:", "cuda:x", "auto,cpu", "cpu,", "cuda:0 cuda:1"])
def test_what_is_no_device(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    monkeypatch.setenv("HARDLOOK_DEVICE", device)
    with pytest.raises(SettingsError, match="HARDLOOK_DEVICE"):
        read_settings(os.environ)


def test_variables_of_the_client_and_of_offline_jobs_are_no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HARDLOOK_DATA", "HARDLOOK_URL", "HARDLOOK_API_KEY"):
        monkeypatch.setenv(name, "x")
    read_settings(os.environ)
