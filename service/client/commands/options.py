"""What the commands share: which service, which images, exit codes."""

import os
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from service.client.clients import HardlookClient

ALL_ANSWERED, SOME_ERRORS, NOT_DONE, VERDICT_FOUND = 0, 1, 2, 3
VERDICTS = frozenset({"safe", "unsafe", "review"})
_MAX_KEY_FILE_BYTES = 4096

Paths = Annotated[str, Parameter(help="Files, folders and URLs.")]
Collection = Annotated[str, Parameter(help="The moderation pools, or the name of a gallery.")]
Reason = Annotated[str, Parameter(help="Why; kept in the audit log.")]
Json = Annotated[bool, Parameter(name="--json", negative=(), help="JSON lines in place of text.")]
Label = Annotated[str | None, Parameter(help="Only this pool or class.")]
FailOn = Annotated[str, Parameter(help="Verdicts for which to exit with 3, such as 'unsafe,review'.")]
Chain = Annotated[Literal["changes", "decisions"], Parameter(help="Changes, or the decisions on images.")]
POOLS = "pools"


@Parameter(name="*")
@dataclass(frozen=True)
class Service:
    """Which service to ask."""

    url: Annotated[str, Parameter(env_var="HARDLOOK_URL", help="Base URL of the service.")] = "http://127.0.0.1:8000"
    api_key_file: Annotated[
        Path | None, Parameter(help="File with the API key; without it the variable HARDLOOK_API_KEY, if there is one.")
    ] = None
    timeout: Annotated[float, Parameter(help="Seconds for one request, with all its retries.")] = 60.0
    ca_file: Annotated[Path | None, Parameter(help="Certificates to trust, in PEM, in place of the usual ones.")] = None
    trust_env: Annotated[
        bool, Parameter(negative=(), help="Use the proxies and certificates that HTTPS_PROXY and the like name.")
    ] = False

    def arguments(self) -> dict[str, Any]:
        """For both clients.

        Raises:
            OSError: a file cannot be read.
            ValueError: there is no key in the key file.
        """
        return {
            "base_url": self.url,
            "api_key": self._key(),
            "timeout_s": self.timeout,
            "trust_env": self.trust_env,
            "ssl_context": ssl.create_default_context(cafile=self.ca_file) if self.ca_file else None,
        }

    def client(self, **more: Any) -> HardlookClient:
        """A client of the service, with more arguments; errors are those of `arguments`."""
        return HardlookClient(**self.arguments(), **more)

    def _key(self) -> str | None:
        if self.api_key_file is None:
            return os.environ.get("HARDLOOK_API_KEY", "").strip() or None
        with self.api_key_file.open("rb") as file:
            key = file.read(_MAX_KEY_FILE_BYTES).decode("ascii", "replace").strip()
        if not key:
            raise ValueError(f"{self.api_key_file} holds no API key")
        return key


HERE = Service()


def flagged_verdicts(fail_on: str) -> set[str]:
    """The verdicts that --fail-on names.

    Raises:
        ValueError: one is none.
    """
    flagged = {verdict.strip() for verdict in fail_on.split(",") if verdict.strip()}
    if unknown := flagged - VERDICTS:
        raise ValueError(f"--fail-on takes safe, unsafe and review, got {', '.join(sorted(unknown))}")
    return flagged
