"""The teacher gate of SDFT: before training, does the demonstration help the model to answer?

Some training prompts are answered greedily by the student, which does not see the demonstration,
and by its teacher, the same network that sees it, for each place where it may stand. Answers are
compared with the right ones (a row's last answer; without one its demonstration), by ROUGE-L or by
a reward. SDFT can teach only what the teacher has and the student lacks: likelihoods do not tell,
for a teacher may find the demonstration likely and answer something else. While the model trains
the same prompts are answered again (`following.py`): a teacher that follows its student may drift
with it.
"""

from __future__ import annotations

import json
import logging
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from openweights.client.messages import Problems
from openweights.errors import ConfigError, JobFailedError
from openweights.events import TeacherGate
from openweights.generation.engine import GenerationEngine
from openweights.generation.params import GenerationRequest, SamplingParams, derived_seed
from openweights.jobs.stage import counted_stage
from openweights.jobs.unsloth.config.demonstrations import (
    Showing,
    showings,
    split_right,
    split_row,
)
from openweights.jobs.unsloth.config.examples import SDFTExample, sdft_example
from openweights.jobs.unsloth.config.grpo_fields import reward_choices
from openweights.jobs.unsloth.distillation.likeness import (
    Answer,
    rouge_l_with_signs,
    same_format_share,
)
from openweights.jobs.unsloth.grpo.reward_functions import RewardFunctions, own_reward
from openweights.jobs.unsloth.rewards import Reward, Samples, answer_of, text_reward
from openweights.jobs.unsloth.runtime.ranks import first_ranks
from openweights.jobs.unsloth.runtime.reporting import Fetch, LogEvent
from openweights.jobs.unsloth.validate import TrainingConfig
from openweights.models.templates.messages import Message
from openweights.models.weights import WeightCopy

logger = logging.getLogger(__name__)

STUDENT = "student"
DOING = "teacher gate"
EXAMPLES = 3
SURE = 1.645  # standard errors from 0: by chance alone it comes once in 20 times
REPEATS = 0.5  # of the rows, for a teacher to be one that says what it is shown and nothing else
TRIED = 20  # times as many rows are looked at as are wanted, before fewer are taken
REWARD_LIMIT_S = 120.0
FILE = "sdft_showing.json"  # in a checkpoint: a resumed run does not choose again


class Scores(NamedTuple):
    """How somebody answered.

    Attributes:
        means: Each measure over all rows.
        rows: The measure that decides, for each row; NaN where a reward cannot say.
    """

    means: dict[str, float]
    rows: list[float]


@dataclass(frozen=True, slots=True)
class GateRow:
    """A training row that student and teacher answer.

    Attributes:
        right: What answers are compared with.
        prompts: Token ids by who reads them: the student, or the teacher with a showing's name.
        longest: Tokens of the demonstration, or of the right answer where that has more.
    """

    row: Mapping[str, Any]
    prompt: list[Message]
    demonstration: str
    right: str
    prompts: dict[str, list[int]]
    longest: int


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the gate found.

    Attributes:
        showing: Where the demonstration is to stand.
        passed: Whether the teacher is better than the student by the margin.
        event: All figures.
    """

    showing: Showing
    passed: bool
    event: TeacherGate


class Gate:
    """Some training prompts, answered greedily by the student and by its teachers.

    Attributes:
        rows: The prompts, with what each reader sees.
    """

    def __init__(
        self,
        config: TrainingConfig,
        engine: GenerationEngine,
        adapter: str | None,
        rows: Sequence[GateRow],
        candidates: Sequence[Showing],
        reward: Reward | None,
    ) -> None:
        self.rows = rows
        self._config = config
        self._engine = engine
        self._adapter = adapter
        self._candidates = candidates
        self._reward = reward

    def choose(self, log_event: LogEvent) -> Showing:
        """Where the demonstration is to stand, with the gate passed as the config asks.

        Raises:
            JobFailedError: The teacher is no better than the student.
        """
        readers = [STUDENT, *(c.name for c in self._candidates)]
        with counted_stage(log_event, DOING, of=len(readers) * len(self.rows), unit="answers"):
            answers = self._answers(readers)
        # The same on every rank, whatever rounding made of the answers of each.
        verdict = judge(self._config, self.rows, answers, self._candidates, self._reward)
        verdict = first_ranks(verdict)
        log_event(verdict.event.data())
        if not verdict.passed:
            message = _failure(self._config, verdict)
            if self._config.sdft_gate == "stop":
                raise JobFailedError(message)
            logger.warning(message)
        return verdict.showing

    def follow(self, teacher: WeightCopy, showing: Showing, step: int) -> TeacherGate:
        """The same figures later, of the chosen showing: the student as it is, and the teacher with
        its own weights.
        """
        answers = self._answers([STUDENT])
        with teacher.acting():
            answers |= self._answers([showing.name])
        figures = scores_of(self.rows, answers, self._reward)
        return gate_event(self._config, self.rows, answers, figures, showing, step)

    def _answers(self, readers: Sequence[str]) -> dict[str, list[Answer]]:
        """Greedy answers of the student and of each teacher, without reasoning."""
        # Who has not ended by then does not answer as he is to.
        longest = max(row.longest for row in self.rows) * 5 // 4 + 16
        limit = min(longest, self._config.sdft_max_new_tokens)
        params = SamplingParams(temperature=0, max_new_tokens=limit)
        completions = self._engine.generate(
            [
                GenerationRequest(row.prompts[name], params, self._adapter)
                for name in readers
                for row in self.rows
            ]
        )
        answers = [Answer(answer_of(own.text).strip(), own.ended) for [own] in completions]
        count = len(self.rows)
        return {n: answers[i * count : (i + 1) * count] for i, n in enumerate(readers)}


def open_gate(
    config: TrainingConfig,
    engine: GenerationEngine,
    adapter: str | None,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Mapping[str, Any]],
    fetch: Fetch,
) -> Gate | None:
    """The gate of a run; None where it is off, or where no row fits (the caller says which).

    Raises:
        ConfigError: The reward function cannot be used.
        DatasetError: A row cannot be used.
    """
    if config.sdft_gate == "off":
        return None
    candidates = showings(config.sdft_demo_placement, config.sdft_demo_repeats)
    sampled, candidates = sampled_rows(config, tokenizer, rows, candidates)
    if not sampled:
        return None
    return Gate(config, engine, adapter, sampled, candidates, _reward(config, fetch))


# ---- prompts and answers


def sampled_rows(
    config: TrainingConfig,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Mapping[str, Any]],
    candidates: tuple[Showing, ...],
) -> tuple[list[GateRow], tuple[Showing, ...]]:
    """Rows drawn by the run's seed whose prompts fit for every showing, and the showings.

    Where rows fit for none, the longer showings are left out.

    Raises:
        DatasetError: A row cannot be used.
    """
    wanted = config.sdft_gate_rows
    limit = config.max_seq_length - config.sdft_max_new_tokens
    order = random.Random(derived_seed(config.seed)).sample(
        range(len(rows)), min(len(rows), wanted * TRIED)
    )

    def fitting(kept: Sequence[Showing]) -> list[GateRow]:
        names = [showing.name for showing in kept]
        fit = [row for row in read if max(len(row.prompts[name]) for name in names) <= limit]
        return fit[:wanted]

    read: list[GateRow] = []
    for index in order:
        read.append(_gate_row(config, tokenizer, rows, index, candidates))
        if len(read) >= wanted and len(fitting(candidates)) == wanted:
            break
    for end in range(len(candidates), 0, -1):
        if found := fitting(candidates[:end]):
            return found, candidates[:end]
    return [], candidates


def _gate_row(
    config: TrainingConfig,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Mapping[str, Any]],
    index: int,
    candidates: Sequence[Showing],
) -> GateRow:
    problems = Problems("training_file")
    examples: dict[str, SDFTExample] = {}
    try:
        prompt, demonstration = split_row(rows[index])
        right = split_right(rows[index])[1]
        for showing in candidates:
            examples[showing.name], _ = sdft_example(rows[index], config, tokenizer, showing)
    except ConfigError:
        raise
    except ValueError as error:
        problems.add_error(getattr(rows[index], "line", index + 1), error)
    problems.raise_if_any(rows=1)
    first = examples[candidates[0].name]
    prompts = {name: example.teacher_prompt_ids for name, example in examples.items()}
    return GateRow(
        rows[index],
        prompt,
        demonstration,
        right,
        {STUDENT: first.prompt_ids, **prompts},
        max(len(first.demonstration_ids), len(tokenizer(right)["input_ids"])),  # type: ignore[arg-type]
    )


# ---- figures


def judge(
    config: TrainingConfig,
    rows: Sequence[GateRow],
    answers: Mapping[str, list[Answer]],
    candidates: Sequence[Showing],
    reward: Reward | None,
) -> Verdict:
    """Compare the answers, and choose: of showings within the margin of the best, the first.

    Raises:
        JobFailedError: The reward could score none of the answers.
    """
    figures = scores_of(rows, answers, reward)
    measure = _measure(figures)
    best = max(figures[showing.name].means[measure] for showing in candidates)
    margin = config.sdft_gate_margin
    chosen = next(s for s in candidates if figures[s.name].means[measure] >= best - margin)
    event = gate_event(config, rows, answers, figures, chosen, step=0)
    logger.info("teacher gate: the demonstration stands as %s", chosen.name)
    return Verdict(chosen, event.values["passed"], event)


def gate_event(
    config: TrainingConfig,
    rows: Sequence[GateRow],
    answers: Mapping[str, list[Answer]],
    figures: Mapping[str, Scores],
    showing: Showing,
    step: int,
) -> TeacherGate:
    """The figures of all who answered, with the one of `showing` as the teacher."""
    measure, margin = _measure(figures), config.sdft_gate_margin
    student, teacher = figures[STUDENT], figures[showing.name]
    pairs = list(zip(answers[STUDENT], answers[showing.name], strict=True))
    values = {
        **{f"{name}_{key}": v for name, own in figures.items() for key, v in own.means.items()},
        "student": student.means[measure],
        "teacher": teacher.means[measure],
        "same_format": same_format_share(pairs),
        "repeated": max(_repeated(rows, own) for name, own in answers.items() if name != STUDENT),
        "measure": measure,
        "margin": margin,
        "placement": showing.placement,
        "repeats": showing.repeats,
        "passed": is_better(student.rows, teacher.rows, margin),
        "examples": _examples(rows, answers),
    }
    for name, own in figures.items():
        told = ", ".join(f"{key} {value:.2f}" for key, value in own.means.items())
        logger.info("teacher gate, step %d, %d prompts: %s: %s", step, len(rows), name, told)
    return TeacherGate(step=step, rows=len(rows), values=values)


def is_better(student: Sequence[float], teacher: Sequence[float], margin: float) -> bool:
    """Whether the teacher's answers are better by the margin, and by more than some lucky ones.

    Args:
        student, teacher: A value for each row, of the same rows; NaN for one that is unknown.
    """
    gains = [after - before for before, after in zip(student, teacher, strict=True)]
    gains = [gain for gain in gains if not math.isnan(gain)]
    if not gains:
        return False
    gain = fmean(gains)
    error = stdev(gains) / math.sqrt(len(gains)) if len(gains) > 1 else 0.0
    return gain >= margin and gain > SURE * error


def _measure(figures: Mapping[str, Scores]) -> str:
    """What decides: the reward, where one is given."""
    return "reward" if "reward" in figures[STUDENT].means else "rouge_l"


def scores_of(
    rows: Sequence[GateRow], answers: Mapping[str, list[Answer]], reward: Reward | None
) -> dict[str, Scores]:
    """The figures of everybody who answered.

    Raises:
        JobFailedError: The reward could score none of the answers.
    """
    return {name: _scores(rows, own, reward) for name, own in answers.items()}


def _scores(rows: Sequence[GateRow], answers: list[Answer], reward: Reward | None) -> Scores:
    pairs = [(own, _read(row.right)) for row, own in zip(rows, answers, strict=True)]
    overlaps = [rouge_l_with_signs(own.text, right.text) for own, right in pairs]
    means = {
        "exact": sum(own.text == right.text for own, right in pairs) / len(pairs),
        "rouge_l": fmean(overlaps),
        "format": same_format_share(pairs),
    }
    if reward is None:
        return Scores(means, overlaps)
    rewards = _rewards(rows, [own.text for own in answers], reward)
    known = [value for value in rewards if not math.isnan(value)]
    if not known:
        raise JobFailedError(
            f"sdft_gate_reward: {reward.name} could score none of the answers "
            f"({'; '.join(reward.causes)}); give numbers for those that can be scored"
        )
    return Scores({**means, "reward": fmean(known)}, rewards)


def _rewards(rows: Sequence[GateRow], texts: list[str], reward: Reward) -> list[float]:
    samples = Samples(
        prompts=[row.prompt for row in rows],
        completions=texts,
        completion_ids=[[] for _ in rows],
        rows=[_with_gold(row) for row in rows],
    )
    [values] = RewardFunctions([reward], limit_s=REWARD_LIMIT_S).score(samples)
    return values


def _with_gold(row: GateRow) -> dict[str, Any]:
    """The columns of a row, without its messages, and its right answer."""
    columns = {name: value for name, value in row.row.items() if name != "messages"}
    return {**columns, "gold_response": row.right}


def _read(text: str) -> Answer:
    """A text of the dataset as an answer, without reasoning."""
    return Answer(answer_of(text).strip())


def _repeated(rows: Sequence[GateRow], answers: Sequence[Answer]) -> float:
    """The share of answers that are the demonstration, word for word."""
    pairs = zip(rows, answers, strict=True)
    return sum(own.text == _read(row.demonstration).text for row, own in pairs) / len(rows)


def _examples(rows: Sequence[GateRow], answers: Mapping[str, list[Answer]]) -> list[dict[str, str]]:
    return [
        {
            "prompt": row.prompt[-1]["content"],
            "demonstration": row.demonstration,
            **({"right": row.right} if row.right != row.demonstration else {}),
            **{name: own[index].text for name, own in answers.items()},
        }
        for index, row in enumerate(rows[:EXAMPLES])
    ]


# ---- the reward, what is said, and what a checkpoint keeps


def _reward(config: TrainingConfig, fetch: Fetch) -> Reward | None:
    if config.sdft_gate_reward is None:
        return None
    [choice] = reward_choices(config.sdft_gate_reward)
    if choice.file is None:
        return text_reward(choice.name, choice.weight)
    path = fetch(choice.file, Path("data") / f"reward_{choice.name}.py")
    return own_reward(path, choice.name, choice.weight, field="sdft_gate_reward")


def _failure(config: TrainingConfig, verdict: Verdict) -> str:
    values = verdict.event.values
    measure, name = values["measure"], verdict.showing.name
    teacher, student = values[f"{name}_{measure}"], values[f"{STUDENT}_{measure}"]
    text = (
        f"teacher gate: the teacher ({name}: {measure} {teacher:.2f}) answers no better than the "
        f"student ({student:.2f}) by sdft_gate_margin={config.sdft_gate_margin:g} and by more than "
        f"chance in {verdict.event.rows} rows, so that there is nothing for it to teach; "
    )
    # (ROUGE-L ends at 1; where a reward ends nobody knows.)
    if measure != "reward" and student > 1 - config.sdft_gate_margin:
        return text + "the student answers as it is to already"
    # (Where the demonstration is the right answer, and overlap decides, to repeat it is right.)
    is_parrot = values["repeated"] > REPEATS
    if is_parrot and (measure == "reward" or values[f"{name}_exact"] < values["repeated"]):
        return (
            f"{text}it repeats a demonstration word for word in {values['repeated']:.0%} of the "
            "rows, and that is worth no more; give as demonstration an answer as it is wanted, and "
            "no description of it, or sdft_gate='warn' to train all the same"
        )
    tries = ["demonstrations that show what is wanted", "a larger model"]
    if config.sdft_demo_placement == "template":
        tries.insert(0, "sdft_demo_placement='auto'")
    return f"{text}try {', '.join(tries)}, or sdft_gate='warn' to train all the same"


def save_showing(showing: Showing, folder: Path) -> None:
    """Write it into a checkpoint's folder."""
    kept = {"placement": showing.placement, "repeats": showing.repeats}
    (folder / FILE).write_text(json.dumps(kept), encoding="utf-8")


def load_showing(config: TrainingConfig, folder: Path) -> Showing:
    """The one that a checkpoint was trained with; without its file, the config's."""
    file = folder / FILE
    if not file.is_file():
        return showings(config.sdft_demo_placement, config.sdft_demo_repeats)[0]
    return Showing(**json.loads(file.read_text(encoding="utf-8")))
