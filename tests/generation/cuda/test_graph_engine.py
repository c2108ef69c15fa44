"""How the `cuda_graph` engine shares its cache among requests that come while it is at work."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from transformers import LlamaConfig

from openweights.generation.cuda.graph_engine import CudaGraphEngine
from openweights.generation.params import Delta, GenerationRequest, SamplingParams, joined
from tests.generation.cuda.test_decoder import ATTENTION, make_model

PARAMS = SamplingParams(max_new_tokens=40, stop_token_ids=(), detokenize=False, seed=3)


def engine_at_work() -> CudaGraphEngine:
    """With a small request, for which the cache has been made."""
    model: Any = make_model(LlamaConfig, ATTENTION, max_position_embeddings=1024)
    engine = CudaGraphEngine(model, None, page_size=4)
    engine.submit(GenerationRequest([5, 6], replace(PARAMS, max_new_tokens=120), id="first"))
    engine.step()
    return engine


def finished(engine: CudaGraphEngine) -> tuple[dict[str, list[int]], list[str], int]:
    """Completions by id, ids in the order of their ends, and the steps that it took."""
    deltas: dict[str, list[Delta]] = {}
    ended, steps = list[str](), 0
    while not engine.is_idle:
        steps += 1
        for delta in engine.step():
            deltas.setdefault(delta.request_id, []).append(delta)
            if delta.finish_reason:
                ended.append(delta.request_id)
    del deltas["first"]  # whose beginning is not here
    return {name: joined(own).token_ids for name, own in deltas.items()}, ended, steps


def test_many_that_come_later_are_worked_on_together() -> None:
    prompts = {str(i): [i + 1] * (20 + i) for i in range(30)}
    alone = engine_at_work()
    finished(alone)
    expected = alone.generate([GenerationRequest(p, PARAMS) for p in prompts.values()])
    engine = engine_at_work()
    for name, prompt in prompts.items():
        engine.submit(GenerationRequest(prompt, PARAMS, id=name))
    found, _, steps = finished(engine)
    assert found == {name: own[0].token_ids for name, own in zip(prompts, expected, strict=True)}
    assert steps < 12, "with the first cache, four at a time, it takes three times as many"


def test_one_that_is_larger_than_the_cache_does_not_wait_for_all_others() -> None:
    engine = engine_at_work()
    large = GenerationRequest([7] * 400, replace(PARAMS, max_new_tokens=2), id="large")
    engine.submit(large)
    found, ended, _ = finished(engine)
    assert ended == ["large", "first"] and len(found["large"]) == 2
    assert [found["large"]] == [own.token_ids for own in engine.generate([large])[0]]
