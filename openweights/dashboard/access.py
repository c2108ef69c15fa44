"""Who may use the server: browsers that opened an address with a fresh token, or gave a key, and
programs that send a key. Pages of other origins may not act through a browser that may.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import threading
from collections.abc import Callable
from dataclasses import replace
from http.cookies import CookieError, SimpleCookie
from pathlib import Path
from tempfile import TemporaryDirectory

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from openweights.client import OpenWeights
from openweights.errors import OpenWeightsError

SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
_MOST_CLIENTS = 64

# Scripts come from this server alone, and nothing is sent elsewhere. plotly writes style sheets of
# its own and exports pictures through `data:` and `blob:` addresses.
_SECURITY_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; "
        "img-src 'self' data: blob:; font-src 'self'; connect-src 'self'; form-action 'self'; "
        "base-uri 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
}


class Sessions:
    """Browsers and programs that are let in, and the client that each acts through.

    Args:
        store: What a browser that came with the token, and a program with `api_key`, acts as.
        api_key: Key for programs, for the store on this machine. In a project, programs and
            browsers come with their own keys of the organization, which the store checks at every
            request.
        on_token: Told each new token: one opens one browser session, then the next one is made.
    """

    def __init__(self, store: OpenWeights, api_key: str, on_token: Callable[[str], None]) -> None:
        # A command from the page runs in a folder without files, not in that of the server.
        self._empty = TemporaryDirectory(prefix="ow-serve-")
        self.store = self._without_files(store)
        self._api_key = api_key
        self._on_token = on_token
        self._lock = threading.Lock()
        self._browsers: dict[str, OpenWeights] = {}
        self._programs: dict[str, OpenWeights] = {}
        self._retired: list[OpenWeights] = []
        self._token = ""
        self._renew_token()

    def _without_files(self, client: OpenWeights) -> OpenWeights:
        client.exec.folder = Path(self._empty.name)
        return client

    def _renew_token(self) -> None:
        self._token = secrets.token_urlsafe(24)
        self._on_token(self._token)

    def open_with_token(self, token: str) -> str | None:
        """A new session for the bearer of the token, which is then used up; None for any other."""
        with self._lock:
            if not hmac.compare_digest(token.encode(), self._token.encode()):
                return None
            self._renew_token()
            return self._open(self.store)

    def open_with_key(self, key: str) -> str | None:
        """A new session for the bearer of a key that the store knows; None for any other."""
        client = self.client_of_key(key)
        if client is None:
            return None
        with self._lock:
            return self._open(client)

    def _open(self, client: OpenWeights) -> str:
        session = secrets.token_urlsafe(32)
        self._browsers[session] = client
        return session

    def client_of_session(self, session: str) -> OpenWeights | None:
        """Whom the browser acts as."""
        return self._browsers.get(session)

    def close_session(self, session: str) -> None:
        """The browser is let in no more."""
        self._browsers.pop(session, None)

    def client_of_key(self, key: str) -> OpenWeights | None:
        """Whom a program with this key acts as; None when it may not act."""
        if not self.store.settings.is_remote:
            matches = hmac.compare_digest(key.encode(), self._api_key.encode())
            return self.store if matches else None
        digest = hashlib.sha256(key.encode()).hexdigest()
        with self._lock:
            known = self._programs.get(digest)
        return known or self._new_program(key, digest)

    def _new_program(self, key: str, digest: str) -> OpenWeights | None:
        settings = replace(self.store.settings, api_key=key)
        client = self._without_files(OpenWeights(settings=settings))
        try:
            client.backend.list_jobs(limit=1)
        except OpenWeightsError:
            client.close()
            return None
        with self._lock:
            while len(self._programs) >= _MOST_CLIENTS:
                self._programs.pop(next(iter(self._programs)))
            return self._programs.setdefault(digest, client)

    def forget(self, client: OpenWeights) -> None:
        """Whoever acts through it has to log in again. It stays open for requests under way."""
        with self._lock:
            for known in (self._browsers, self._programs):
                for name in [name for name, other in known.items() if other is client]:
                    del known[name]
            self._retired.append(client)

    def close(self) -> None:
        """Nobody is let in any more; the clients that were made here end."""
        with self._lock:
            programs, self._programs = self._programs, {}
            self._browsers.clear()
        for client in (*programs.values(), *self._retired):
            client.close()
        self._empty.cleanup()


class Gate:
    """ASGI middleware: the host must be one of ours, changes must come from our own page, `/api`
    needs a session and `/v1` a key. The client that the request acts through is
    `request.state.client`.

    Args:
        hosts: Values of the Host header that are answered. Others are refused, so that a name that
            is made to point here (DNS rebinding) opens nothing.
        cookie: Name of the session's cookie.
    """

    def __init__(
        self, app: ASGIApp, sessions: Sessions, hosts: frozenset[str] | None, cookie: str
    ) -> None:
        self._app = app
        self._sessions = sessions
        self._hosts = hosts
        self._cookie = cookie

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        send = _with_security_headers(send)
        refusal = self._admit(scope)
        await (refusal or self._app)(scope, receive, send)

    def _admit(self, scope: Scope) -> JSONResponse | None:
        """Puts the client into the scope's state, or says why the request is refused."""
        headers, path = Headers(scope=scope), str(scope["path"])
        if self._hosts is not None and headers.get("host", "") not in self._hosts:
            return _refusal(421, "this server does not answer for that host name")
        if path.startswith("/v1/"):
            client = self._sessions.client_of_key(_bearer(headers))
            if client is None:
                return _openai_refusal()
        else:
            if scope["method"] not in SAFE_METHODS and not _same_origin(headers):
                return _refusal(403, "changes are taken from this server's own page only")
            session = session_of(headers, self._cookie)
            client = self._sessions.client_of_session(session)
            if client is None and path.startswith("/api/"):
                return _refusal(401, "open the address that `ow serve` has printed, or log in")
        scope.setdefault("state", {})["client"] = client
        return None


def session_of(headers: Headers, cookie: str) -> str:
    """The session that the browser names; empty for none."""
    try:
        morsel = SimpleCookie(headers.get("cookie", "")).get(cookie)
    except CookieError:
        return ""
    return morsel.value if morsel else ""


def _same_origin(headers: Headers) -> bool:
    """Whether a page of this very origin asks. Browsers send `Origin` with every change; a request
    without one does not come from a page, but then must carry the header that only scripts set.
    """
    if headers.get("x-openweights") != "page":
        return False
    if headers.get("sec-fetch-site", "same-origin") != "same-origin":
        return False
    origin = headers.get("origin")
    return origin is None or origin.partition("://")[2] == headers.get("host")


def _bearer(headers: Headers) -> str:
    scheme, _, key = headers.get("authorization", "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else ""


def _refusal(status: int, message: str) -> JSONResponse:
    return JSONResponse({"error": message}, status)


def _openai_refusal() -> JSONResponse:
    error = {
        "message": "wrong API key; `ow serve` prints the one of this server",
        "type": "invalid_request_error",
        "code": "invalid_api_key",
    }
    return JSONResponse({"error": error}, 401)


def _with_security_headers(send: Send) -> Send:
    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in _SECURITY_HEADERS.items():
                headers.setdefault(name, value)
            headers.setdefault("cache-control", "no-store")
        await send(message)

    return sending
