"""The defence that the settings ask for: what stands between an image and the encoder that serves.

Owns the seed of its noise, the original encoder, and what is said of its cost. The counterattack itself is in
`perception.counterattack`.
"""

import logging
import secrets
import time
from dataclasses import replace

import torch

from perception.counterattack import MIN_SEED_BYTES, Counterattack, CounterattackSettings, FeatureEncoder
from service.engine import ServingEncoder
from service.errors import SettingsError
from service.secret_file import read_secret
from service.settings import Settings, variable

_SEED_BYTES = 32
_REPEATS = 3
_log = logging.getLogger("hardlook.defense")


class Defense:
    """Puts encoders behind the counterattack, all with the same noise.

    Args:
        settings: of the service, which ask for a defence.

    Raises:
        SettingsError: the file with the seed cannot be read, or holds too little.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._seed = _seed(settings)
        self._originals: dict[str, FeatureEncoder] = {}

    def protect(self, encoder: ServingEncoder, device: str) -> Counterattack:
        """An encoder behind the counterattack.

        Raises:
            SettingsError: it does not give the features that a counterattack needs.
            UnknownEncoder, HubUnreachable, CheckpointError: the original encoder cannot be loaded, or does not fit.
        """
        if not isinstance(encoder, FeatureEncoder):
            raise SettingsError(f"{variable('defense')}: encoder {encoder.name} does not give its features")
        asked = self._settings
        parameters = CounterattackSettings(
            asked.ttc_eps, asked.ttc_steps, asked.ttc_step_size, asked.ttc_beta, asked.ttc_threshold
        )
        original = None if asked.ttc_original is None else self._original(asked.ttc_original, device)
        return Counterattack(encoder, parameters, seed=self._seed, original=original, together=asked.ttc_together)

    def _original(self, name: str, device: str) -> FeatureEncoder:
        from perception.catalogue import load_encoder

        if device not in self._originals:
            self._originals[device] = load_encoder(name, precision=self._settings.precision, device=device)
        return self._originals[device]


def defense_of(settings: Settings) -> Defense | None:
    """What the settings ask for; None where they ask for no defence. Errors are those of `Defense`."""
    return None if settings.defense == "none" else Defense(settings)


def defense_version(encoder: ServingEncoder) -> str | None:
    """`Counterattack.defense`; None for an encoder without a defence."""
    return encoder.defense if isinstance(encoder, Counterattack) else None


def say_what_it_costs(encoder: ServingEncoder) -> None:
    """Measure one image that is counterattacked against one that is not, and log both."""
    if not isinstance(encoder, Counterattack):
        return
    always = replace(encoder.settings, threshold=torch.finfo(torch.float32).max)
    countering = Counterattack(encoder.encoder, always, seed=bytes(MIN_SEED_BYTES), original=encoder.original)
    size_px = encoder.preprocess.size_px
    pixels = torch.rand(1, 3, size_px, size_px, generator=torch.Generator().manual_seed(0))
    plain_s, defended_s = _least_s(encoder.encoder, pixels), _least_s(countering, pixels)
    _log.warning(
        "defence %s: an image that is counterattacked takes %.1f ms to encode, %.1f times as long as without "
        "(%.1f ms); it is a mitigation and no guarantee, see docs/counterattack.md",
        encoder.defense,
        1000 * defended_s,
        defended_s / plain_s,
        1000 * plain_s,
    )


def _least_s(encoder: ServingEncoder, pixels: torch.Tensor) -> float:
    """The least of a few runs, until the embedding is there to be read."""
    least = float("inf")
    for _ in range(_REPEATS):
        started_s = time.perf_counter()
        with torch.inference_mode():
            encoder.encode(pixels).cpu()
        least = min(least, time.perf_counter() - started_s)
    return least


def _seed(settings: Settings) -> bytes:
    file = settings.ttc_seed_file
    if file is None:
        _log.warning(
            "%s is not set: the noise of the defence is of this process alone; after a restart, and from other "
            "processes, the same image gets a slightly different answer",
            variable("ttc_seed_file"),
        )
        return secrets.token_bytes(_SEED_BYTES)
    return read_secret("ttc_seed_file", file, MIN_SEED_BYTES)
