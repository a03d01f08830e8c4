"""hardlook-serve: run the service with the settings of the environment."""

import os
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from types import FrameType
from typing import NoReturn

from cyclopts import App, CycloptsError

from indexer.errors import IndexerError
from perception.errors import PerceptionError
from service.errors import ServiceError
from service.settings import Settings, read_settings

START_FAILED = 2
_EXPECTED = (ServiceError, IndexerError, PerceptionError)


def main(tokens: Sequence[str] | None = None) -> None:
    """Serve until told to stop; a start that fails is one line and exit code 2."""
    try:
        _app()(tokens, exit_on_error=False, print_error=False)
    except CycloptsError as error:
        _fail(str(error))


def _app() -> App:
    from service.keys_cli import keys_app

    app = App(name="hardlook-serve")
    app.default(_run)
    app.command(keys_app())
    return app


def _run() -> None:
    """Run the service in the foreground, set up by HARDLOOK_* environment variables; docs/api.md lists them."""
    try:
        settings = read_settings(os.environ)
    except ServiceError as error:
        _fail(str(error))
    serve(settings)


def serve(settings: Settings) -> None:
    """Listen, and load meanwhile; a start that fails ends the process."""
    import uvicorn

    from perception.memory import keep_freed_memory
    from service.app import create_app
    from service.keys import exposed_without_keys
    from service.request_log import configure_logging
    from service.tracing import configure_tracing

    configure_logging(settings.log_level)
    keep_freed_memory(one_arena=True)  # service.memory gives it back
    if reason := exposed_without_keys(settings):
        _fail(reason)
    try:
        configure_tracing(os.environ)
    except ServiceError as error:
        _fail(str(error))
    failures: list[Exception] = []

    def failed(error: Exception) -> None:
        failures.append(error)
        server.should_exit = True

    service = create_app(settings, failed=failed)

    class Server(uvicorn.Server):
        """Says that it is draining before it stops accepting."""

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            first, service.state.draining = not service.state.draining, True
            if first and settings.shutdown_delay_s:  # a second signal does not wait
                timer = threading.Timer(settings.shutdown_delay_s, super().handle_exit, (sig, frame))
                timer.daemon = True
                timer.start()
            else:
                super().handle_exit(sig, frame)

    config = uvicorn.Config(
        service,
        host=settings.host,
        port=settings.port,
        log_config=None,
        access_log=False,
        server_header=False,
        # An address in a header is believed only where it comes from a proxy that the operator has named.
        proxy_headers=bool(settings.trusted_proxies),
        forwarded_allow_ips=list(settings.trusted_proxies),
        # A request that is already accepted gets its answer, or its deadline.
        timeout_graceful_shutdown=int(settings.deadline_s) + 1,
    )
    server = Server(config)
    with suppress(KeyboardInterrupt):  # uvicorn repeats the signal once it has stopped cleanly
        server.run()
    if failures:
        if not isinstance(failures[0], _EXPECTED):
            raise failures[0]
        _fail(str(failures[0]))
    if not server.started:
        _fail("the service did not start; the log says why")


def _fail(reason: str) -> NoReturn:
    print(f"hardlook-serve: {' '.join(reason.split())}", file=sys.stderr)
    sys.exit(START_FAILED)
