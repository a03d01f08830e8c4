"""Every exception that perception raises.

    PerceptionError
    ├── ImageError                 the bytes of one image; the caller's fault
    │   ├── UnsupportedFormat      not one of the accepted formats
    │   ├── CorruptImage           right format, cannot be decoded
    │   └── ImageTooLarge          more bytes, pixels or frames than the limit
    ├── EncoderError
    │   ├── UnknownEncoder         no such name in the catalogue
    │   ├── CheckpointError        weights or configuration absent, corrupt or of another shape
    │   ├── HubUnreachable         the model hub could not be asked
    │   └── NonFiniteEmbedding     the network returned NaN or infinity
    ├── GalleryError               ids, labels and embeddings do not fit together, or a file is damaged
    ├── PolicyError                a calibrated policy's figures do not fit together, or a file is damaged
    └── FingerprintMismatch        made by another encoder than the one in use

Exceptions carry their data; none knows an HTTP status.
"""


class PerceptionError(Exception):
    """Root of everything that perception raises on purpose."""


class ImageError(PerceptionError):
    """One image cannot be used."""


class UnsupportedFormat(ImageError):
    """The bytes are of no accepted image format."""

    def __init__(self, found: str, accepted: tuple[str, ...]) -> None:
        self.found, self.accepted = found, accepted
        super().__init__(f"unsupported image format: {found}; accepted: {', '.join(accepted)}")


class CorruptImage(ImageError):
    """The format is accepted, the content cannot be decoded."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(f"image cannot be decoded: {reason}")


class ImageTooLarge(ImageError):
    """A limit is exceeded: `quantity` is 'bytes', 'pixels' or 'pixels a side'."""

    def __init__(self, quantity: str, limit: int, actual: int) -> None:
        self.quantity, self.limit, self.actual = quantity, limit, actual
        super().__init__(f"image too large: {actual} {quantity}, the limit is {limit}")


class EncoderError(PerceptionError):
    """An encoder cannot be built or does not work."""


class UnknownEncoder(EncoderError):
    """The name is neither in the catalogue nor of a known scheme."""

    def __init__(self, name: str, known: tuple[str, ...]) -> None:
        self.name, self.known = name, known
        super().__init__(
            f"unknown encoder {name!r}; use 'hf-hub:OWNER/MODEL', 'local-dir:FOLDER' or one of: {', '.join(known)}"
        )


class CheckpointError(EncoderError):
    """Weights or configuration are absent, corrupt or of another architecture."""


class HubUnreachable(EncoderError):
    """The model hub could not be reached or refused to answer."""

    def __init__(self, model_id: str, reason: str) -> None:
        self.model_id, self.reason = model_id, reason
        super().__init__(
            f"could not fetch {model_id!r} from the model hub: {reason}. Choices: (1) give this machine access to the "
            "hub; (2) download the model elsewhere and name it as 'local-dir:FOLDER'; (3) choose the small bundled "
            "encoder explicitly, e.g. 'bundled/fare4'. No other model is ever loaded in its place."
        )


class NonFiniteEmbedding(EncoderError):
    """The encoder returned NaN or infinity, or a zero vector, which has no direction."""

    def __init__(self, rows: tuple[int, ...]) -> None:
        self.rows = rows
        super().__init__(f"encoder returned a non-finite or zero embedding for batch rows {list(rows)}")


class GalleryError(PerceptionError):
    """A gallery's parts do not fit together, or its file is damaged."""


class PolicyError(PerceptionError):
    """A calibrated policy's figures do not fit together, or its file is damaged."""


class FingerprintMismatch(PerceptionError):
    """An artefact was made by another encoder than the one in use."""

    def __init__(self, artefact: str, expected: str, found: str) -> None:
        self.artefact, self.expected, self.found = artefact, expected, found
        super().__init__(f"{artefact} was made by encoder {found}, the encoder in use is {expected}")
