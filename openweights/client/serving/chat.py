"""`ow.chat`: ask any model by its name. What is not OpenAI's is deployed when it is first asked."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from concurrent.futures import InvalidStateError as AlreadySettledError
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from openweights.arguments import check_text
from openweights.client.results import write_chunks
from openweights.client.serving.openai_clients import (
    Clients,
    Streamed,
    check_request,
    in_our_words,
)
from openweights.client.serving.temporary_api import UP_TIMEOUT_S, TemporaryApi
from openweights.client.watching.attempts import last_checkpoint
from openweights.errors import (
    ConfigError,
    InvalidStateError,
    NotFoundError,
    PlatformError,
    shown,
)
from openweights.models.names import full_name, model_reference

if TYPE_CHECKING:
    from openweights.client import OpenWeights

logger = logging.getLogger(__name__)

# Models that are asked for within so many seconds of each other are deployed together, grouped by
# their base.
GROUP_S = 2.0
# A request may take so long, or a second for each token that it may have, if that is more.
LEAST_TIMEOUT_S = 300.0
OPENAI_RETRIES = 8
_OPENAI = "openai/"
_OPENAI_NAMES = ("gpt-", "chatgpt-", "o1", "o3", "o4")


def is_openai(model: str) -> bool:
    """Whether a model is asked at OpenAI; `openai/gpt-oss-20b` has open weights, and is not."""
    if "/" not in model and model.startswith(_OPENAI_NAMES):
        model = f"{_OPENAI}{model}"
    return model.startswith(_OPENAI) and model_reference(model).kind == "openai"


class Chat:
    """`ow.chat.completions.create(model=…, messages=…)`, with the arguments and the answers of
    OpenAI's own client.

    Args:
        use_async: Whether `create` is a coroutine.
    """

    def __init__(self, deployments: Deployments, *, use_async: bool) -> None:
        self._deployments = deployments
        kind = AsyncCompletions if use_async else Completions
        self.completions: Any = kind(deployments)

    def kill(self, model: str) -> None:
        """End the deployment of a model.

        Raises:
            NotFoundError: It has none here.
        """
        self._deployments.kill(model)


class Completions:
    """Asks, and waits for the answer.

    Args:
        of_chats: Whether requests are conversations with `messages`, else texts with a `prompt`.
    """

    def __init__(self, deployments: Deployments, *, of_chats: bool = True) -> None:
        self._deployments = deployments
        self._of_chats = of_chats

    def create(self, *, model: str, cache: bool | str | Path = False, **params: Any) -> Any:
        """Ask a model.

        Args:
            model: Of OpenAI (`gpt-…`, `openai/<name>`), or what `ow.api.deploy` takes; that is
                deployed first when it is not up, which takes as long as loading it does.
            cache: Keep answers on disk, and give an equal request the answer that it got before;
                True for a folder in the store's home, or a folder.
            **params: `messages` (or `prompt`), `stream`, `max_tokens`, `n`, … as of OpenAI's
                client.

        Raises:
            ConfigError: A parameter is wrong; a line for each.
            InvalidInputError: The model's server does not take the request.
            ConfigurationError: OpenAI's key is missing, or is not taken.
            PlatformError: The model's server does not answer; why, as far as it is known.
            JobFailedError: The model cannot be deployed; the message has the end of the log.
        """
        cached = self._deployments.looked_up(model, cache, params, of_chats=self._of_chats)
        if cached is not None and (known := cached.read()) is not None:
            return known
        ask = self._deployments.target(model).result()
        try:
            client: Any = ask.clients.sync
            endpoint = client.chat.completions if self._of_chats else client.completions
            answer = endpoint.create(model=ask.name, **_with_timeout(params))
        except Exception as error:
            raise ask.explained(error) from error
        if params.get("stream"):
            return Streamed(answer, ask.explained)
        return answer if cached is None else cached.write(answer)


class AsyncCompletions:
    """Asks without blocking the event loop."""

    def __init__(self, deployments: Deployments) -> None:
        self._deployments = deployments

    async def create(self, *, model: str, cache: bool | str | Path = False, **params: Any) -> Any:
        """See `Completions.create`."""
        cached = await asyncio.to_thread(self._deployments.looked_up, model, cache, params)
        if cached is not None and (known := cached.read()) is not None:
            return known
        ask = await asyncio.wrap_future(self._deployments.target(model))
        try:
            completions: Any = ask.clients.asynchronous.chat.completions
            answer = await completions.create(model=ask.name, **_with_timeout(params))
        except Exception as error:
            raise await asyncio.to_thread(ask.explained, error) from error
        if params.get("stream"):
            return Streamed(answer, ask.explained)
        return answer if cached is None else cached.write(answer)


def _with_timeout(params: Mapping[str, Any]) -> dict[str, Any]:
    most = params.get("max_completion_tokens") or params.get("max_tokens") or 0
    return {"timeout": max(LEAST_TIMEOUT_S, float(most)), **params}


class Target:
    """Whom to ask for a model.

    Attributes:
        name: The model's name there.
        is_lost: A request has found nobody there.
    """

    def __init__(self, clients: Clients, name: str, api: TemporaryApi | None = None) -> None:
        self.clients = clients
        self.name = name
        self.is_lost = False
        self._api = api

    def explained(self, error: Exception) -> Exception:
        """The error as the caller should see it: of a deployment that is gone, why."""
        if self._api is None or not self.clients.is_lost(error):
            return in_our_words(error, self.name, at_openai=self._api is None)
        self.is_lost = True
        self._api.forget()
        return PlatformError(
            f"{self.name}: its deployment does not answer; {self._api.state()}. Ask again to "
            "deploy it anew"
        )


class Deployments:
    """The deployments of a client, by model; those that are asked for together come up together."""

    def __init__(self, ow: OpenWeights, deploy_kwargs: Mapping[str, Any]) -> None:
        self._ow = ow
        self._deploy_kwargs = dict(deploy_kwargs)
        self._lock = threading.Lock()
        self._targets: dict[str, Future[Target]] = {}
        self._apis: dict[str, TemporaryApi] = {}
        self._wanted: dict[str, Future[Target]] = {}
        self._timer: threading.Timer | None = None
        self._threads: list[threading.Thread] = []
        self._is_closed = False

    def target(self, model: str) -> Future[Target]:
        """Whom to ask for the model; deployed if need be.

        Raises:
            InvalidStateError: The client is closed.
        """
        with self._lock:
            if self._is_closed:
                raise InvalidStateError(f"{model}: the client is closed; make another")
            known = self._targets.get(model)
            if known is not None and not _is_gone(known):
                return known
            at_openai = is_openai(model)
            future = self._targets[model] = Future[Target]()
            # All who ask share it: it cannot be canceled by one of them who waits no more.
            future.set_running_or_notify_cancel()
            if at_openai:
                name = model.removeprefix(_OPENAI)
                _resolve(future, lambda: Target(Clients(retries=OPENAI_RETRIES), name))
                return future
            if not self._wanted:
                self._timer = threading.Timer(GROUP_S, self._deploy_wanted)
                self._timer.start()
            self._wanted[model] = future
            return future

    def kill(self, model: str) -> None:
        """End the deployment of a model, with all that it serves."""
        with self._lock:
            api = self._apis.get(model)
            if model not in self._targets or is_openai(model):
                known = ", ".join(self._apis) or "none"
                raise NotFoundError(f"{model} has no deployment here (there are: {known})")
            served = [name for name, other in self._apis.items() if other is api]
            futures = [self._forget(name) for name in served or [model]]
        for future in futures:
            _end(future, model)
        if api is not None:
            api.down()

    def close(self) -> None:
        """End all deployments, also those that are only coming up."""
        with self._lock:
            self._is_closed = True
            self._wanted.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer.join()
        apis = {id(api): api for api in self._apis.values()}
        for model in list(self._targets):
            _end(self._forget(model), model)
        for api in apis.values():
            api.down()
        for thread in self._threads:
            thread.join()

    def _forget(self, model: str) -> Future[Target]:
        self._apis.pop(model, None)
        self._wanted.pop(model, None)
        return self._targets.pop(model)

    def looked_up(
        self,
        model: str,
        cache: bool | str | Path,
        params: Mapping[str, Any],
        *,
        of_chats: bool = True,
    ) -> CachedAnswer | None:
        """As `cached`, once the request has been looked at.

        Raises:
            ConfigError: A parameter is wrong.
        """
        check_text("model", model, "give the name of a model, or the id of a job")
        if not isinstance(cast("object", cache), bool | str | Path):
            raise ConfigError(f"cache: {shown(cache)} is neither True nor a folder; give one")
        check_request(params, of_chats=of_chats)
        return self.cached(model, cache, params)

    def cached(
        self, model: str, cache: bool | str | Path, params: Mapping[str, Any]
    ) -> CachedAnswer | None:
        """Where the answer to a request is kept; None when it is not.

        Raises:
            ConfigError: It is streamed.
        """
        if cache is False:
            return None
        if params.get("stream"):
            raise ConfigError("cache: a streamed answer is not kept; leave out stream or cache")
        folder = self._ow.settings.home / "chat_cache" if cache is True else Path(cache)
        state = self._state_of(model)
        text = json.dumps({"model": model, "state": state, **params}, sort_keys=True, default=str)
        return CachedAnswer(folder / f"{hashlib.sha256(text.encode()).hexdigest()}.json", state)

    def _state_of(self, model: str) -> str | None:
        """What a fine-tuning job that has not completed is as a model: its newest checkpoint."""
        try:
            job = self._ow.backend.get_job(model)
        except NotFoundError:
            return None
        if job.status == "completed":
            return None
        return f"{model}/checkpoint-{last_checkpoint(self._ow.backend, model)}"

    def _deploy_wanted(self) -> None:
        with self._lock:
            wanted, self._wanted = self._wanted, {}
        self._deploy(wanted)

    def _deploy(self, wanted: Mapping[str, Future[Target]]) -> None:
        try:
            apis = self._ow.api.multi_deploy(list(wanted), **self._deploy_kwargs)
        except Exception as error:  # noqa: BLE001 - those who wait for it are told
            if len(wanted) > 1:
                # One that cannot be deployed keeps nobody from asking the others.
                for model, future in wanted.items():
                    self._deploy({model: future})
                return
            for future in wanted.values():
                _settle(future.set_exception, error)
            return
        with self._lock:
            left = [name for name, future in wanted.items() if self._targets.get(name) is future]
            self._apis |= {name: apis[name] for name in left}
            self._threads = [thread for thread in self._threads if thread.is_alive()]
            for name in left:
                args = (name, apis[name], wanted[name])
                self._threads.append(threading.Thread(target=self._bring_up, args=args))
                self._threads[-1].start()
        for api in set(apis.values()) - {apis[name] for name in left}:
            api.down()

    def _bring_up(self, model: str, api: TemporaryApi, future: Future[Target]) -> None:
        def target() -> Target:
            api.come_up(UP_TIMEOUT_S, lambda: self._apis.get(model) is api)
            return Target(api.clients, full_name(model), api)

        _resolve(future, target)


def _is_gone(known: Future[Target]) -> bool:
    """Whether it failed, or its deployment has ended meanwhile."""
    if not known.done():
        return False
    return known.exception() is not None or known.result().is_lost


def _resolve(future: Future[Target], make: Callable[[], Target]) -> None:
    try:
        _settle(future.set_result, make())
    except Exception as error:  # noqa: BLE001 - whoever waits for it is told
        _settle(future.set_exception, error)


def _end(future: Future[Target], model: str) -> None:
    """Tell those who wait for it that it is not to come, and release what it holds."""
    error = InvalidStateError(f"{model}: its deployment was ended before it was up; ask again")
    _settle(future.set_exception, error)
    if future.exception() is None:
        future.result().clients.close()


def _settle(settle: Callable[[Any], None], value: object) -> None:
    with contextlib.suppress(AlreadySettledError):  # whoever waited has been told otherwise
        settle(value)


class CachedAnswer:
    """An answer on disk.

    Args:
        state: The checkpoint that it is to be of, as the server says it with the answer. A server
            takes a moment to follow a job that trains: what an older one has answered is not kept.
    """

    def __init__(self, path: Path, state: str | None) -> None:
        self._path = path
        self._state = state

    def read(self) -> Any:
        """The answer; None when there is none yet."""
        try:
            text = self._path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        from openai.types import Completion
        from openai.types.chat import ChatCompletion

        kind = Completion if json.loads(text).get("object") == "text_completion" else ChatCompletion
        return kind.model_validate_json(text)

    def write(self, answer: Any) -> Any:
        """Keep it, completely or not at all; returns it."""
        if self._state is not None and answer.system_fingerprint != self._state:
            return answer
        write_chunks([answer.model_dump_json().encode()], self._path)
        return answer
