"""One engine over several processes: on a CPU two of them, as a job with two GPUs has."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from openweights.errors import ConfigError, InvalidStateError, PlatformError
from openweights.generation.engine_thread import EngineThread
from openweights.generation.params import GenerationRequest, SamplingParams
from openweights.generation.replicas import Opening, ReplicatedEngine, open_replicated
from tests.tiny_model import make_tiny_model

PARAMS = SamplingParams(max_new_tokens=9, stop_token_ids=())


@pytest.fixture(scope="module")
def opening(tmp_path_factory: pytest.TempPathFactory) -> Opening:
    folder = make_tiny_model(tmp_path_factory.mktemp("tiny"))
    torch.manual_seed(1)
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), lora)
    model.save_pretrained(folder / "adapter")
    return Opening(str(folder), "transformers", rows=4)


@pytest.fixture(scope="module")
def opened() -> Iterator[list[ReplicatedEngine]]:
    engines: list[ReplicatedEngine] = []
    yield engines
    for engine in engines:
        engine.close()


@pytest.fixture
def replicated(opening: Opening, opened: list[ReplicatedEngine]) -> ReplicatedEngine:
    """One for all tests; a new one where a test has killed a process of it."""
    if not opened or None in opened[-1].loads:
        engine, _ = open_replicated(opening, 2)
        assert isinstance(engine, ReplicatedEngine)
        opened.append(engine)
    return opened[-1]


def requests(count: int, adapter: str | None = None) -> list[GenerationRequest]:
    return [
        GenerationRequest([10 + i % 7, 20, 30], replace(PARAMS, seed=i, n=1 + i % 3), adapter)
        for i in range(count)
    ]


def test_completions_are_those_of_one_process(
    opening: Opening, replicated: ReplicatedEngine
) -> None:
    alone, _ = opening.open()
    folder = Path(opening.base) / "adapter"
    for engine in (alone, replicated):
        engine.set_adapter("mine", folder)
    asked = [*requests(12), *requests(12, "mine")]
    expected, found = (
        [[completion.token_ids for completion in own] for own in engine.generate(asked)]
        for engine in (alone, replicated)
    )
    assert found == expected
    assert expected[:12] != expected[12:], "the control: the adapter counts"
    assert replicated.is_idle and replicated.loads == [0, 0]
    replicated.remove_adapter("mine")
    with pytest.raises(ConfigError, match="mine"):
        replicated.submit(asked[-1])


def test_the_work_is_shared_and_what_is_aborted_is_forgotten(
    replicated: ReplicatedEngine,
) -> None:
    long = replace(PARAMS, max_new_tokens=400)
    for index in range(6):
        replicated.submit(GenerationRequest([5, index], long, id=str(index)))
    assert replicated.loads == [3, 3]
    replicated.step()
    for index in range(6):
        replicated.abort(str(index))
    assert replicated.is_idle and replicated.loads == [0, 0]
    # The same ids again: late news of the aborted requests are not theirs.
    [[own], *_] = replicated.generate([GenerationRequest([5], PARAMS) for _ in range(6)])
    assert len(own.token_ids) == 9


def test_an_adapter_in_use_stays(opening: Opening, replicated: ReplicatedEngine) -> None:
    folder = Path(opening.base) / "adapter"
    replicated.set_adapter("busy", folder)
    for index in range(2):  # one in each process
        replicated.submit(GenerationRequest([5], PARAMS, "busy", id=str(index)))
    with pytest.raises(InvalidStateError, match="busy"):
        replicated.remove_adapter("busy")
    for index in range(2):
        replicated.abort(str(index))
    replicated.remove_adapter("busy")


def test_many_clients_of_one_address(opening: Opening, replicated: ReplicatedEngine) -> None:
    alone, _ = opening.open()
    asked = [GenerationRequest([5, i], replace(PARAMS, seed=i)) for i in range(40)]
    expected = [own[0].token_ids for own in alone.generate(asked)]

    async def ask_all() -> list[list[int]]:
        thread = EngineThread(replicated, asyncio.get_running_loop())

        async def ask(request: GenerationRequest) -> list[int]:
            return [token async for d in thread.stream(request) for token in d.token_ids]

        try:
            return await asyncio.gather(*map(ask, asked))
        finally:
            thread.close()

    assert asyncio.run(ask_all()) == expected
    assert replicated.is_idle and replicated.loads == [0, 0]


def test_a_process_that_is_killed_is_told_of_and_the_others_go_on(
    replicated: ReplicatedEngine,
) -> None:
    engine = replicated
    [number] = engine.process_ids
    long = replace(PARAMS, max_new_tokens=400)
    for index in range(2):
        engine.submit(GenerationRequest([5], long, id=str(index)))
    os.kill(number, signal.SIGKILL)
    with pytest.raises(PlatformError, match="GPU 1 ended by itself"):
        while True:
            engine.step()
    for index in range(2):
        engine.abort(str(index))
    assert engine.loads == [0, None]
    found = engine.generate(requests(4))
    assert [len(own) for own in found] == [1, 2, 3, 1]
