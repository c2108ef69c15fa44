"""The EMA teacher: closed form, exact ends, exact swap, round trip through a checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from openweights.errors import PlatformError
from openweights.jobs.unsloth.teacher import TEACHER_FILE, EMATeacher
from tests.rounding import assert_sums_equal


def make_model(dtype: torch.dtype = torch.float32) -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)).to(dtype)
    model[0].bias.requires_grad_(False)
    return model


def trainable(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def averages_of(teacher: EMATeacher) -> dict[str, torch.Tensor]:
    """By parameter name; the tensors are the teacher's own."""
    return dict(zip(teacher.names, teacher.values, strict=True))


def train(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)


def test_average_equals_its_closed_form_after_50_steps() -> None:
    model, rate = make_model(), 0.02
    teacher = EMATeacher(model, rate)
    history = [trainable(model)]
    for _ in range(50):
        train(model)
        teacher.update()
        history.append(trainable(model))
    for name, average in averages_of(teacher).items():
        weights = [(1 - rate) ** 50] + [rate * (1 - rate) ** (50 - k) for k in range(1, 51)]
        expected = sum(w * h[name].double() for w, h in zip(weights, history, strict=True))
        assert_sums_equal(average, expected, 3 * 50)
    assert teacher.step == 50


def test_rate_0_is_frozen_and_rate_1_is_the_student_bit_for_bit() -> None:
    model = make_model()
    first = trainable(model)
    frozen, live = EMATeacher(model, 0), EMATeacher(model, 1)
    for _ in range(5):
        train(model)
        frozen.update()
        live.update()
    for name, parameter in trainable(model).items():
        assert torch.equal(averages_of(frozen)[name], first[name])
        assert torch.equal(averages_of(live)[name], parameter)
    assert frozen.drift() == 0 < live.drift()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_acting_swaps_the_weights_and_gives_them_back_bit_for_bit(dtype: torch.dtype) -> None:
    model = make_model(dtype)
    teacher = EMATeacher(model, 0.5)
    initial = trainable(model)
    train(model)
    own = {n: p.detach().clone() for n, p in model.named_parameters()}
    storages = {n: p.data_ptr() for n, p in model.named_parameters()}
    averages = {n: a.clone() for n, a in averages_of(teacher).items()}
    with pytest.raises(RuntimeError, match="half way"), teacher.acting():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                assert torch.equal(parameter, initial[name])
                swapped = parameter.data_ptr() == averages_of(teacher)[name].data_ptr()
                assert swapped == (dtype == torch.float32), "float32 is exchanged, not copied"
        raise RuntimeError("half way")
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, own[name]) and parameter.data_ptr() == storages[name]
    assert all(torch.equal(a, averages[n]) for n, a in averages_of(teacher).items())


def test_average_keeps_float32_when_the_student_is_bfloat16() -> None:
    """In bfloat16 itself a step of 0.02 of a small change would be rounded away."""
    model = make_model(torch.bfloat16)
    teacher = EMATeacher(model, 0.02)
    before = {n: a.clone() for n, a in averages_of(teacher).items()}
    with torch.no_grad():
        model[1].weight.mul_(1.02)
    teacher.update()
    moved = averages_of(teacher)["1.weight"] - before["1.weight"]
    expected = 0.02 * (model[1].weight.float() - before["1.weight"])
    # What was added is as exact as the average that it was added to: 0.0004 of it.
    size = float(before["1.weight"].abs().max())
    assert_sums_equal(moved, expected, 4, size=size)
    with pytest.raises(AssertionError, match="differs by"):
        assert_sums_equal(moved.bfloat16(), expected, 4, size=size)
    assert averages_of(teacher)["1.weight"].dtype == torch.float32


def test_checkpoint_round_trip_is_exact(tmp_path: Path) -> None:
    model = make_model()
    teacher = EMATeacher(model, 0.1)
    for _ in range(3):
        train(model)
        teacher.update()
    teacher.save(tmp_path)
    restored = EMATeacher(model, 0.1)
    restored.load(tmp_path)
    assert restored.step == 3 and restored.drift() == teacher.drift()
    assert teacher.size_bytes == 2 * 4 * (6 * 5 + 5 * 4 + 4)
    assert all(torch.equal(a, averages_of(restored)[n]) for n, a in averages_of(teacher).items())


def test_a_checkpoint_without_a_fitting_teacher_is_refused(tmp_path: Path) -> None:
    model = make_model()
    with pytest.raises(PlatformError, match=TEACHER_FILE):
        EMATeacher(model, 0.1).load(tmp_path)
    EMATeacher(nn.Linear(2, 2), 0.1).save(tmp_path)
    with pytest.raises(PlatformError, match="other trained parameters"):
        EMATeacher(model, 0.1).load(tmp_path)


def test_nonsense_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        EMATeacher(make_model(), 1.5)
    with pytest.raises(ValueError, match="trainable"):
        EMATeacher(make_model().requires_grad_(False), 0.5)
