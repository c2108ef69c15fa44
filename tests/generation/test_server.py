"""The server as the real `openai` client sees it."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import openai
import pytest
import torch
import uvicorn
from openai import AsyncOpenAI, OpenAI
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from openweights.generation.choose import generation_engine
from openweights.generation.engine_thread import EngineThread
from openweights.generation.openai_format import ChatRequest
from openweights.generation.params import Delta
from openweights.generation.prompts import token_logprobs
from openweights.generation.server import ModelServer, ServedModel
from tests.rounding import assert_sums_equal, terms_of
from tests.tiny_model import make_tiny_model
from tests.waiting import HANGS_S

KEY = "sk-test-0123456789"
HELLO: Any = [{"role": "user", "content": "Hello"}]
CALL: Any = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
}
RETURNED: Any = {"role": "tool", "tool_call_id": "a", "content": "5"}


@dataclass
class Running:
    url: str
    server: ModelServer
    tokenizer: Any
    model: Any
    loop: asyncio.AbstractEventLoop

    def client(self, key: str = KEY) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=HANGS_S)

    def greedy(self, text: str, count: int) -> str:
        ids = self.tokenizer(text, add_special_tokens=False, return_tensors="pt")
        with torch.no_grad():
            out = self.model.generate(**ids, do_sample=False, max_new_tokens=count)
        told = out[0, ids["input_ids"].shape[1] :]
        return self.tokenizer.decode(told, skip_special_tokens=True)

    def chat_text(self, messages: Any) -> str:
        return self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = make_tiny_model(tmp_path_factory.mktemp("tiny"))
    adapter = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(1)
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(folder), lora).save_pretrained(adapter)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    engine = generation_engine(
        "transformers", AutoModelForCausalLM.from_pretrained(folder).eval(), tokenizer
    )
    engine.set_adapter("mine", adapter)
    listening = socket.create_server(("127.0.0.1", 0))
    started: list[ModelServer] = []
    loops: list[asyncio.AbstractEventLoop] = []

    async def serve() -> None:
        loops.append(asyncio.get_running_loop())
        thread = EngineThread(engine, loops[0])
        models = {"base": ServedModel(None, tokenizer), "mine": ServedModel("mine", tokenizer)}
        started.append(ModelServer(thread, models, engine.max_length, KEY))
        config = uvicorn.Config(started[0].app(), log_level="warning")
        http.append(uvicorn.Server(config))
        await http[0].serve(sockets=[listening])
        thread.close()

    http: list[uvicorn.Server] = []
    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    url = f"http://127.0.0.1:{listening.getsockname()[1]}"
    while not http or not http[0].started:
        time.sleep(0.01)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    yield Running(url, started[0], tokenizer, model, loops[0])
    http[0].should_exit = True
    thread.join(timeout=HANGS_S)
    assert not thread.is_alive()


def test_nothing_without_the_key(running: Running) -> None:
    for key in ("wrong", KEY + "x", KEY[:-1]):
        with pytest.raises(openai.AuthenticationError, match="the key is missing or wrong"):
            running.client(key).models.list()
    for path in ("/v1/models", "/v1/models/base"):
        assert httpx.get(running.url + path).status_code == 401
    for path in ("/v1/chat/completions", "/v1/completions"):
        assert httpx.post(running.url + path, json={}).status_code == 401
    assert httpx.get(running.url + "/health").json() == {"status": "ok"}


def test_models(running: Running) -> None:
    client = running.client()
    assert [model.id for model in client.models.list()] == ["base", "mine"]
    assert client.models.retrieve("mine").id == "mine"
    with pytest.raises(openai.NotFoundError, match=r"'none' is not served here \(there are: base"):
        client.chat.completions.create(model="none", messages=HELLO)


def test_greedy_chat_equals_generate(running: Running) -> None:
    answer = running.client().chat.completions.create(
        model="base", messages=HELLO, temperature=0, max_tokens=12
    )
    prompt = running.chat_text(HELLO)
    assert answer.choices[0].message.content == running.greedy(prompt, 12)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(running.tokenizer(prompt)["input_ids"])
    assert answer.usage.completion_tokens == 12
    assert answer.choices[0].finish_reason == "length" and answer.choices[0].logprobs is None
    other = running.client().chat.completions.create(
        model="mine", messages=HELLO, temperature=0, max_tokens=12
    )
    assert other.choices[0].message.content != answer.choices[0].message.content
    begun = [*HELLO, {"role": "assistant", "content": "Well"}]
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    for messages, text in (
        (begun, prompt + "Well"),
        ([{"role": "user", "content": parts}], prompt),
    ):
        answer = running.client().chat.completions.create(
            model="base", messages=messages, temperature=0, max_completion_tokens=5
        )
        assert answer.choices[0].message.content == running.greedy(text, 5)


def test_samples_stream_and_usage(running: Running) -> None:
    given: Any = {"model": "base", "messages": HELLO, "max_tokens": 20, "n": 3, "seed": 5}
    client = running.client()
    whole = client.chat.completions.create(**given)
    texts = [choice.message.content for choice in whole.choices]
    assert len(set(texts)) == 3
    streamed = ["", "", ""]
    reasons: list[Any] = [None] * 3
    usage = None
    for chunk in client.chat.completions.create(
        **given, stream=True, stream_options={"include_usage": True}
    ):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
        usage = chunk.usage or usage
    assert streamed == texts and reasons == [choice.finish_reason for choice in whole.choices]
    assert usage == whole.usage
    assert client.chat.completions.create(**{**given, "seed": 6}) != whole


def test_log_probabilities(running: Running) -> None:
    given: Any = {"model": "base", "messages": HELLO, "max_tokens": 6, "seed": 1}
    answer = running.client().chat.completions.create(**given, logprobs=True, top_logprobs=4)
    assert answer.choices[0].logprobs is not None
    content = answer.choices[0].logprobs.content
    assert content is not None and len(content) == 6
    told = b"".join(bytes(entry.bytes or ()) for entry in content).decode(errors="replace")
    assert told == answer.choices[0].message.content
    prompt = running.tokenizer(running.chat_text(HELLO), return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logps = running.model.double()(prompt).logits[0, -1].log_softmax(-1)
    running.model.float()
    tops = [top.logprob for top in content[0].top_logprobs]
    terms = terms_of(running.model, prompt.shape[1])
    assert_sums_equal(tops, logps.topk(4).values.tolist(), terms)
    plain: Any = running.client().completions.create(
        model="base", prompt="Once", max_tokens=4, temperature=0, logprobs=2
    )
    logprobs = plain.choices[0].logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == 4
    best = [max(top.values()) for top in logprobs.top_logprobs]
    assert best == logprobs.token_logprobs, "greedy takes the likeliest"


def test_completions_of_several_prompts(running: Running) -> None:
    client = running.client()
    answer = client.completions.create(
        model="base", prompt=["Once", "He said"], n=2, temperature=0, max_tokens=8
    )
    texts = [choice.text for choice in answer.choices]
    assert texts == [
        text for prompt in ("Once", "He said") for text in [running.greedy(prompt, 8)] * 2
    ]
    ids = running.tokenizer("Once", add_special_tokens=False)["input_ids"]
    by_ids = client.completions.create(model="base", prompt=ids, temperature=0, max_tokens=8)
    assert by_ids.choices[0].text == texts[0]
    stream = client.completions.create(
        model="base", prompt=["Once", "He said"], temperature=0, max_tokens=8, stream=True
    )
    told = ["", ""]
    for chunk in stream:
        told[chunk.choices[0].index] += chunk.choices[0].text
    assert told == [texts[0], texts[2]]


def test_stop_texts(running: Running) -> None:
    client = running.client()
    given: Any = {"model": "base", "messages": HELLO, "temperature": 0, "max_tokens": 30}
    text = client.chat.completions.create(**given).choices[0].message.content or ""
    stop = text[6:9]
    answer = client.chat.completions.create(**given, stop=stop).choices[0]
    assert answer.message.content == text[: text.index(stop)] and answer.finish_reason == "stop"
    told = client.chat.completions.create(**given, stop=[stop, "§"], stream=True)
    assert "".join(c.choices[0].delta.content or "" for c in told) == text[: text.index(stop)]


def test_the_models_own_ends_count_beside_those_of_a_request() -> None:
    def ends(**given: Any) -> tuple[int, ...] | None:
        asked = ChatRequest.model_validate({"model": "m", "messages": HELLO, **given})
        return asked.sampling(10, (2, 3)).stop_token_ids

    assert ends() == (2, 3)
    assert ends(stop_token_ids=[7]) == (2, 3, 7)
    assert ends(stop_token_ids=[7], ignore_eos=True) == (7,)
    assert ends(ignore_eos=True) == ()


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"temperature": -1}, "temperature: .*greater than or equal to 0"),
        ({"messages": []}, "messages: "),
        ({"messages": [{"role": "user", "content": "x" * 600}]}, "the prompt has 6.. tokens, and"),
        ({"tools": [{"type": "function"}]}, "tools: this server cannot do that"),
        ({"response_format": {"type": "json_object"}}, "response_format: this server cannot"),
        ({"stop": [""]}, "stop: "),
        ({"n": 0}, "n: "),
        ({"top_logprobs": 3}, "top_logprobs: needs logprobs"),
        ({"max_tokens": 3, "extra_body": {"min_tokens": 4}}, "min_tokens: is 4, above the 3"),
        ({"extra_body": {"repetition_penalty": 1.3}}, "repetition_penalty: this server cannot"),
        ({"extra_body": {"guided_choice": ["a"]}}, "guided_choice: this server cannot"),
        ({"tool_choice": "required"}, "tool_choice: this server cannot"),
        ({"messages": [*HELLO, CALL, RETURNED]}, r"messages\[1\].tool_calls: the chat template"),
        ({"messages": [{**HELLO[0], "name": "Bob"}]}, r"messages\[0\].name: the chat template"),
        ({"stream": True, "messages": [{"role": "user", "content": "x" * 600}]}, "the prompt has"),
    ],
)
def test_what_cannot_be_is_refused_by_field(
    running: Running, wrong: dict[str, Any], words: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=words):
        running.client().chat.completions.create(**{"model": "base", "messages": HELLO, **wrong})


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        ("completions", '{"prompt": [999999]}', "prompt: holds token id 999999"),
        ("completions", '{"prompt": [[5], [-3]]}', "prompt: holds token id -3"),
        ("completions", '{"prompt": "\\ud800"}', "prompt: holds half a surrogate pair"),
        ("completions", '{"prompt": []}', "prompt: is empty"),
        (
            "chat/completions",
            '{"chat_template_kwargs": {"tools": 3}}',
            "chat_template_kwargs.tools",
        ),
        ("chat/completions", "[" * 100_000, "body: is no JSON"),
    ],
)
def test_nothing_that_a_client_sends_harms_the_others(
    running: Running, path: str, body: str, words: str
) -> None:
    """A look-up beside the vocabulary would end a GPU's process, with everybody's requests."""
    more = '{"model": "base", "messages": [{"role": "user", "content": "Hello"}], '
    answers: list[Any] = []

    def ask() -> None:
        own = running.client().completions
        answers.append(own.create(model="base", prompt="a", max_tokens=200, temperature=0))

    other = threading.Thread(target=ask)
    other.start()
    answer = httpx.post(
        f"{running.url}/v1/{path}",
        content=body.replace("{", more, 1),
        headers={"authorization": f"Bearer {KEY}"},
    )
    assert answer.status_code == 400 and words in answer.json()["error"]["message"]
    other.join()
    assert answers[0].usage.completion_tokens == 200


def test_values_that_ask_for_nothing_are_taken(running: Running) -> None:
    free = {"repetition_penalty": 1.0, "guided_json": None, "echo": False, "tool_choice": "auto"}
    answer = running.client().chat.completions.create(
        model="base", messages=HELLO, max_tokens=2, extra_body=free
    )
    assert answer.choices


@pytest.mark.parametrize("value", [float("-inf"), float("nan")])
def test_log_probabilities_of_what_a_model_rules_out_are_json(
    running: Running, value: float
) -> None:
    delta = Delta("a", 0, [5], "x", None, [value], [{5: value, 6: -0.5}])
    told = json.loads(json.dumps(token_logprobs(running.tokenizer, delta), allow_nan=False))
    assert told[0]["logprob"] == told[0]["top_logprobs"][0]["logprob"] == -9999.0
    assert told[0]["top_logprobs"][1]["logprob"] == -0.5


def test_a_body_of_any_length_is_not_read_whole(running: Running) -> None:
    parts = (b" " * 2**20 for _ in range(64))
    headers = {"authorization": f"Bearer {KEY}"}
    answer = httpx.post(f"{running.url}/v1/completions", content=parts, headers=headers)
    assert answer.status_code == 400 and "body: has more than" in answer.text


def test_200_at_once_and_none_mixed_up(running: Running) -> None:
    prompts = [f"{number} is" for number in range(200)]
    expected = [running.greedy(prompt, 6) for prompt in prompts[:20]]

    async def ask() -> list[str]:
        limits = httpx.Limits(max_connections=200)
        http = httpx.AsyncClient(limits=limits, timeout=HANGS_S)
        async with AsyncOpenAI(
            base_url=f"{running.url}/v1", api_key=KEY, max_retries=0, http_client=http
        ) as client:

            async def one(index: int) -> str:
                model = "mine" if index % 3 == 2 else "base"
                if index % 2:
                    stream = await client.completions.create(
                        model=model, prompt=prompts[index], max_tokens=6, temperature=0, stream=True
                    )
                    return "".join([chunk.choices[0].text async for chunk in stream])
                answer = await client.completions.create(
                    model=model, prompt=prompts[index], max_tokens=6, temperature=0
                )
                return answer.choices[0].text

            return list(await asyncio.gather(*map(one, range(200))))

    texts = asyncio.run(ask())
    assert len(texts) == 200
    for index, text in enumerate(expected):
        assert (texts[index] == text) == (index % 3 != 2), index


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_frees_its_row(running: Running, stream: bool) -> None:
    body = {
        **{"model": "base", "messages": HELLO, "stream": stream, "max_tokens": 400},
        "ignore_eos": True,
        "n": 16,  # enough that it is still at work when its first piece has come
    }
    headers = {"authorization": f"Bearer {KEY}"}
    # Seen from a thread of its own: the engine may leave this one no time until it is done.
    seen: list[int] = []
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.002):
            seen.append(running.server.engine.requests)

    watcher = threading.Thread(target=watch)
    watcher.start()
    with httpx.Client(timeout=60 if stream else 0.1) as client:
        request = client.build_request(
            "POST", f"{running.url}/v1/chat/completions", json=body, headers=headers
        )
        if stream:
            response = client.send(request, stream=True)
            next(response.iter_lines())
            response.close()
        else:
            with pytest.raises(httpx.ReadTimeout):
                client.send(request)
    freed_at = time.monotonic() + 2
    while running.server.engine.requests and time.monotonic() < freed_at:
        time.sleep(0.01)
    over.set()
    watcher.join()
    assert max(seen) == 1
    assert running.server.engine.requests == 0
    idle = running.server.engine.call(lambda engine: engine.is_idle)
    assert asyncio.run_coroutine_threadsafe(idle, running.loop).result(HANGS_S)
    client_ = running.client()
    assert client_.chat.completions.create(model="base", messages=HELLO, max_tokens=2).choices
