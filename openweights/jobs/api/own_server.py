"""A deployment by our own server. It follows fine-tuning jobs: a new checkpoint is served as soon
as it is in the store.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import uvicorn

from openweights.errors import ConfigError, InvalidStateError, OpenWeightsError
from openweights.events import Stage
from openweights.generation.engine_thread import EngineThread
from openweights.generation.replicas import Opening, open_replicated
from openweights.generation.server import ModelServer, ServedModel
from openweights.jobs.api.deployment import (
    LOOK_S,
    Place,
    Use,
    end_unused,
    is_followed,
    tell_served,
)
from openweights.jobs.model_source import ModelSource, fetch_model, stages
from openweights.jobs.pinning import pinned_model
from openweights.models.load import tokenizer_of
from openweights.models.memory import wait_for_model
from openweights.settings import Settings

if TYPE_CHECKING:
    from openweights import OpenWeights
    from openweights.jobs.api import ApiConfig

logger = logging.getLogger(__name__)

_GRACE_S = 2  # for answers that are being given when it ends


async def serve_own(
    ow: OpenWeights,
    config: ApiConfig,
    base: ModelSource,
    fixed: Sequence[ModelSource],
    place: Place,
    use: Use | None = None,
) -> None:
    """Serve until nobody uses it, or until it is told to stop.

    Args:
        fixed: The adapters on it that do not change while they are served.
        use: What alone uses it, and is told its address.

    Raises:
        ConfigError: A model cannot be loaded; one line that says why.
    """
    wait_for_model(base.name, base.base, stages(logger, ow.run.log))
    ow.run.log(Stage(doing=f"loading {base.base_label}").data())
    opening = Opening(
        base.base,
        config.engine,
        config.chat_template,
        rows=config.max_num_seqs,
        adapters=tuple(map(_folder, fixed)),
    )
    engine, tokenizer = open_replicated(opening, Settings.from_env().n_gpus)
    models = {config.model: ServedModel(None, tokenizer)}
    for source in fixed:
        engine.set_adapter(source.name, _folder(source))
        models[source.name] = ServedModel(source.name, _tokenizer(source, config))
    limit = min(config.max_model_len, engine.max_length)
    thread = EngineThread(engine, asyncio.get_running_loop())
    server = ModelServer(thread, models, limit, str(config.api_key))
    follower = _Follower(ow, config, server)
    await follower.look()
    options: Any = {"log_level": "warning", "timeout_graceful_shutdown": _GRACE_S}
    http = uvicorn.Server(uvicorn.Config(server.app(), **options))
    if use is None:
        watching = asyncio.create_task(_watch(ow, config, server, follower, http, place))
    else:
        watching = asyncio.create_task(_use(http, place, use))
    try:
        await http.serve(sockets=[place.listening])
        if use is not None:
            await watching  # what it raises is the job's
    finally:
        watching.cancel()
        thread.close()


async def _use(http: uvicorn.Server, place: Place, use: Use) -> None:
    try:
        await _started(http)
        await asyncio.to_thread(use, place.base_url)
    finally:
        http.should_exit = True


async def _started(http: uvicorn.Server) -> None:
    while not http.started:
        await asyncio.sleep(0.02)


async def _watch(
    ow: OpenWeights,
    config: ApiConfig,
    server: ModelServer,
    follower: _Follower,
    http: uvicorn.Server,
    place: Place,
) -> None:
    await _started(http)
    await asyncio.to_thread(tell_served, ow, place, list(server.models))
    while server.idle_s() < config.idle_timeout:
        await asyncio.sleep(min(LOOK_S, config.idle_timeout / 4))
        await follower.look()
    await asyncio.to_thread(end_unused, ow, config.idle_timeout)
    http.should_exit = True


class _Follower:
    """Keeps the adapters of fine-tuning jobs at their newest kept checkpoint, and in the end at
    their result.
    """

    def __init__(self, ow: OpenWeights, config: ApiConfig, server: ModelServer) -> None:
        self._ow, self._config, self._server = ow, config, server
        self._open = [name for name in config.lora_adapters if is_followed(name)]
        self._served: dict[str, str] = {}  # job -> what of it is served
        self._old: list[str] = []  # adapters that requests may still use
        self._told: dict[str, str] = {}  # job -> why it is not served

    async def look(self) -> None:
        """Serve what is new."""
        for name in list(self._open):
            try:
                await self._follow(name)
            except OpenWeightsError as error:
                if self._told.get(name) != str(error):
                    logger.info("%s is not served: %s", name, error)
                self._told[name] = str(error)
        for adapter in list(self._old):
            try:
                await self._server.engine.call(lambda e, a=adapter: e.remove_adapter(a))
            except InvalidStateError:
                continue
            self._old.remove(adapter)

    async def _follow(self, name: str) -> None:
        newest = await asyncio.to_thread(pinned_model, self._ow, name)
        before = self._served.get(name)
        if newest != before:
            source = await asyncio.to_thread(fetch_model, self._ow, newest, Path("model"))
            tokenizer = await asyncio.to_thread(_tokenizer, source, self._config)
            folder = _folder(source)
            await self._server.engine.call(lambda engine: engine.set_adapter(newest, folder))
            self._server.models[name] = ServedModel(newest, tokenizer)
            self._served[name] = newest
            logger.info("%s is served from %s", name, newest)
            if before is not None:
                self._old.append(before)
        if newest == name:
            self._open.remove(name)


def _folder(source: ModelSource) -> Path:
    if source.adapter is None:
        raise ConfigError(f"lora_adapters: {source.name} is a model, not an adapter")
    return source.adapter


def _tokenizer(source: ModelSource, config: ApiConfig) -> Any:
    return tokenizer_of(str(_folder(source)), source.base, config.chat_template)
