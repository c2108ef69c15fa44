"""`ow serve`."""

from __future__ import annotations

import ipaddress
import secrets
import socket
import threading
from pathlib import Path
from types import FrameType

import click

from openweights.cli.output import note
from openweights.errors import ConfigurationError, InvalidInputError


@click.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", default=8500, show_default=True, type=click.IntRange(0, 65535))
@click.option(
    "--api-key", envvar="OPENWEIGHTS_SERVE_KEY", help="Key for programs; made up if not given."
)
@click.option("--certfile", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--keyfile", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--behind-proxy", is_flag=True, help="A proxy in front of it speaks TLS.")
def serve(
    host: str,
    port: int,
    api_key: str | None,
    certfile: Path | None,
    keyfile: Path | None,
    behind_proxy: bool,
) -> None:
    """Show jobs on a page, and answer OpenAI clients.

    The page is for the store on this machine, or for the project that `ow login` has named. The
    address that is printed lets one browser in; a new one is printed after that. Other machines are
    served only with a certificate (--certfile, --keyfile), or behind a proxy that has one.
    """
    _check_packages()
    local = _is_loopback(host)
    if not local and not (certfile and keyfile) and not behind_proxy:
        raise InvalidInputError(
            f"--host {host} lets other machines in: give --certfile and --keyfile, or "
            "--behind-proxy when a proxy in front speaks TLS"
        )
    listener = _listen(host, port)
    port = listener.getsockname()[1]
    scheme = "https" if certfile else "http"
    names = (host, "localhost", "127.0.0.1", "[::1]")
    hosts = frozenset(f"{name}:{port}" for name in names) if local else None
    _run(listener, f"{scheme}://{host}:{port}", hosts, api_key, certfile, keyfile)


def _run(
    listener: socket.socket,
    address: str,
    hosts: frozenset[str] | None,
    api_key: str | None,
    certfile: Path | None,
    keyfile: Path | None,
) -> None:
    import uvicorn

    from openweights.client import OpenWeights
    from openweights.dashboard.access import Sessions
    from openweights.dashboard.app import create_app, read_ahead

    client = OpenWeights()
    client.jobs.queue()  # a store that cannot be opened is told of here, and not first on the page
    key = api_key or f"sk-ow-{secrets.token_urlsafe(24)}"
    sessions = Sessions(client, key, lambda token: note(f"page: {address}/?token={token}"))
    note(f"{client.organization_id}: for OpenAI clients base_url={address}/v1")
    if not client.settings.is_remote:
        note(f"their api_key={key}" if api_key is None else "their api_key is the one you gave")
    app = create_app(sessions, hosts, f"openweights_{listener.getsockname()[1]}")
    config = uvicorn.Config(
        app,
        log_level="warning",
        timeout_graceful_shutdown=3,
        ssl_certfile=certfile,
        ssl_keyfile=keyfile,
        proxy_headers=False,
    )
    server = uvicorn.Server(config)
    end = server.handle_exit

    def end_streams_first(sig: int, frame: FrameType | None) -> None:
        app.state.stopping.set()
        end(sig, frame)

    server.handle_exit = end_streams_first
    threading.Thread(target=read_ahead, args=(app, client), daemon=True).start()
    try:
        server.run(sockets=[listener])
    finally:
        sessions.close()
        client.close()


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise InvalidInputError(
            f"cannot listen on {host}, port {port}: {error.strerror}; choose another --port"
        ) from None
    return listener


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _check_packages() -> None:
    from importlib.util import find_spec

    missing = [name for name in ("starlette", "uvicorn", "plotly") if find_spec(name) is None]
    if missing:
        raise ConfigurationError(
            f"the page needs {', '.join(missing)}: pip install 'openweights[serve]'"
        )
