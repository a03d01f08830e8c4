"""hardlook-serve: run the service with the settings of the environment."""

import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from types import FrameType
from typing import NoReturn

from cyclopts import App, CycloptsError

from service.errors import ServiceError
from service.settings import Settings, read_settings

START_FAILED = 2


def main(tokens: Sequence[str] | None = None) -> None:
    """Serve until told to stop; a start that fails is one line and exit code 2."""
    try:
        _app()(tokens, exit_on_error=False, print_error=False)
    except CycloptsError as error:
        _fail(str(error))


def _app() -> App:
    app = App(name="hardlook-serve")
    app.default(_run)
    return app


def _run() -> None:
    """Run the service in the foreground, set up by HARDLOOK_* environment variables; docs/api.md lists them."""
    try:
        settings = read_settings(os.environ)
    except ServiceError as error:
        _fail(str(error))
    serve(settings)


def serve(settings: Settings) -> None:
    """Load, then listen."""
    import uvicorn

    from indexer.errors import IndexerError
    from perception.errors import PerceptionError
    from service.app import create_app, load
    from service.request_log import configure_logging

    configure_logging(settings.log_level)
    try:
        service = create_app(settings, load(settings))
    except (ServiceError, IndexerError, PerceptionError) as error:
        _fail(str(error))

    class Server(uvicorn.Server):
        """Says that it is draining before it stops accepting."""

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            if hasattr(service.state, "runtime"):
                service.state.runtime.draining = True
            super().handle_exit(sig, frame)

    config = uvicorn.Config(
        service,
        host=settings.host,
        port=settings.port,
        log_config=None,
        access_log=False,
        server_header=False,
        # A request that is already accepted gets its answer, or its deadline.
        timeout_graceful_shutdown=int(settings.deadline_s) + 1,
    )
    server = Server(config)
    with suppress(KeyboardInterrupt):  # uvicorn repeats the signal once it has stopped cleanly
        server.run()
    if not server.started:
        _fail("the service did not start; the log says why")


def _fail(reason: str) -> NoReturn:
    print(f"hardlook-serve: {' '.join(reason.split())}", file=sys.stderr)
    sys.exit(START_FAILED)
