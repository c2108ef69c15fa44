"""Models with two rotary tables: a row has its own in training, scoring and sampling."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, Phi3Config, PhimoeConfig

from openweights.errors import ConfigError
from openweights.generation.params import Completion, GenerationRequest, SamplingParams
from openweights.generation.transformers_engine import TransformersEngine
from openweights.models.log_probs import scored_log_probs
from openweights.models.packing import use_packed_attention
from openweights.models.rotary import in_long_rows, turn_by_row
from openweights.models.shape import check_row_length, made_for, short_length
from openweights.models.tokens import IGNORED, Collator
from tests.rounding import assert_equal_in_float64
from tests.tiny_model import make_tiny_model

SHORT, LONGEST = 16, 64
SMALL: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": LONGEST,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
LONGROPE: dict[str, Any] = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [2.0, 5.0, 9.0, 30.0],
    "original_max_position_embeddings": SHORT,
}
SCALES = {"short_mscale": 1.1, "long_mscale": 1.4}
BEFORE: dict[str, Any] = {"original_max_position_embeddings": SHORT}  # as Phi 3 says it, too
CONFIGS: dict[str, Any] = {
    "phi 3": Phi3Config(**SMALL, **BEFORE, rope_parameters={**LONGROPE}),
    "llama": LlamaConfig(**SMALL, rope_parameters={**LONGROPE}),
    "phi moe": PhimoeConfig(
        **SMALL,
        num_local_experts=2,
        **BEFORE,
        rope_parameters={**LONGROPE, **SCALES},
    ),
}
# Shorter, of just so many positions, of one more, and much longer.
ROWS = [[*range(a, a + n)] for a, n in ((9, 5), (20, SHORT), (50, SHORT + 1), (90, 40))]


def model_of(name: str, *, turned: bool = True) -> Any:
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(
        deepcopy(CONFIGS[name]), attn_implementation="sdpa", experts_implementation="eager"
    )
    model = model.double().eval()
    if turned:
        turn_by_row(model)
    return model


def values(model: Any, rows: Sequence[list[int]], *, packed: bool) -> torch.Tensor:
    batch = Collator(0, packed=packed)([{"input_ids": row, "labels": row} for row in rows])
    return scored_log_probs(model, batch, batch["labels"] != IGNORED)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_row_is_learned_as_alone_beside_rows_of_another_length(name: str, packed: bool) -> None:
    model, plain = model_of(name), model_of(name, turned=False)
    alone = torch.cat([values(plain, [row], packed=False) for row in ROWS])
    if packed:
        assert use_packed_attention(model) and use_packed_attention(plain)
    turn_by_row(model)  # again, which changes nothing
    found = values(model, ROWS, packed=packed)
    assert_equal_in_float64(found, alone)
    confused = values(plain, ROWS, packed=packed)
    assert (confused - alone).abs().max() > 1e-2, "the control: the longest decides"


def test_a_copy_of_a_model_turns_by_its_own_tables() -> None:
    model = model_of("phi 3")
    copy = deepcopy(model)
    table = copy.model.rotary_emb
    table.original_inv_freq.fill_(1.0)
    assert table.forward.__self__ is table and table.of_one_length.__self__ is table
    assert model.model.rotary_emb.original_inv_freq[-1] != 1.0


def test_rows_begin_where_positions_do_not_rise() -> None:
    positions = torch.tensor([[0, 1, 2, 0, 0, 1, 2, 3, 0, 1], [0, 0, 0, 1, 2, 3, 4, 4, 4, 4]])
    found = in_long_rows(positions, 3)
    assert found[0].tolist() == [False] * 4 + [True] * 4 + [False] * 2
    assert found[1].tolist() == [False] * 2 + [True] * 8
    assert in_long_rows(torch.tensor([[2], [3]]), 3).tolist() == [[False], [True]]


# ---- generation ----------------------------------------------------------------------------------

PROMPTS = [ROWS[0], ROWS[1][:12], ROWS[1][:-1], ROWS[1], ROWS[2]]
NEW_TOKENS = 7
GREEDY = SamplingParams(
    temperature=0, max_new_tokens=NEW_TOKENS, stop_token_ids=(), logprobs=True, detokenize=False
)


def answers(model: Any, tokenizer: Any, params: SamplingParams, rows: int) -> list[Completion]:
    engine = TransformersEngine(model, tokenizer, max_rows=rows)
    return [own[0] for own in engine.generate([GenerationRequest(p, params) for p in PROMPTS])]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder: Path = make_tiny_model(tmp_path_factory.mktemp("words"))
    return AutoTokenizer.from_pretrained(folder)


@torch.no_grad()
def own_log_probs(model: Any, ids: Sequence[int]) -> torch.Tensor:
    """Of the next token, behind the row alone, without a cache."""
    return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].log_softmax(-1)


@pytest.mark.parametrize("rows", [1, 64])
def test_each_token_is_drawn_as_the_row_alone_tells(tokenizer: Any, rows: int) -> None:
    plain, texts = model_of("phi 3", turned=False), list[list[int]]()
    for prompt, found in zip(
        PROMPTS, answers(model_of("phi 3"), tokenizer, GREEDY, rows), strict=True
    ):
        known = list(prompt)
        for token, value in zip(found.token_ids, found.logprobs, strict=True):
            own = own_log_probs(plain, known)
            assert token == int(own.argmax())
            assert abs(value - float(own[token])) < 1e-6
            known.append(token)
        texts.append(known)
    written = plain.generate(
        torch.tensor([PROMPTS[1]]), max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0,
        use_cache=False,
    )  # fmt: skip
    assert texts[1] == written[0].tolist(), "as the model generates without a cache"


@torch.no_grad()
def test_what_the_cache_holds_is_of_the_other_table() -> None:
    """The control: a row that is not read again goes on otherwise."""
    model, ids = model_of("phi 3"), torch.tensor([ROWS[2]])
    cache = model(input_ids=ids[:, :-1], use_cache=True).past_key_values
    kept = model(input_ids=ids[:, -1:], past_key_values=cache).logits[0, -1].log_softmax(-1)
    assert (kept - own_log_probs(model, ROWS[2])).abs().max() > 1e-2


def test_a_row_that_is_read_again_keeps_its_seed_and_its_penalties(tokenizer: Any) -> None:
    params = SamplingParams(
        temperature=0.9, max_new_tokens=NEW_TOKENS, stop_token_ids=(), seed=7, n=2,
        presence_penalty=0.8, frequency_penalty=0.9, detokenize=False,
    )  # fmt: skip
    model = model_of("phi 3")
    together, alone = (answers(model, tokenizer, params, rows) for rows in (64, 1))
    assert [c.token_ids for c in together] == [c.token_ids for c in alone]
    greedy = SamplingParams(
        temperature=0, max_new_tokens=NEW_TOKENS, stop_token_ids=(), presence_penalty=2.0,
        frequency_penalty=2.0, detokenize=False,
    )  # fmt: skip
    for prompt, found in zip(PROMPTS, answers(model, tokenizer, greedy, 64), strict=True):
        known = list(prompt)
        for token in found.token_ids:
            drawn = torch.bincount(
                torch.tensor(known[len(prompt) :], dtype=torch.long), minlength=320
            )
            own = own_log_probs(model, known) - 2.0 * drawn - 2.0 * (drawn > 0)
            assert token == int(own.argmax())
            known.append(token)


# ---- what cannot be had by row -------------------------------------------------------------------


def test_rows_that_another_engine_would_confuse_are_refused() -> None:
    config = CONFIGS["phi 3"]
    assert short_length(config) == SHORT and short_length(LlamaConfig(**SMALL)) is None
    check_row_length(config, LONGEST, by_row=True)
    check_row_length(config, SHORT, by_row=False)
    with pytest.raises(ConfigError, match=r"max_seq_length: 17 is more than 16 .*'transformers'"):
        check_row_length(config, SHORT + 1, by_row=False)
    check_row_length(LlamaConfig(**SMALL), 10 * LONGEST, by_row=False)


def test_a_table_of_the_longest_row_is_refused_where_it_would_change() -> None:
    given: dict[str, Any] = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    config = LlamaConfig(**SMALL, rope_parameters=given)
    check_row_length(config, LONGEST, by_row=True)
    with pytest.raises(ConfigError, match="max_seq_length: 65 is more than 64 positions"):
        check_row_length(config, LONGEST + 1, by_row=True)


def test_a_config_is_read_as_it_stands_in_its_file() -> None:
    file = CONFIGS["phi 3"].to_dict()
    older = {
        **{"rope_scaling": {"type": "longrope"}, "max_position_embeddings": LONGEST},
        "original_max_position_embeddings": SHORT,
    }
    for config in (file, older, {"text_config": older}):
        assert (short_length(config), made_for(config)) == (SHORT, LONGEST)
        with pytest.raises(ConfigError, match="max_seq_length: 17 is more than 16"):
            check_row_length(config, SHORT + 1, by_row=False)
    assert made_for({"model_type": "bloom"}) is None and made_for({"n_positions": 8}) == 8
