"""`ow.chat`: ask any model by its name. What is not OpenAI's is deployed when it is first asked."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openweights.client.serving.openai_clients import Clients
from openweights.client.serving.temporary_api import TemporaryApi
from openweights.errors import ConfigError, NotFoundError, PlatformError

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
    """Whether a model is asked at OpenAI."""
    return model.startswith(_OPENAI) or ("/" not in model and model.startswith(_OPENAI_NAMES))


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
            PlatformError: The deployment does not answer; why, as far as it is known.
            JobFailedError: The model cannot be deployed; the message has the end of the log.
        """
        cached = self._deployments.cached(model, cache, params)
        if cached is not None and (known := cached.read()) is not None:
            return known
        ask = self._deployments.target(model).result()
        try:
            client: Any = ask.clients.sync
            endpoint = client.chat.completions if self._of_chats else client.completions
            answer = endpoint.create(model=ask.name, **_with_timeout(params))
        except Exception as error:
            raise ask.explained(error) from error
        return answer if cached is None else cached.write(answer)


class AsyncCompletions:
    """Asks without blocking the event loop."""

    def __init__(self, deployments: Deployments) -> None:
        self._deployments = deployments

    async def create(self, *, model: str, cache: bool | str | Path = False, **params: Any) -> Any:
        """See `Completions.create`."""
        cached = self._deployments.cached(model, cache, params)
        if cached is not None and (known := cached.read()) is not None:
            return known
        ask = await asyncio.wrap_future(self._deployments.target(model))
        try:
            completions: Any = ask.clients.asynchronous.chat.completions
            answer = await completions.create(model=ask.name, **_with_timeout(params))
        except Exception as error:
            raise ask.explained(error) from error
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
            return error
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
        self._wanted: list[str] = []

    def target(self, model: str) -> Future[Target]:
        """Whom to ask for the model; deployed if need be."""
        with self._lock:
            known = self._targets.get(model)
            if known is not None and not self._is_gone(model, known):
                return known
            future = self._targets[model] = Future[Target]()
            if is_openai(model):
                name = model.removeprefix(_OPENAI)
                _resolve(future, lambda: Target(Clients(retries=OPENAI_RETRIES), name))
                return future
            if not self._wanted:
                threading.Timer(GROUP_S, self._deploy_wanted).start()
            self._wanted.append(model)
            return future

    def kill(self, model: str) -> None:
        """End the deployment of a model, with all that it serves."""
        with self._lock:
            api = self._apis.get(model)
            if api is None:
                known = ", ".join(self._apis) or "none"
                raise NotFoundError(f"{model} has no deployment here (there are: {known})")
            for name in [name for name, other in self._apis.items() if other is api]:
                del self._apis[name], self._targets[name]
        api.down()

    def close(self) -> None:
        """End all deployments."""
        for api in {id(api): api for api in self._apis.values()}.values():
            api.down()
        self._apis.clear()
        self._targets.clear()

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
        asked = {"model": model, "state": self._state_of(model), **params}
        text = json.dumps(asked, sort_keys=True, default=str)
        return CachedAnswer(folder / f"{hashlib.sha256(text.encode()).hexdigest()}.json")

    def _is_gone(self, model: str, known: Future[Target]) -> bool:
        """Whether it failed, or its deployment has ended meanwhile."""
        if not known.done():
            return False
        return known.exception() is not None or known.result().is_lost

    def _state_of(self, model: str) -> str | None:
        """What tells apart the models that a fine-tuning job is while it trains."""
        try:
            job = self._ow.backend.get_job(model)
        except NotFoundError:
            return None
        return None if job.status == "completed" else job.updated_at.isoformat()

    def _deploy_wanted(self) -> None:
        with self._lock:
            wanted, self._wanted = self._wanted, []
        self._deploy(wanted)

    def _deploy(self, wanted: Sequence[str]) -> None:
        try:
            apis = self._ow.api.multi_deploy(wanted, **self._deploy_kwargs)
        except Exception as error:  # noqa: BLE001 - those who wait for it are told
            if len(wanted) == 1:
                self._targets[wanted[0]].set_exception(error)
                return
            # One that cannot be deployed keeps nobody from asking the others.
            for model in wanted:
                self._deploy([model])
            return
        for model in wanted:
            api = apis[model]
            future = self._targets[model]
            thread = threading.Thread(target=self._bring_up, args=(model, api, future))
            thread.start()

    def _bring_up(self, model: str, api: TemporaryApi, future: Future[Target]) -> None:
        def target() -> Target:
            api.up()
            return Target(api.clients, model, api)

        with self._lock:
            self._apis[model] = api
        _resolve(future, target)


def _resolve(future: Future[Target], make: Any) -> None:
    try:
        future.set_result(make())
    except Exception as error:  # noqa: BLE001 - whoever waits for it is told
        future.set_exception(error)


class CachedAnswer:
    """An answer on disk."""

    def __init__(self, path: Path) -> None:
        self._path = path

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
        self._path.parent.mkdir(parents=True, exist_ok=True)
        partial = self._path.with_name(f".{self._path.name}.{threading.get_ident()}")
        partial.write_text(answer.model_dump_json(), encoding="utf-8")
        partial.replace(self._path)
        return answer
