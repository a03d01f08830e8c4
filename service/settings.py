"""Settings: everything that can be set, read once from HARDLOOK_* environment variables."""

import difflib
import os
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, ValidationError, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from indexer.catalog import CATALOG_FILE
from perception.image import ImageLimits
from perception.verdict import DecisionPolicy
from service.errors import SettingsError
from service.wire import MAX_K

PREFIX = "HARDLOOK_"
# Variables of offline jobs and of the client, which may be set in the same shell.
_FOREIGN = ("HARDLOOK_DATA", "HARDLOOK_URL", "HARDLOOK_API_KEY")
_MIB = 1024 * 1024
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


def _comma_separated(value: object) -> object:
    return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value


def _fraction(value: object) -> object:
    try:
        return float(Fraction(value)) if isinstance(value, str) else value
    except ZeroDivisionError as error:
        raise ValueError(f"{value} has no value") from error


# Of pixels in [0, 1]; '4/255' as well as '0.0157'.
Perturbation = Annotated[float, BeforeValidator(_fraction), Field(gt=0, le=1)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Scope = Literal["classify", "similar", "pools:write", "review", "metrics", "admin"]
Scopes = Annotated[tuple[Scope, ...], NoDecode, BeforeValidator(_comma_separated)]
Hosts = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_comma_separated)]


class Settings(BaseSettings):
    """How the service runs. The variable of a field is HARDLOOK_ and its name in capitals."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="forbid")

    encoder: str = Field(
        "hf-hub:chs20/FARE4-convnext_base_w-laion2B-s13B-b82K-augreg",
        description="Encoder to load; pools must have been built with the same one.",
    )
    precision: Literal["fp32", "bf16"] = Field("fp32", description="Of weights and activations.")
    device: str = Field(
        "auto",
        pattern=r"^(auto|(cpu|cuda(:\d+)?)(,(cpu|cuda(:\d+)?))*)$",
        description="'cpu', 'cuda', 'cuda:0,cuda:1'; 'auto' takes a GPU where there is one.",
    )
    replicas: int = Field(1, ge=1, le=64, description="Batches that run at a time on each device.")
    threads: int = Field(0, ge=0, le=1024, description="Threads of one operation on a CPU; 0 tries out what is best.")
    pools: Path = Field(Path("pools"), description="Folder of published collections.")
    pools_reload_s: Seconds = Field(2.0, description="How often to look for newly published versions.")
    search: Literal["auto", "exact", "fast"] = Field(
        "auto", description="Exact search, or the fast one for large collections; 'auto' goes by their size."
    )
    catalog: str = Field(
        "",
        description="Database of changes, decisions and reviews: 'sqlite:///FILE', 'postgresql://...', or 'off'; by "
        "default catalog.sqlite3 in the folder of the pools.",
    )
    catalog_password_file: Path | None = Field(None, description="Holds the password of that database.")
    catalog_poll_s: Seconds = Field(0.25, description="How often to look for what other processes have changed.")
    compact_after: int = Field(
        5000, ge=100, le=1_000_000, description="Changed exemplars of a collection after which its snapshot is renewed."
    )
    log_decisions: bool = Field(True, description="Keep a record of every verdict in the audit log, without images.")
    traffic_kept: int = Field(
        10_000, ge=0, le=1_000_000, description="Recent verdicts whose embeddings are kept, to try out changes on."
    )
    review_verdicts: bool = Field(True, description="Put images with the verdict 'review' into the review queue.")
    max_open_reviews: int = Field(10_000, ge=1, description="Items that wait for a reviewer.")
    flood_share: float = Field(
        0.2, ge=0, lt=1, description="Share of recent verdicts that one exemplar may suddenly decide; 0 for any."
    )
    flood_least: int = Field(100, ge=1, description="Images that it must have decided before it is suspected.")
    flood_window: int = Field(1000, ge=10, le=100_000, description="Verdicts that count as recent.")
    shadow_encoder: str | None = Field(None, description="Candidate encoder, which sees a share of the images too.")
    shadow_precision: Literal["fp32", "bf16"] = Field("fp32", description="Of the candidate encoder.")
    shadow_pools: Path | None = Field(None, description="Folder of the collections of the candidate encoder.")
    shadow_share: float = Field(1.0, gt=0, le=1, description="Share of the images that candidates see.")
    defense: Literal["none", "ttc"] = Field(
        "none", description="'ttc' counterattacks images before they are encoded: a mitigation that costs a multiple."
    )
    ttc_eps: Perturbation = Field(4 / 255, description="Radius of noise and counterattack, in [0, 1] pixel units.")
    ttc_steps: int = Field(2, ge=1, le=100, description="Steps of the counterattack.")
    ttc_step_size: Perturbation = Field(1 / 255, description="Of one of them, in [0, 1] pixel units.")
    ttc_beta: NotNegative = Field(2.0, description="How much the later steps weigh in the mean of all.")
    ttc_threshold: NotNegative = Field(0.2, description="An image that noise moves by this much gets noise alone.")
    ttc_original: str | None = Field(None, description="Encoder that the one which serves was fine-tuned from.")
    ttc_seed_file: Path | None = Field(None, description="Secret that the noise follows from.")
    ttc_similar: bool = Field(False, description="Defend the image queries of /similar too.")
    ttc_together: int = Field(1, ge=1, le=1024, description="Images that are counterattacked at a time.")
    keep_images: Literal["none", "review", "all"] = Field(
        "none",
        description="Small pictures that are kept: none; of what is in the review queue and of exemplars; of every "
        "image that got a verdict.",
    )
    images: Path | None = Field(None, description="Folder of these pictures; by default .images/ in that of the pools.")
    images_kept_s: Seconds = Field(30 * 86400.0, description="How long those are kept that are no exemplars.")
    images_bytes: int = Field(1024 * _MIB, ge=1, description="Bytes of those; the oldest go first.")
    audits: Path | None = Field(None, description="Folder with run directories of 'hardlook-lab audit', to be shown.")
    console: bool = Field(True, description="Serve the operator's console at /console.")
    console_session_s: Seconds = Field(8 * 3600.0, description="How long a sign-in to the console holds.")
    console_secret_file: Path | None = Field(
        None, description="Secret that sign-ins are signed with, for several instances; by default a random one."
    )
    webhooks_file: Path | None = Field(None, description="Whom to tell of verdicts and changes, a TOML file.")
    moderations_flag_review: bool = Field(True, description="/v1/moderations flags 'review' as it flags 'unsafe'.")
    max_job_images: int = Field(1000, ge=1, le=100_000, description="Images in one job.")
    max_jobs: int = Field(100, ge=1, description="Jobs that wait or run.")
    job_bytes: int = Field(1024 * _MIB, ge=1, description="Bytes of images that wait in jobs.")
    job_concurrency: int = Field(2, ge=1, le=64, description="Images of jobs that are in work at a time.")
    job_results_s: Seconds = Field(7 * 86400.0, description="How long the results of a job are kept.")
    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    shutdown_delay_s: float = Field(
        0.0, ge=0, le=600, description="How long to go on accepting after being told to stop, no longer ready."
    )
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field("INFO", description="Least severe line to log.")

    policy_file: Path | None = Field(None, description="Calibrated policy, in place of the other POLICY settings.")
    policy_rule: Literal["nearest", "vote"] = Field("nearest", description="How neighbours become a verdict.")
    policy_k: int = Field(5, description="Voters of the rule 'vote'.")
    policy_min_similarity: float = Field(-1.0, description="Less similar than this to everything: review.")
    policy_min_margin: float = Field(0.0, description="Safe by less than this: review.")
    policy_min_margin_unsafe: float = Field(0.0, description="Unsafe by less than this: review.")

    max_image_bytes: int = Field(20 * _MIB, ge=1, description="Of one encoded image file.")
    max_body_bytes: int = Field(32 * _MIB, ge=1, description="Of one request body, base64 and multipart included.")
    max_pixels: int = Field(50_000_000, ge=1, description="Width x height of one image.")
    max_frames: int = Field(8, ge=1, le=64, description="Frames that are examined of an animation.")
    max_images_per_request: int = Field(16, ge=1, description="Images in one request.")
    max_neighbors: int = Field(100, ge=1, le=MAX_K, description="The most neighbours that may be asked for.")

    keys_file: Path | None = Field(None, description="API keys, as 'hardlook-serve keys' writes them.")
    anonymous_scopes: Scopes | None = Field(
        None, description="What callers without a key may do; by default nothing, without a keys file classify,similar."
    )
    rate_limit: str = Field(
        "", description="Images in a time that each caller may send, such as '100/second;3000/minute'."
    )
    probing_limit: int = Field(
        30,
        ge=0,
        le=1000,
        description="Near-duplicates from one caller after which its answers are coarse; 0 turns it off.",
    )
    probing_anonymous: bool = Field(
        False, description="Watch callers without a key too, each address as one; many may share an address."
    )
    probing_similarity: float = Field(0.95, gt=0, lt=1, description="Cosine from which images are near-duplicates.")
    probing_window_s: Seconds = Field(600.0, description="How long near-duplicates are remembered.")

    trusted_proxies: Hosts = Field((), description="Addresses of proxies whose X-Forwarded-For is believed.")

    fetch: bool = Field(False, description="Fetch images from URLs in JSON bodies.")
    fetch_http: bool = Field(False, description="Fetch from http:// URLs too.")
    fetch_hosts: Hosts = Field((), description="Hosts, with their subdomains, that may be fetched from; all if empty.")
    fetch_timeout_s: Seconds = Field(5.0, description="For fetching one image, redirects included.")
    fetch_max_redirects: int = Field(3, ge=0, le=10, description="Redirects that are followed.")

    max_batch: int = Field(16, ge=1, description="Frames that the encoder sees at a time.")
    max_queue: int = Field(256, ge=1, description="Frames that wait for the encoder; more are refused with 503.")
    max_requests: int = Field(128, ge=1, description="Requests in progress; more are refused with 503.")
    deadline_s: Seconds = Field(30.0, description="For one answer, and for one body to arrive.")

    decode_workers: int = Field(
        default_factory=lambda: min(4, os.cpu_count() or 1), ge=1, description="Decoding processes; by default 1 to 4."
    )
    decode_timeout_s: Seconds = Field(4.0, description="For decoding one image.")
    decode_memory_bytes: int = Field(1536 * _MIB, ge=64 * _MIB, description="For decoding one image.")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        given = [name for name in sorted(self.model_fields_set) if name.startswith("policy_") and name != "policy_file"]
        if self.policy_file is not None and given:
            raise ValueError(
                f"{variable('policy_file')} holds a whole policy: do not set {', '.join(map(variable, given))} as well"
            )
        try:
            _ = self.policy
        except ValueError as error:  # names its parameter without our prefix
            raise ValueError(f"{variable('policy_*')}: {error}") from error
        unused = [name for name in sorted(self.model_fields_set) if name.startswith("ttc_")]
        if self.defense != "ttc" and unused:
            names = ", ".join(map(variable, unused))
            raise ValueError(f"{names} set what does not happen: {variable('defense')} is {self.defense!r}")
        if (self.shadow_encoder is None) != (self.shadow_pools is None):
            raise ValueError(f"{variable('shadow_encoder')} and {variable('shadow_pools')} go together")
        if self.max_queue < max(self.max_batch, 2 * self.max_frames):
            raise ValueError(
                f"MAX_QUEUE {self.max_queue} must hold one batch (MAX_BATCH {self.max_batch}) and one animation on two "
                f"backgrounds (2 x MAX_FRAMES {self.max_frames})"
            )
        return self

    @property
    def policy(self) -> DecisionPolicy:
        """The decision rule and its parameters, where there is no `policy_file`."""
        return DecisionPolicy(
            self.policy_rule,
            self.policy_k,
            self.policy_min_similarity,
            self.policy_min_margin,
            self.policy_min_margin_unsafe,
        )

    @property
    def catalog_url(self) -> str | None:
        """Where the catalogue is; None where it is turned off."""
        if self.catalog == "off":
            return None
        return self.catalog or f"sqlite:///{self.pools / CATALOG_FILE}"

    @property
    def image_limits(self) -> ImageLimits:
        """What one image may cost."""
        return ImageLimits(max_bytes=self.max_image_bytes, max_pixels=self.max_pixels, max_frames=self.max_frames)


def variable(field: str) -> str:
    """The environment variable of a field."""
    return PREFIX + field.upper()


def read_settings(environment: Mapping[str, str]) -> Settings:
    """Read the settings from the environment of this process.

    Args:
        environment: `os.environ`; names are taken from it, values by pydantic-settings from the same place.

    Raises:
        SettingsError: an unknown HARDLOOK_ variable, which pydantic-settings would ignore, or a value that does not
            fit; names the variable.
    """
    known = {variable(field) for field in Settings.model_fields}
    for name in environment:
        if name.upper().startswith(PREFIX) and name.upper() not in known and name.upper() not in _FOREIGN:
            nearest = difflib.get_close_matches(name.upper(), sorted(known), n=1, cutoff=0.0)
            raise SettingsError(f"unknown setting {name}; the nearest known one is {nearest[0]}")
    try:
        return Settings()
    except ValidationError as error:
        reasons = [
            f"{variable(str(e['loc'][0])) + ': ' if e['loc'] else ''}{e['msg'].removeprefix('Value error, ')}"
            for e in error.errors(include_url=False)
        ]
        raise SettingsError("; ".join(reasons)) from error
