"""Start-up: settings in, everything that answers requests out. Everything is put together here and nowhere else."""

import logging
from collections.abc import Iterable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version

from sqlalchemy import make_url
from sqlalchemy.exc import ArgumentError

from indexer.backends.choice import build_index
from indexer.catalog.database import Database
from indexer.catalog.ledger import Catalog
from indexer.catalog.state import Stamp
from indexer.contents import POOLS
from perception.certificates import FeatureBound, feature_bound
from perception.errors import NonFiniteEmbedding
from perception.policy_file import CalibratedPolicy
from perception.verdict import DecisionPolicy
from service.admission import Admission
from service.audit_runs import AuditRuns
from service.audits import Audits
from service.batching import Batcher, Observer
from service.bookkeeping import CandidateEncoder, job_runner, open_books
from service.classifier import Classifier
from service.decoding import DecoderPool, DecoderSettings
from service.defense import Defense, defense_of, defense_version, say_what_it_costs
from service.engine import Query, ServingEncoder, Sighting
from service.errors import SettingsError, TextUnsupported
from service.explaining import Explainer
from service.fetch import Fetcher, rules_of
from service.keys import KeyRing, anonymous_scopes
from service.probing import ProbingDetector
from service.provenance import write_down
from service.published import Published
from service.rate_limits import RateLimits
from service.replicas import Served, devices, serve_on
from service.runtime import Runtime
from service.schemas import described_policy
from service.settings import Settings, variable
from service.telemetry import Metrics
from service.webhook_file import Hook, read_webhooks
from service.wire import Model

_log = logging.getLogger("hardlook.startup")
_QUEUE = "encoder queue"


@dataclass(frozen=True)
class Loaded:
    """What takes long to load, or may refuse to: the encoder, the collections, the calibrated policy, the keys.

    Attributes:
        served: the encoder on each of its devices, as often as it has replicas.
        published: the collections.
        catalog: the record of their changes; None where it is turned off.
        hooks: whom to tell of what.
        candidate: an encoder that might serve instead; None where there is none.
        keys: of callers.
        calibrated: the policy, where it is from a file.
    """

    served: tuple[Served, ...]
    published: Published
    catalog: Catalog | None
    keys: KeyRing
    calibrated: CalibratedPolicy | None = None
    hooks: tuple[Hook, ...] = ()
    candidate: CandidateEncoder | None = None

    @property
    def encoder(self) -> ServingEncoder:
        """On the first device."""
        return self.served[0].encoder

    def close(self) -> None:
        """Close the catalogue; to be called by whoever loaded it, once no application uses it any more."""
        if self.catalog is not None:
            self.catalog.database.close()


def load(settings: Settings, encoder: ServingEncoder | None = None) -> Loaded:
    """Load what the settings name, and try it out.

    Args:
        settings: of the service.
        encoder: used instead of the one that the settings name.

    Raises:
        SettingsError: no such device, the keys file or the seed of the defence is absent or damaged, or images are to
            be kept without a catalogue.
        UnknownEncoder, HubUnreachable, CheckpointError: the encoder cannot be loaded.
        NonFiniteEmbedding: it does not work.
        FingerprintMismatch: a published snapshot or the policy file was made by another encoder; names both.
        IndexerError: a published snapshot is damaged, or the catalogue cannot be opened.
        PolicyError: the policy file is absent or damaged.
    """
    if settings.keep_images != "none" and settings.catalog_url is None:
        raise SettingsError(
            f"{variable('keep_images')} is {settings.keep_images!r}, of reviews and exemplars, which need a catalogue: "
            f"{variable('catalog')} is 'off'"
        )
    keys = KeyRing(settings.keys_file)
    rules_of(settings), RateLimits(settings.rate_limit)  # what is wrong with them is said before the encoder is loaded
    hooks = () if settings.webhooks_file is None else read_webhooks(settings.webhooks_file)
    calibrated = None if settings.policy_file is None else CalibratedPolicy.load(settings.policy_file)
    defense, given = defense_of(settings), encoder
    if given is None:
        served = serve_on(
            devices(settings), lambda device: _protected(_load_encoder(settings, device), defense, device), settings
        )
    else:
        served = serve_on(("cpu",) * settings.replicas, lambda device: _protected(given, defense, device), settings)
    say_what_it_costs(served[0].encoder)
    fingerprint = served[0].encoder.fingerprint
    if calibrated is not None:
        calibrated.require_encoder(fingerprint, f"calibrated policy {settings.policy_file}")
    published, catalog = open_collections(settings, served[0].encoder)
    if calibrated is not None:
        _compare_pools(calibrated, published)
        if defense is not None:
            _log.warning("policy %r was audited without the defence: answers tell no flip rates", calibrated.name)
    return Loaded(served, published, catalog, keys, calibrated, hooks, _candidate(settings, defense))


def open_collections(settings: Settings, encoder: ServingEncoder) -> tuple[Published, Catalog | None]:
    """The collections under an encoder, and the catalogue of their changes; errors are those of `load`."""
    stamp = Stamp(encoder.name, encoder.fingerprint, encoder.dim)
    published = Published(settings.pools, stamp, lambda embeddings: build_index(embeddings, settings.search))
    catalog = None
    if settings.catalog_url is not None:
        catalog = Catalog(Database.open(_catalog_url(settings)), settings.pools, published.base)
    published.open(catalog)
    return published, catalog


def _load_encoder(settings: Settings, device: str) -> ServingEncoder:
    from perception.catalogue import load_encoder

    return load_encoder(settings.encoder, precision=settings.precision, device=device)


def _protected(encoder: ServingEncoder, defense: Defense | None, device: str) -> ServingEncoder:
    return encoder if defense is None else defense.protect(encoder, device)


def _catalog_url(settings: Settings) -> str:
    """Where the catalogue is, with its password where that is in a file."""
    url, file = settings.catalog_url, settings.catalog_password_file
    assert url is not None
    if file is None:
        return url
    try:
        password = file.read_text().strip()
        return make_url(url).set(password=password).render_as_string(hide_password=False)
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{variable('catalog_password_file')}: {file} cannot be read: {error}") from None
    except ArgumentError:
        raise SettingsError(f"{variable('catalog')} is not the address of a database") from None


def _candidate(settings: Settings, defense: Defense | None) -> CandidateEncoder | None:
    """The candidate encoder, on the CPU, where it takes nothing from the one that serves but time that is left.

    It would serve behind the same defence, and is compared behind it.
    """
    if settings.shadow_encoder is None or settings.shadow_pools is None:
        return None
    from perception.catalogue import load_encoder

    encoder = load_encoder(settings.shadow_encoder, precision=settings.shadow_precision, device="cpu")
    published = Published(settings.shadow_pools, Stamp(encoder.name, encoder.fingerprint, encoder.dim))
    published.open(None)
    return CandidateEncoder(_protected(encoder, defense, "cpu"), published)


def _compare_pools(calibrated: CalibratedPolicy, published: Published) -> None:
    """Say so where other pools are served than the policy was audited with: its rates are those of the audited ones."""
    pools = published.snapshots.get(POOLS)
    if pools is not None and pools.to_gallery().sha256 != calibrated.gallery_sha256:
        _log.warning(
            "policy %r was audited with other pools (gallery %s) than version %s, which is served: audit again",
            calibrated.name,
            calibrated.gallery_sha256,
            pools.version,
        )


async def start(settings: Settings, parts: Loaded, metrics: Metrics, stack: AsyncExitStack) -> Runtime:
    """Start the decoding processes and the threads of the replicas; the stack ends them, the threads first."""
    decoding = DecoderSettings(
        settings.image_limits, parts.encoder.preprocess, settings.decode_timeout_s, settings.decode_memory_bytes
    )
    decoder = await stack.enter_async_context(
        DecoderPool(decoding, workers=settings.decode_workers, replaced=metrics.decoder_replaced)
    )
    batcher = await _start_replicas(settings, parts, metrics, stack)
    fetcher = await stack.enter_async_context(Fetcher(rules_of(settings)))
    policy = settings.policy if parts.calibrated is None else parts.calibrated.policy
    books = None
    if parts.catalog is not None:
        books = await open_books(
            settings, parts.catalog, parts.published, parts.hooks, policy, decoding, parts.candidate, metrics, stack
        )
    pace_s = max(served.seconds_per_image for served in parts.served) / len(parts.served)
    admission = Admission(settings.max_requests, settings.deadline_s, pace_s)
    classifier = Classifier(
        parts.published,
        decoder,
        batcher,
        fetcher,
        policy,
        settings.deadline_s,
        metrics,
        admission.answered,
        defend_similar=settings.ttc_similar,
        bound=_bound(parts.served),
    )
    explainer = await stack.enter_async_context(_explainer(settings, parts, classifier, policy, admission))
    runtime = Runtime(
        settings=settings,
        model=_model(parts.encoder),
        policy=described_policy(policy, parts.calibrated),
        calibrated=parts.calibrated if defense_version(parts.encoder) is None else None,
        published=parts.published,
        rule=policy,
        books=books,
        jobs=None,
        audits=Audits(AuditRuns(settings.audits)),
        classifier=classifier,
        explainer=explainer,
        admission=admission,
        batcher=batcher,
        keys=parts.keys,
        anonymous_scopes=anonymous_scopes(settings),
        rate_limits=RateLimits(settings.rate_limit),
        probing=ProbingDetector(settings.probing_limit, settings.probing_similarity, settings.probing_window_s),
        metrics=metrics,
    )
    _watch(runtime, decoder)
    if books is not None:
        runtime.jobs = job_runner(runtime, books)
        await write_down(books.editor, settings, runtime.model, runtime.policy, parts.keys.records)
    return runtime


async def _start_replicas(
    settings: Settings, parts: Loaded, metrics: Metrics, stack: AsyncExitStack
) -> Batcher[Query, Sighting]:
    return await stack.enter_async_context(
        Batcher(
            [served.replica(metrics) for served in parts.served],
            max_batch=settings.max_batch,
            max_queue=settings.max_queue,
            expected=(NonFiniteEmbedding, TextUnsupported),
            name=_QUEUE,
            observer=Observer(batch=metrics.batch, waited=lambda seconds: metrics.stage_seconds("queue", seconds)),
        )
    )


def _explainer(
    settings: Settings, parts: Loaded, classifier: Classifier, policy: DecisionPolicy, admission: Admission
) -> Explainer:
    """With the first replica's weights, and half of its threads, so that verdicts do not wait for explanations."""
    first = parts.served[0]
    threads = None if first.threads is None else max(1, first.threads // 2)
    return Explainer(classifier, first.encoder, policy, admission, settings.deadline_s, threads)


def _model(encoder: ServingEncoder) -> Model:
    """What answers say of the encoder."""
    name, fingerprint, precision = encoder.name, encoder.fingerprint, encoder.precision
    return Model(name=name, fingerprint=fingerprint, precision=precision, defense=defense_version(encoder))


def _bound(served: Sequence[Served]) -> FeatureBound | None:
    """What is proven of the features on every device that serves; None where nothing is on one of them."""
    bounds = [feature_bound(each.encoder) for each in served]
    return None if None in bounds else bounds[0]


def _watch(runtime: Runtime, decoder: DecoderPool) -> None:
    """Let the metrics look at what has a state."""
    settings, metrics = runtime.settings, runtime.metrics
    metrics.build_info(
        version=product_version(),
        model=runtime.model.name,
        fingerprint=runtime.model.fingerprint,
        precision=runtime.model.precision,
        policy=runtime.policy.version,
    )
    metrics.watch_queue("encoder", lambda: runtime.batcher.depth, settings.max_queue)
    metrics.watch_queue("decoder", lambda: decoder.waiting, settings.max_requests)
    metrics.watch_queue("requests", lambda: runtime.admission.requests, settings.max_requests)

    def snapshots() -> Iterable[tuple[str, str, datetime, dict[str, int]]]:
        for name, snapshot in sorted(runtime.published.snapshots.items()):
            yield name, snapshot.version, datetime.fromisoformat(snapshot.created_at), snapshot.counts

    metrics.watch_snapshots(snapshots)


def product_version() -> str:
    """Of hardlook, as it is installed."""
    try:
        return installed_version("hardlook")
    except PackageNotFoundError:  # run from a checkout that is not installed
        return "0"
