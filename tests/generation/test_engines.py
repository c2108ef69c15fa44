"""What every engine must do. An engine joins by its name in `ENGINES`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig, MixtralForCausalLM

from openweights.errors import ConfigError, InvalidStateError
from openweights.generation.cuda.graph_engine import CudaGraphEngine
from openweights.generation.engine import GenerationEngine
from openweights.generation.params import (
    Completion,
    Delta,
    GenerationRequest,
    SamplingParams,
    derived_seed,
    joined,
)
from openweights.generation.transformers_engine import TransformersEngine
from openweights.models.log_probs import all_log_probs
from tests.tiny_model import make_tiny_model

ENGINES = {"transformers": TransformersEngine, "cuda_graph": CudaGraphEngine}
PROMPTS = [[10, 11, 12], [40], [7, 8, 9, 10, 11, 12, 13, 14], [99, 5], [*range(60, 120)]]
GREEDY = SamplingParams(temperature=0, max_new_tokens=12, stop_token_ids=())


class Subject:
    """A tiny model with two adapters, "one" (active) and "two", and an engine on it."""

    def __init__(self, name: str, folder: Path) -> None:
        self.folder = folder
        # Where there is no GPU, `cuda_graph` computes all but its kernels in the same way.
        device = "cuda" if name == "cuda_graph" and torch.cuda.is_available() else "cpu"
        base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device)
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        lora = LoraConfig(r=4, lora_alpha=16, target_modules="all-linear", lora_dropout=0.5)
        self.model: Any = get_peft_model(base, lora, adapter_name="one")
        self.model.add_adapter("two", lora)
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter_name, parameter in self.model.named_parameters():
                if "lora_B" in parameter_name:
                    parameter.normal_(0, 0.1)
        self.model.eval()
        self.engine: GenerationEngine = ENGINES[name](self.model, self.tokenizer)

    @torch.no_grad()
    def logits(self, ids: Sequence[int], adapter: str | None = "one") -> torch.Tensor:
        """(T, V) by a plain forward, without cache or padding."""
        given = torch.tensor([list(ids)], device=self.model.device)
        names = [adapter or "__base__"]
        return self.model(given, adapter_names=names).logits[0]

    def greedy(self, prompt: Sequence[int], count: int, adapter: str | None = "one") -> list[int]:
        ids = list(prompt)
        for _ in range(count):
            ids.append(int(self.logits(ids, adapter)[-1].argmax()))
        return ids[len(prompt) :]

    def complete(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, adapter: str | None = "one"
    ) -> list[Completion]:
        """One completion each."""
        requests = [GenerationRequest(prompt, params, adapter) for prompt in prompts]
        return [own[0] for own in self.engine.generate(requests)]


@pytest.fixture(scope="module", params=ENGINES)
def subject(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Subject]:
    folder = make_tiny_model(tmp_path_factory.mktemp("model"), head_dim=32)
    yield Subject(request.param, folder)


def seeded(count: int, params: SamplingParams) -> list[GenerationRequest]:
    """The same prompt so many times, each with a seed of its own."""
    return [GenerationRequest(PROMPTS[0], params.with_seed(3, i), "one") for i in range(count)]


def test_greedy_equals_the_model_alone_and_generate_of_transformers(subject: Subject) -> None:
    found = subject.complete(PROMPTS, GREEDY)
    assert [c.token_ids for c in found] == [subject.greedy(prompt, 12) for prompt in PROMPTS]
    assert {c.finish_reason for c in found} == {"length"}
    prompt = torch.tensor([PROMPTS[2]], device=subject.model.device)
    own = subject.model.generate(
        input_ids=prompt, do_sample=False, max_new_tokens=12, eos_token_id=None, pad_token_id=3
    )
    assert own[0, len(PROMPTS[2]) :].tolist() == found[2].token_ids


def test_each_row_has_its_own_adapter(subject: Subject) -> None:
    names = ["one", "two", None, "two", None]
    requests = [
        GenerationRequest(prompt, GREEDY, name) for prompt, name in zip(PROMPTS, names, strict=True)
    ]
    found = [own[0].token_ids for own in subject.engine.generate(requests)]
    alone = [subject.greedy(p, 12, name) for p, name in zip(PROMPTS, names, strict=True)]
    assert found == alone
    assert subject.greedy(PROMPTS[0], 12) != subject.greedy(PROMPTS[0], 12, "two"), "the control"
    assert subject.model.active_adapter == "one"


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probabilities_equal_a_plain_forward(subject: Subject, temperature: float) -> None:
    params = SamplingParams(
        max_new_tokens=10, temperature=temperature, top_k=50, logprobs=True, top_logprobs=3
    )
    after = replace(params, logprobs_after_temperature=True)
    for prompt in PROMPTS:
        own, scaled = (
            subject.engine.generate([GenerationRequest(prompt, p, "one")])[0][0]
            for p in (params, after)
        )
        assert own.token_ids == scaled.token_ids
        ids = [*prompt, *own.token_ids]
        logits = subject.logits(ids)[len(prompt) - 1 : -1].double().cpu()
        tokens = torch.tensor(own.token_ids)[:, None]
        # Both sum in float32, in other orders: scores of a magnitude have errors of it.
        bound = max(1e-5, 2.0**-17 * float(logits.abs().max()))
        for divisor, found in ((1.0, own), (temperature, scaled)):
            expected = (logits / divisor).log_softmax(-1)
            values = torch.tensor(found.logprobs, dtype=torch.float64)
            assert float((values - expected.gather(1, tokens)[:, 0]).abs().max()) < bound
            for step, top in enumerate(found.top_logprobs):
                best, best_ids = expected[step].topk(3)
                assert list(top) == best_ids.tolist()
                assert (
                    max(abs(a - float(b)) for a, b in zip(top.values(), best, strict=True)) < bound
                )


def test_a_completion_does_not_depend_on_what_else_is_in_the_batch(subject: Subject) -> None:
    """Nor on their order, number, limits, adapters, or when they come."""
    params = SamplingParams(max_new_tokens=20, seed=11)
    alone = [subject.complete([prompt], params)[0] for prompt in PROMPTS]
    assert [c.token_ids for c in subject.complete(PROMPTS, params)] == [c.token_ids for c in alone]
    crowd = [
        GenerationRequest([50 + i], SamplingParams(max_new_tokens=3 + i, top_p=0.5, n=3), "two")
        for i in range(14)
    ]
    requests = [*crowd, *[GenerationRequest(p, params, "one") for p in PROMPTS], *crowd]
    found = subject.engine.generate(requests)[14:19]
    assert [own[0].token_ids for own in found] == [c.token_ids for c in alone]
    other = subject.complete(PROMPTS, replace(params, seed=12))
    assert all(a.token_ids != b.token_ids for a, b in zip(alone, other, strict=True))


def test_samples_of_a_prompt_are_those_it_has_alone_and_differ(subject: Subject) -> None:
    params = SamplingParams(max_new_tokens=8, n=6, seed=4)
    several = subject.engine.generate([GenerationRequest(p, params, "one") for p in PROMPTS])
    assert [len(own) for own in several] == [6] * 5
    assert len({tuple(c.token_ids) for c in several[0]}) == 6
    single = subject.complete(PROMPTS, replace(params, n=1))
    assert [own[0].token_ids for own in several] == [c.token_ids for c in single]


@pytest.mark.parametrize(
    "limits", [{}, {"temperature": 2.0}, {"top_k": 5}, {"top_p": 0.7}, {"min_p": 0.1}]
)
def test_first_tokens_have_the_distribution_that_is_asked_for(
    subject: Subject, limits: dict[str, Any]
) -> None:
    """Chi-square over the ten likeliest tokens and the rest."""
    count = 2_000
    params = SamplingParams(max_new_tokens=1, stop_token_ids=(), **limits)
    drawn = torch.tensor(
        [own[0].token_ids[0] for own in subject.engine.generate(seeded(count, params))]
    )

    def statistic(scale: float) -> float:
        logits = subject.logits(PROMPTS[0])[-1].double().cpu() / (params.temperature * scale)
        shares = _limited(logits.softmax(-1), params)
        top, ids = shares.topk(10)
        used = top > 0
        seen = torch.stack([(drawn == i).sum() for i in ids]).double()
        rest, others = 1 - float(top.sum()), count - float(seen.sum())
        value = float(((seen - top * count) ** 2 / (top * count))[used].sum())
        assert scale != 1 or others == 0 or rest > 0
        return value + ((others - rest * count) ** 2 / (rest * count) if rest > 1e-9 else 0)

    critical = 29.59  # at most 10 degrees of freedom, p = 0.001; the seeds are fixed
    assert statistic(1) < critical
    assert statistic(1.5) > critical or params.top_k is not None


def _limited(shares: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    ordered, ids = shares.sort(descending=True)
    ordered[params.top_k or len(ordered) :] = 0
    ordered[ordered.cumsum(-1) - ordered >= params.top_p * ordered.sum()] = 0
    ordered[ordered < params.min_p * ordered[0]] = 0
    return torch.zeros_like(shares).scatter_(0, ids, ordered / ordered.sum())


def test_every_end_token_ends_a_completion_and_belongs_to_it(subject: Subject) -> None:
    ends = (20, 30, 40, 50, 60, 70, 80, 90, 100, 110)
    params = SamplingParams(max_new_tokens=40, temperature=5.0, stop_token_ids=ends)
    found = [own[0] for own in subject.engine.generate(seeded(64, params))]
    assert len({c.token_ids[-1] for c in found if c.ended}) > 1, "more than one of the ids was met"
    for completion in found:
        ids = completion.token_ids
        assert completion.ended == (ids[-1] in ends) and not set(ids[:-1]) & set(ends)
        assert completion.ended or len(ids) == 40
    late = replace(params, min_new_tokens=25)
    found = [own[0] for own in subject.engine.generate(seeded(64, late))]
    assert 25 <= min(len(c.token_ids) for c in found) < 35


def test_the_models_own_ends_count_unless_others_are_named(subject: Subject) -> None:
    assert set(subject.engine.end_token_ids) == {0, 2}
    params = SamplingParams(max_new_tokens=250, temperature=3.0)
    found = [own[0] for own in subject.engine.generate(seeded(16, params))]
    assert {c.token_ids[-1] for c in found if c.ended} == {0, 2}


def test_stop_texts_end_a_completion_before_them(subject: Subject) -> None:
    free = [
        own[0]
        for own in subject.engine.generate(
            seeded(16, SamplingParams(max_new_tokens=60, temperature=2.0, stop_token_ids=()))
        )
    ]
    stops = ("e", "th", "\x01q")
    params = SamplingParams(max_new_tokens=60, temperature=2.0, stop_token_ids=(), stop=stops)
    stopped = [own[0] for own in subject.engine.generate(seeded(16, params))]
    assert any(c.ended for c in stopped)
    for whole, cut in zip(free, stopped, strict=True):
        assert whole.token_ids[: len(cut.token_ids)] == cut.token_ids
        places = [whole.text.index(s) for s in stops if s in whole.text]
        assert cut.ended == bool(places)
        assert not places or cut.text == whole.text[: len(cut.text)]
        assert not any(stop in cut.text for stop in stops)


def test_penalties_keep_a_greedy_completion_from_repeating_itself(subject: Subject) -> None:
    params = replace(GREEDY, max_new_tokens=30)
    plain = subject.complete(PROMPTS, params)
    mixed = subject.engine.generate(
        [
            *[GenerationRequest(p, replace(params, frequency_penalty=2), "one") for p in PROMPTS],
            *[GenerationRequest(p, params, "one") for p in PROMPTS],
        ]
    )
    assert [own[0].token_ids for own in mixed[5:]] == [c.token_ids for c in plain]
    for own, before in zip(mixed[:5], plain, strict=True):
        assert len(set(own[0].token_ids)) > len(set(before.token_ids))
    ids = list(PROMPTS[0])
    for _ in range(30):
        logits = subject.logits(ids)[-1].cpu()
        counts = torch.bincount(torch.tensor(ids[3:], dtype=torch.long), minlength=len(logits))
        ids.append(int((logits - 2 * counts).argmax()))
    assert mixed[0][0].token_ids == ids[3:]


@pytest.mark.parametrize("first", [0.0, 2.0])
def test_requests_with_penalties_and_without_join_each_other(
    subject: Subject, first: float
) -> None:
    """Those that come later find a batch that grows already."""
    both = [replace(GREEDY, frequency_penalty=penalty) for penalty in (first, 2 - first)]
    alone = [subject.complete(PROMPTS, params) for params in both]
    names = [f"{which}{index}" for which in range(2) for index in range(len(PROMPTS))]
    requests = [
        GenerationRequest(prompt, params, "one", id=name)
        for name, (params, prompt) in zip(names, product(both, PROMPTS), strict=True)
    ]
    for request in requests[: len(PROMPTS)]:
        subject.engine.submit(request)
    deltas = subject.engine.step()
    for request in requests[len(PROMPTS) :]:
        subject.engine.submit(request)
    while not subject.engine.is_idle:
        deltas += subject.engine.step()
    found = [joined([d for d in deltas if d.request_id == name]).token_ids for name in names]
    assert found == [c.token_ids for own in alone for c in own]


def test_a_stream_tells_every_request_as_it_grows(subject: Subject) -> None:
    params = SamplingParams(max_new_tokens=30, n=2, logprobs=True)
    requests = [
        GenerationRequest(prompt, params, "one", id=f"r{index}")
        for index, prompt in enumerate(PROMPTS)
    ]
    parts: dict[tuple[str, int], list[Delta]] = {}
    for delta in subject.engine.stream(requests):
        parts.setdefault((delta.request_id, delta.sample), []).append(delta)
    whole = subject.engine.generate(requests)
    for (name, sample), deltas in parts.items():
        assert joined(deltas).token_ids == whole[int(name[1:])][sample].token_ids
        assert joined(deltas).text == whole[int(name[1:])][sample].text
        assert len(deltas) > 1 or len(deltas[0].token_ids) < 17, "not all at the end"
    assert len(parts) == 10


def test_an_aborted_request_leaves_and_the_others_do_not_notice(subject: Subject) -> None:
    engine = subject.engine
    params = SamplingParams(max_new_tokens=40, stop_token_ids=(), seed=2)
    expected = subject.complete(PROMPTS, params)
    for index, prompt in enumerate(PROMPTS):
        engine.submit(GenerationRequest(prompt, params, "one", id=str(index)))
    deltas = engine.step()
    engine.abort("1")
    engine.abort("unknown")
    engine.submit(GenerationRequest(PROMPTS[0], params, "one", id="late"))
    after: list[Delta] = []
    while not engine.is_idle:
        after += engine.step()
    assert "1" not in {d.request_id for d in after}
    for name, index in (("0", 0), ("2", 2), ("3", 3), ("4", 4), ("late", 0)):
        own = joined([d for d in [*deltas, *after] if d.request_id == name])
        assert own.token_ids == expected[index].token_ids
    assert engine.step() == []


def test_a_closed_stream_leaves_the_engine_idle(subject: Subject) -> None:
    params = SamplingParams(max_new_tokens=40, stop_token_ids=())
    stream = subject.engine.stream([GenerationRequest(p, params, id=str(p)) for p in PROMPTS])
    next(stream)
    with pytest.raises(InvalidStateError, match="has requests"):
        subject.engine.generate([GenerationRequest(PROMPTS[0])])
    stream.close()  # type: ignore[attr-defined]
    assert subject.engine.is_idle


def test_a_failed_step_leaves_nothing_behind(subject: Subject) -> None:
    """Nor keys and values that were never computed, in pages that others with that prompt share."""
    prompts = [[*range(60, 260)], [*range(60, 250), 5]]
    expected = [subject.greedy(prompt, 12) for prompt in prompts]
    trained = [p for p in subject.model.parameters() if p.requires_grad]
    subject.model.requires_grad_(False)  # what may be trained is computed anew anyway
    embedding = subject.model.get_input_embeddings().weight
    right = embedding.data
    embedding.data = right.double()  # which no layer takes
    with pytest.raises(RuntimeError, match="dtype"):
        subject.complete(prompts, GREEDY)
    embedding.data = right
    assert subject.engine.is_idle
    assert [c.token_ids for c in subject.complete(prompts, GREEDY)] == expected
    for parameter in trained:
        parameter.requires_grad_(True)


def test_sampling_leaves_the_process_and_the_model_as_they_were(subject: Subject) -> None:
    params = SamplingParams(max_new_tokens=8, seed=1)
    plain = subject.complete(PROMPTS, params)
    own = subject.model.generation_config
    own.update(repetition_penalty=5.0, top_k=1, min_p=0.9)
    subject.model.train()
    needs = [p.requires_grad for p in subject.model.parameters()]
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    try:
        assert subject.complete(PROMPTS, params) == plain, "nor does its dropout count"
        assert subject.model.training and torch.equal(torch.rand(3), expected)
        assert [p.requires_grad for p in subject.model.parameters()] == needs
    finally:
        subject.model.eval()
        own.update(repetition_penalty=None, top_k=None, min_p=None)


def test_current_weights_are_used(subject: Subject) -> None:
    with torch.no_grad():
        changed = [p for n, p in subject.model.named_parameters() if "lora_B.one" in n]
        before = [p.clone() for p in changed]
        for parameter in changed:
            parameter.mul_(-2)
        try:
            own = subject.complete(PROMPTS[:2], GREEDY)
            assert [c.token_ids for c in own] == [subject.greedy(p, 12) for p in PROMPTS[:2]]
        finally:
            for parameter, kept in zip(changed, before, strict=True):
                parameter.copy_(kept)


def test_adapters_come_and_go(subject: Subject, tmp_path: Path) -> None:
    engine = subject.engine
    subject.model.save_pretrained(tmp_path, selected_adapters=["two"])
    engine.set_adapter("copy", tmp_path / "two")
    assert set(engine.adapters) == {"one", "two", "copy"}
    params = replace(GREEDY, max_new_tokens=6)
    expected = subject.complete(PROMPTS, params, "two")
    assert subject.complete(PROMPTS, params, "copy") == expected
    engine.submit(GenerationRequest([5], params, "copy", id="x"))
    for change in (
        partial(engine.set_adapter, "copy", tmp_path / "two"),
        partial(engine.remove_adapter, "copy"),
    ):
        with pytest.raises(InvalidStateError, match="copy"):
            change()
    engine.abort("x")
    engine.set_adapter("copy", tmp_path / "two")
    engine.remove_adapter("copy")
    assert set(engine.adapters) == {"one", "two"}
    assert subject.complete(PROMPTS, params, "two") == expected
    with pytest.raises(ConfigError, match="copy"):
        engine.remove_adapter("copy")
    with pytest.raises(ConfigError, match="nothing_here"):
        engine.set_adapter("nothing_here", tmp_path / "nothing_here")
    assert set(engine.adapters) == {"one", "two"}


@pytest.mark.parametrize("name", ENGINES)
def test_the_last_adapter_leaves_the_model_itself(name: str, tmp_path: Path) -> None:
    subject = Subject(name, make_tiny_model(tmp_path / "base", head_dim=32))
    subject.model.save_pretrained(tmp_path / "saved", selected_adapters=["two"])
    expected = {adapter: subject.complete(PROMPTS, GREEDY, adapter) for adapter in ("two", None)}
    for adapter in ("one", "two"):
        subject.engine.remove_adapter(adapter)
    assert subject.engine.adapters == ()
    assert subject.complete(PROMPTS, GREEDY, None) == expected[None]
    subject.engine.set_adapter("job", tmp_path / "saved" / "two")  # is replaced
    for _ in range(2):  # as an evaluation of several jobs asks one after the other
        subject.engine.set_adapter("job", tmp_path / "saved" / "two")
        assert subject.complete(PROMPTS, GREEDY, "job") == expected["two"]
        assert subject.complete(PROMPTS, GREEDY, None) == expected[None]
        subject.engine.remove_adapter("job")


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        (GenerationRequest([]), "prompt: is empty"),
        (GenerationRequest([5] * 512), "512 tokens"),
        (GenerationRequest([5, 100_000, 6]), "prompt: holds token id 100000"),
        (GenerationRequest([5, -1]), "prompt: holds token id -1"),
        (GenerationRequest([5], adapter="three"), "adapter: 'three' is not loaded.*one, two"),
    ],
)
def test_what_cannot_be_worked_on_is_refused(
    subject: Subject, request_: GenerationRequest, says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        subject.engine.generate([GenerationRequest([5]), request_])
    assert subject.engine.is_idle


def test_requests_of_a_stream_have_ids_of_their_own(subject: Subject) -> None:
    """Or nobody could tell whose their deltas are."""
    with pytest.raises(ConfigError, match="id: two requests"):
        next(
            subject.engine.stream([GenerationRequest([5], id="a"), GenerationRequest([6], id="a")])
        )
    assert subject.engine.is_idle


def test_a_completion_is_cut_where_the_context_ends(subject: Subject) -> None:
    params = SamplingParams(max_new_tokens=100, stop_token_ids=())
    [[found]] = subject.engine.generate([GenerationRequest([5] * 500, params)])
    assert len(found.token_ids) == 12 and found.finish_reason == "length"


def test_many_uneven_requests_all_come_back_in_order(subject: Subject) -> None:
    """More than fit at once, lengths from 1 to 200; each is what it is alone."""
    requests = [
        GenerationRequest(
            [(7 * i + j) % 256 + 4 for j in range(1 + (i * 37) % 200)],
            SamplingParams(max_new_tokens=1 + (i * 13) % 24, seed=derived_seed(i)),
            ["one", "two", None][i % 3],
        )
        for i in range(60)
    ]
    found = subject.engine.generate(requests)
    for index in (0, 5, 47):
        assert found[index] == subject.engine.generate([requests[index]])[0]
    assert all(
        len(own[0].token_ids) <= r.params.max_new_tokens
        for own, r in zip(found, requests, strict=True)
    )


def test_plain_models_need_no_adapters(subject: Subject, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(subject.folder, dtype=torch.float32)
    engine = ENGINES[subject.engine.name](base.to(subject.model.device), subject.tokenizer)
    found = [
        own[0].token_ids for own in engine.generate([GenerationRequest(p, GREEDY) for p in PROMPTS])
    ]
    assert found == [subject.greedy(p, 12, None) for p in PROMPTS] and engine.adapters == ()
    subject.model.save_pretrained(tmp_path, selected_adapters=["two"])
    engine.set_adapter("two", tmp_path / "two")
    requests = [GenerationRequest(p, GREEDY, name) for p in PROMPTS for name in ("two", None)]
    found = [own[0].token_ids for own in engine.generate(requests)]
    assert found == [subject.greedy(p, 12, n) for p in PROMPTS for n in ("two", None)]


def test_log_probabilities_are_those_that_training_computes(subject: Subject) -> None:
    params = SamplingParams(max_new_tokens=10, logprobs=True, seed=3)
    found = subject.complete(PROMPTS, params)
    rows = [[*p, *c.token_ids] for p, c in zip(PROMPTS, found, strict=True)]
    scored = all_log_probs(subject.model, rows, 3, batch_size=5)
    for prompt, completion, values in zip(PROMPTS, found, scored, strict=True):
        for mine, theirs in zip(completion.logprobs, values[len(prompt) - 1 :], strict=True):
            assert abs(mine - theirs) < 1e-5


def test_a_model_whose_config_asks_for_the_routers_loss(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    heads: dict[str, Any] = {
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "num_local_experts": 4,
    }
    config = MixtralConfig(vocab_size=320, max_position_embeddings=128, **sizes, **heads)
    model = MixtralForCausalLM(config).eval()
    tokenizer: Any = AutoTokenizer.from_pretrained(make_tiny_model(tmp_path))
    requests = [GenerationRequest(prompt, GREEDY) for prompt in PROMPTS]
    lora = LoraConfig(r=4, target_modules=["q_proj"])
    found: list[list[list[Completion]]] = []
    for asks in (False, True):
        config.output_router_logits = asks
        found.append(TransformersEngine(model, tokenizer).generate(requests))
    assert found[0] == found[1]
    adapted: Any = get_peft_model(model, lora, adapter_name="one")
    mixed = [
        GenerationRequest(prompt, GREEDY, name) for prompt in PROMPTS for name in ("one", None)
    ]
    own = TransformersEngine(adapted, tokenizer).generate(mixed)
    assert [each[0].token_ids for each in own[1::2]] == [each[0].token_ids for each in found[0]]


def test_a_model_that_fills_no_cache_is_refused(tmp_path: Path) -> None:
    """Its completions would be nonsense: each token would be read without those before it."""
    folder = make_tiny_model(tmp_path)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    plain = model.forward

    def forward(input_ids: torch.Tensor, past_key_values: Any = None, **rest: Any) -> Any:
        return plain(input_ids=input_ids, **{**rest, "use_cache": False})

    model.forward = forward
    engine = TransformersEngine(model, AutoTokenizer.from_pretrained(folder))
    with pytest.raises(ConfigError, match="fills no cache"):
        engine.generate([GenerationRequest([5, 6])])
    assert engine.is_idle
