"""What models answer to rows. Those of one base are computed together: it is loaded once."""

from __future__ import annotations

import gc
import logging
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openweights.errors import ConfigError, DatasetError
from openweights.events import Stage
from openweights.generation.params import Completion, Delta, GenerationRequest, joined
from openweights.generation.prompts import token_logprobs
from openweights.jobs.inference.config import InferenceConfig
from openweights.jobs.inference.parts import Result
from openweights.jobs.inference.rows import Row, fitting_prompt, row_sampling
from openweights.jobs.model_source import ModelSource, fetch_model, stages
from openweights.models.names import location_here, model_reference

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from openweights import OpenWeights
    from openweights.generation.engine import GenerationEngine

logger = logging.getLogger(__name__)

AHEAD = 256  # requests for each process of an engine; it works on as many of them as it can

# Row, its result once it is whole, and tokens that are new since the last of these.
Answers = Iterator[tuple[int, Result | None, int]]


def given_answers(
    ow: OpenWeights,
    asked: Sequence[InferenceConfig],
    rows: Sequence[Row],
    left: Sequence[int],
    field: str,
    *,
    has_company: bool = False,
) -> Answers:
    """What models answer; the index counts the rows of all of them, model after model. Each model
    is loaded by the first word of it, which has no tokens.

    Args:
        asked: What is asked of each model.
        left: The answers that are wanted.
        field: Where rows come from, for what is said of one that cannot be answered.
        has_company: Another job may run on this machine, whose memory is not ours to take.
    """
    count = len(rows)
    wanted: dict[int, list[int]] = {}  # by the model's place, of those that are asked anything
    for index in left:
        wanted.setdefault(index // count, []).append(index % count)
    for group in _by_base(ow, {place: asked[place] for place in sorted(wanted)}):
        for place, answers in _of_group(ow, group, asked, rows, wanted, field, has_company):
            yield place * count, None, 0
            for index, result, tokens in answers:
                yield place * count + index, result, tokens
        gc.collect()  # the next base needs the memory


# Models by their place: adapters on one base and the base itself, or one of OpenAI.
Group = dict[int, ModelSource | None]


def _by_base(ow: OpenWeights, asked: Mapping[int, InferenceConfig]) -> list[Group]:
    """Models that are computed together."""
    groups: dict[str, Group] = {}
    kinds = {place: model_reference(config.model).kind for place, config in asked.items()}
    if any(kind != "openai" for kind in kinds.values()):
        ow.run.log(Stage(doing="loading the model").data())  # torch is imported, to begin with
    # Repositories last: an adapter may name the commit of its base, which is taken then.
    for place, config in sorted(asked.items(), key=lambda item: kinds[item[0]] == "repository"):
        if kinds[place] == "openai":
            groups[config.model] = {place: None}
            continue
        source = fetch_model(ow, config.model, Path("model"), stages(logger, ow.run.log))
        groups.setdefault(location_here(source.base), {})[place] = source
    return list(groups.values())


def _of_group(
    ow: OpenWeights,
    group: Group,
    asked: Sequence[InferenceConfig],
    rows: Sequence[Row],
    wanted: Mapping[int, Sequence[int]],
    field: str,
    has_company: bool,
) -> Iterator[tuple[int, Answers]]:
    sources = {place: source for place, source in group.items() if source is not None}
    if not sources:
        from openweights.jobs.inference.openai_models import openai_answers

        (place,) = group
        yield place, openai_answers(ow, asked[place], rows, wanted[place])
        return
    from openweights.jobs.engine import open_engine
    from openweights.models.load import tokenizer_of
    from openweights.models.memory import wait_for_model

    first = next(iter(sources))
    if has_company:
        wait_for_model(sources[first].name, sources[first].base, stages(logger, ow.run.log))
    once = f", once for {len(sources)} models" if len(sources) > 1 else ""
    ow.run.log(Stage(doing=f"loading {sources[first].base_label}{once}").data())
    in_4bit = any(asked[place].in_4bit for place in sources)
    with open_engine(
        list(sources.values()), asked[first].engine, asked[first].chat_template, in_4bit=in_4bit
    ) as (engine, base_tokenizer):
        for place, source in sources.items():
            tokenizer, adapter = base_tokenizer, None
            if source.adapter is not None:
                adapter, template = source.name, asked[place].chat_template
                engine.set_adapter(adapter, source.adapter)
                tokenizer = tokenizer_of(str(source.adapter), source.base, template)
            if len(asked) > 1:
                ow.run.log(Stage(doing=f"asking {Path(source.name).name}").data())
                logger.info("asking %s", source.name)
            own = asked[place], rows, wanted[place], field
            yield place, engine_answers(engine, tokenizer, adapter, *own)
            if adapter is not None:
                engine.remove_adapter(adapter)


def engine_answers(
    engine: GenerationEngine,
    tokenizer: PreTrainedTokenizerBase,
    adapter: str | None,
    config: InferenceConfig,
    rows: Sequence[Row],
    left: Sequence[int],
    field: str = "input_file_id",
) -> Answers:
    """What a model answers to the rows `left`: each as soon as all its completions are there, and
    before that how it grows.

    Args:
        field: Where rows come from, for what is said of one that cannot be answered.
    """
    requests = _requests(engine, tokenizer, adapter, config, rows, left, field)
    grown: dict[str, list[list[Delta]]] = {}
    while True:
        for request in islice(requests, AHEAD * engine.replicas - len(grown)):
            engine.submit(request)
            grown[request.id] = [[] for _ in range(request.params.n)]
        if not grown:
            return
        finished: list[str] = []
        for delta in engine.step():
            samples = grown[delta.request_id]
            samples[delta.sample].append(delta)
            yield int(delta.request_id), None, len(delta.token_ids)
            if all(own and own[-1].finish_reason for own in samples):
                finished.append(delta.request_id)
        for name in finished:
            completions = [joined(own) for own in grown.pop(name)]
            yield int(name), _result(completions, tokenizer, config), 0


def _requests(
    engine: GenerationEngine,
    tokenizer: PreTrainedTokenizerBase,
    adapter: str | None,
    config: InferenceConfig,
    rows: Sequence[Row],
    left: Sequence[int],
    field: str,
) -> Iterator[GenerationRequest]:
    """All of them, which are looked at before the first is answered: a row that cannot be is said
    at once.
    """
    from openweights.models.tokens import eos_token_ids

    limit = min(config.max_model_len, engine.max_length)
    # An adapter may come with a tokenizer, or a template, that ends turns as its base's does not.
    ends = tuple(dict.fromkeys((*engine.end_token_ids, *eos_token_ids(None, tokenizer))))
    prompts: list[array[int]] = []  # 4 bytes a token; of many rows all else is made when needed
    for index in left:
        try:
            prompts.append(array("i", fitting_prompt(rows[index], tokenizer, config, limit)))
        except ConfigError:
            raise
        except ValueError as error:
            raise DatasetError(f"{field}: row {index + 1}: {error}") from None
    for index, prompt in zip(left, prompts, strict=True):
        params = row_sampling(rows[index], index, config, limit - len(prompt))
        params = replace(params, stop_token_ids=ends)
        yield GenerationRequest(prompt.tolist(), params, adapter, str(index))


def _result(
    completions: Sequence[Completion], tokenizer: PreTrainedTokenizerBase, config: InferenceConfig
) -> Result:
    texts: list[Any] = [completion.text for completion in completions]
    values: list[Any] = [None] * len(completions)
    if config.logprobs is not None:
        values = [token_logprobs(tokenizer, completion) for completion in completions]
    if config.n_completions_per_prompt == 1:
        return {"completion": texts[0], "logprobs": values[0]}
    return {"completion": texts, "logprobs": values if config.logprobs is not None else None}
