"""Tar archives whose damage is an error. Knows nothing of what is in them."""

import tarfile


class StrictTarInfo(tarfile.TarInfo):
    """Makes damage in the middle an error: tarfile takes a broken header for the end of the archive."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> "StrictTarInfo":
        """Read the next header.

        Raises:
            tarfile.ReadError: the header is damaged.
        """
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise  # the zero blocks at the end
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"damaged or truncated: {error}") from error
