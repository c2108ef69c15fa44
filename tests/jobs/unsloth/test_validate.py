"""Configs: defaults, what is refused and how, and that a stored config is read back unchanged."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import openweights
from openweights.errors import ConfigError
from openweights.jobs.unsloth.config.learning_rate import parse_learning_rate
from openweights.jobs.unsloth.validate import TrainingConfig, training_config
from tests.jobs.unsloth.malformed_configs import FILE, GOOD, MALFORMED, MISSING, SDFT


def test_corpus_is_large() -> None:
    assert len(MALFORMED) >= 40


@pytest.mark.parametrize(
    ("params", "field", "words"), MALFORMED, ids=lambda value: str(value)[-60:]
)
def test_refuses_and_says_what_to_do(params: dict[str, Any], field: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        training_config({k: v for k, v in params.items() if v is not MISSING})
    lines = str(caught.value).splitlines()
    assert [line for line in lines if line.startswith(f"{field}: ") and words in line], lines
    assert all("Traceback" not in line and "pydantic" not in line for line in lines)
    assert all(len(line) < 400 for line in lines), "long values are cut"
    assert caught.value.__suppress_context__


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)
ODD = st.sampled_from(
    [10**400, -(2**63), 1e300, 5e-324, "\0", "\ud800", "x" * 999, "{", FILE, [[]]]
)


@given(st.dictionaries(st.sampled_from(list(TrainingConfig.model_fields)), JSON | ODD, max_size=5))
@settings(max_examples=300)
def test_any_values_are_taken_or_refused(given: dict[str, Any]) -> None:
    try:
        config = training_config({**GOOD, **given})
    except ConfigError as error:
        str(error).encode()
        return
    assert training_config(config.model_dump()) == config


def test_reports_everything_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        training_config({**GOOD, "epochs": 0, "lr": 1, "seed": "x", "beta": 0.2})
    assert [line.split(":")[0] for line in str(caught.value).splitlines()] == [
        "epochs",
        "seed",
        "lr",
    ]


def test_stored_config_holds_only_what_counts_and_is_read_back() -> None:
    config = training_config({**GOOD, "learning_rate": "2e-4 / 2", "target_modules": ["q_proj"]})
    stored = json.loads(json.dumps(config.model_dump(mode="json")))
    assert stored["learning_rate"] == 1e-4 and stored["packing"] is True
    assert not [name for name in stored if name.startswith(("sdft_", "grpo_")) or name == "beta"]
    assert training_config(stored) == config
    sdft = training_config({**SDFT, "sdft_demo_template": 'As {"json": 1}: {demonstration}'})
    stored = sdft.model_dump(mode="json")
    assert stored["sdft_ema_alpha"] == 0.02 and "packing" not in stored
    assert training_config(stored) == sdft


def test_one_set_of_settings_serves_several_losses(caplog: pytest.LogCaptureFixture) -> None:
    """What another loss reads, at its default or harmless, is taken with a warning."""
    shared = {"beta": 0.2, "packing": False, "train_on_responses_only": True, "train_on": "last"}
    shared |= {"sdft_ema_alpha": 0.02, "grpo_num_generations": 8, "holdout_fraction": None}
    bare = {loss: {**GOOD, "loss": loss} for loss in ("sft", "sdft", "grpo")}
    for loss, own in bare.items():
        config = training_config({**own, **shared})
        assert f"loss='{loss}' does not read" in caplog.messages[-1]
        stored = config.model_dump(exclude_defaults=True)
        read = {"sft": {"packing", "train_on"}, "sdft": set(), "grpo": {"beta"}}[loss]
        assert stored.keys() - training_config(own).model_dump(exclude_defaults=True).keys() == read


def test_nested_and_local(tmp_path: Path) -> None:
    local = tmp_path / "rows.jsonl"
    local.write_text("{}\n")
    sampling: list[dict[str, Any]] = [
        {"dataset": str(local), "eval_steps": "log"},
        {"dataset": FILE, "eval_steps": 3, "tag": "other"},
    ]
    config = training_config(
        {
            **GOOD,
            "training_file": str(local),
            "sampling_callbacks": sampling,
            "model": str(tmp_path),
        }
    )
    assert [s.eval_steps for s in config.sampling_callbacks or []] == ["log", 3]
    name = {
        "finetuned_model_id": "me/{run}-{job_id}",
        "model_naming_extra_parameters": {"run": "a"},
    }
    assert training_config({**GOOD, **name}).finetuned_model_id == "me/{run}-{job_id}"


@pytest.mark.parametrize(
    ("given", "rate"),
    [(1e-4, 1e-4), ("1e-4", 1e-4), ("2e-4 / 4", 5e-5), ("-4", 1e-4), (-5, 1e-5), ("10 ** -3", 1e-3)]
    + [
        ("(1 + 1) * 1e-5", 2e-5),
        (" +1e-3 ", 1e-3),
        (1, 1.0),
        ("-(2 + 2)", 1e-4),
        ("1e-4 - 5e-5", 5e-5),
    ],
)
def test_learning_rates(given: object, rate: float) -> None:
    assert parse_learning_rate(given) == pytest.approx(rate, rel=1e-12)


@pytest.mark.parametrize("given", [-1e-4, -1, "-1e-4", -0.5, -2.5, "1 - 2", "-1e-300"])
def test_negative_rates_are_refused(given: object) -> None:
    with pytest.raises(ValueError, match=r"is negative; give a rate such as 1e-4"):
        parse_learning_rate(given)


def test_an_exponent_is_told(caplog: pytest.LogCaptureFixture) -> None:
    parse_learning_rate(-4)
    assert caplog.messages == [
        "learning_rate: -4 is taken for the exponent of 1e-4; write the rate itself"
    ]


@given(st.text(alphabet="0123456789.e+-*/() _ajx[]'", max_size=110) | st.text(max_size=20))
def test_any_text_is_a_rate_or_refused(text: str) -> None:
    try:
        assert 1e-12 <= parse_learning_rate(text) <= 1.0
    except ValueError as error:
        assert str(error)


PACKAGE = Path(openweights.__file__).parent
COMPUTING = ("jobs", "generation", "models")


def test_settings_alone_read_the_environment() -> None:
    found = [path for folder in COMPUTING for path in (PACKAGE / folder).rglob("*.py")]
    assert len(found) > 60, "the control: folders are looked into"
    for path in found:
        # What torch.distributed and CUDA read is for those to write and to read who start ranks.
        if path.name not in ("launcher.py", "load.py", "replicas.py"):
            assert not re.search(r"getenv|environ(\.get|\[[^]]+\](?! = ))", path.read_text()), path


def test_client_side_needs_no_torch() -> None:
    code = (
        "import sys, openweights.jobs.unsloth, openweights.jobs.unsloth.training;"
        "heavy = {'torch', 'transformers', 'trl', 'peft', 'datasets', 'huggingface_hub'};"
        "sys.exit(', '.join(heavy & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
