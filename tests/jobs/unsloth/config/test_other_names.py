"""Names that no field has: which field is named instead."""

from __future__ import annotations

import pytest

from openweights.jobs.unsloth.config.fields import FILE_PURPOSES, TrainingFields
from openweights.jobs.unsloth.config.other_names import _CALLED, _known, meant_field

FIELDS = list(TrainingFields.model_fields)


@pytest.mark.parametrize(
    ("name", "loss", "meant"),
    [
        ("sdft_max_completion_length", "sdft", "sdft_max_new_tokens"),
        ("sdft_max_completion_lenght", "sdft", "sdft_max_new_tokens"),
        ("grpo_max_new_tokens", "grpo", "grpo_max_completion_length"),
        ("max_new_tokens", "sdft", "sdft_max_new_tokens"),
        ("max_new_tokens", "grpo", "grpo_max_completion_length"),
        ("max_completion_length", "sdft", "sdft_max_new_tokens"),
        ("max_new_tokens", "sft", None),
        ("temperature", "sdft", "sdft_temperature"),
        ("temperature", "grpo", "grpo_temperature"),
        ("temprature", "grpo", "grpo_temperature"),
        ("temperature", "dpo", None),
        ("top_k", "grpo", "grpo_top_k"),
        ("top_p", "sdft", "sdft_top_p"),
        ("loss_type", "grpo", "grpo_loss_type"),
        ("kl_coef", "grpo", "beta"),
        ("dpo_beta", "dpo", "beta"),
        ("kl_coef", "sft", None),
        ("sdft_beta", "sdft", None),
        ("sdft_num_generations", "sdft", None),
        ("sft_gate", "sdft", "sdft_gate"),
        ("sft_ema_alpha", "sdft", "sdft_ema_alpha"),
        ("grpo_learning_rate", "grpo", "learning_rate"),
        ("per_device_batch_size", "sft", "per_device_train_batch_size"),
        ("per_device_eval_batch_size", "sft", "eval_batch_size"),
        ("learningRate", "sft", "learning_rate"),
        ("numGenerations", "grpo", "grpo_num_generations"),
        ("gradient-accumulation-steps", "sft", "gradient_accumulation_steps"),
        ("lr", "sft", "learning_rate"),
        ("num_epochs", "sft", "epochs"),
        ("num_train_epoch", "sft", "epochs"),
        ("modle", "sft", "model"),
        ("vram", "sft", "requires_vram_gb"),
        ("timeouts", "sft", "timeout"),
        ("max_new_tokens", None, "sdft_max_new_tokens"),
        ("note", "sft", None),
        ("zzz", "nonsense", None),
    ],
)
def test_the_same_loss_and_the_same_meaning_come_first(
    name: str, loss: str | None, meant: str | None
) -> None:
    assert meant_field(name, loss) == meant


def test_names_of_others_are_of_fields_that_there_are() -> None:
    assert set(_CALLED) <= set(_known("none"))
    others = [other for names in _CALLED.values() for other in names.split()]
    assert not set(others) & set(FIELDS), "a field needs no other name"


@pytest.mark.parametrize("loss", list(FILE_PURPOSES))
def test_a_slip_in_any_field_of_a_loss_names_that_field(loss: str) -> None:
    """A letter is missing, or two have changed places."""
    wrong: list[tuple[str, str | None]] = []
    own = [field for field in FIELDS if field in _known(loss) and len(field) > 4]
    for field in own:
        at = len(field) // 2
        slips = {field[:at] + field[at + 1 :]}
        slips.add(field[: at - 1] + field[at] + field[at - 1] + field[at + 1 :])
        for slip in slips - set(FIELDS):
            if (meant := meant_field(slip, loss)) != field:
                wrong.append((slip, meant))
    # Where the letter is what tells two fields apart, either is meant.
    assert [slip for slip, _ in wrong if "top" not in slip] == []
    assert len(own) > 40
