"""Rewards of GRPO: what a completion is worth.

A reward that could not be given is NaN, never 0: the trainer then leaves the completion out. Text
rewards judge the answer, which is what follows the end of the completion's reasoning. No torch
here, so that the functions can be tried out anywhere.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from openweights.models.templates.messages import Message

Scores = Sequence[float | None]

_WORD = re.compile(r"[^\W\d_]+")
OVERLONG = "overlong"
LARGEST = 1e20  # size of a reward; 32 bits hold its product with a weight
THINK_END = "</think>"
SPANISH_WEIGHT = 4.0  # about every second word of Spanish prose is in the list, so 1/4 is plenty
# Frequent Spanish words that are no English ones.
_SPANISH = """
además ahora al algo alguna algunas alguno algunos allí ambos ante antes aquel aquella aquí así
aunque ayer bajo bien buena buenas bueno buenos cada casi cómo como con contra cosa cosas cuál cual
cuales cuándo cuando cuanto cuánto de debe deben del desde después día días dijo dónde donde dos
durante él el ella ellas ellos en entonces entre eran es esa esas ese eso esos está esta estaba
estado están estar estas este esto estos estoy fue fuera fueron gente gracias grande hace hacer
hacia han hasta hola hombre hoy importante la las le les lo los luego lugar mañana más mayor mejor
menos mi mientras mis misma mismo momento mucha muchas mucho muchos mujer mundo muy nada nadie ni
ninguna ninguno nos nosotros nuestra nuestras nuestro nuestros nueva nuevo nunca o otra otras otro
otros país países para parte pero personas poco pocos poder por porque primer primera primero puede
pueden pues que qué quién quien quienes quiere saber se según ser sí si sido siempre siendo sobre
sólo su sus también tanto te tener tengo ti tiempo tiene tienen toda todas todavía todo todos
trabajo tres tú tu tus un una unas uno unos usted ustedes vamos veces ver vez vida y ya yo
"""
SPANISH_WORDS = frozenset(_SPANISH.split())


@dataclass(frozen=True, slots=True)
class Samples:
    """Completions to be scored, and what they answer.

    Attributes:
        prompts: The messages before each completion.
        completions: Texts, without special tokens.
        completion_ids: Their tokens.
        rows: The dataset's row of each, with `gold_response` (None where it has none).
        think_end_tag: Ends the reasoning of a completion.
    """

    prompts: list[list[Message]]
    completions: list[str]
    completion_ids: list[list[int]]
    rows: Sequence[Mapping[str, Any]]
    think_end_tag: str = THINK_END

    @property
    def answers(self) -> list[str]:
        """Each completion without its reasoning, and blanks around it."""
        return [answer_of(text, self.think_end_tag).strip() for text in self.completions]

    @property
    def golds(self) -> list[Any]:
        """The gold response of each."""
        return [row.get("gold_response") for row in self.rows]


def answer_of(completion: str, think_end_tag: str = THINK_END) -> str:
    """What comes after the reasoning of a completion."""
    return completion.rpartition(think_end_tag)[2]


@dataclass(frozen=True, slots=True)
class Reward:
    """One reward function of a run.

    Attributes:
        name: Names it in events.
        weight: Its factor in the sum of all.
        score: A value for each completion, None or NaN where it failed; at once or as a coroutine.
        causes: Why values failed in the step, and how often.
        file: The user's file that it is from; None for a built-in one.
    """

    name: str
    weight: float
    score: Callable[[Samples], Scores | Awaitable[Scores]]
    causes: Counter[str] = field(default_factory=Counter)
    file: Path | None = None


# ---- rewards of texts ----------------------------------------------------------------------------


def rouge_l(answer: str, gold: str) -> float:
    """F-measure of ROUGE-L as Google's `rouge-score` computes it, without stemming; 0 to 1."""
    return float(_rouge_scorer().score(gold, answer)["rougeL"].fmeasure)


@cache
def _rouge_scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=False)


def ngram_recall(answer: str, gold: str, size: int = 2) -> float:
    """Share of the gold response's word n-grams that the answer holds, 0 to 1.

    Times the ratio of the lengths where the answer is the longer one: recall alone would reward
    whoever says everything.
    """
    said, wanted = _words(answer), _words(gold)
    size = min(size, len(wanted))
    if not said or not wanted:
        return 0.0
    grams = _ngrams(wanted, size)
    recall = (grams & _ngrams(said, size)).total() / grams.total()
    return recall * min(1.0, len(wanted) / len(said))


def ngram_match(answer: str, gold: str) -> float:
    """How well the answer repeats the gold response at its length; at most 1, and below 0 where it
    is far longer. It is what the older runner calls `ngram_recall`: the share of the gold
    response's different 2- to 5-grams that the answer holds, less the difference of their lengths
    in words as a share of the gold response's. Words are what stands between blanks.
    """
    said, wanted = answer.lower().split(), gold.lower().split()
    if not wanted:
        return 0.0
    grams = {gram for size in range(2, 6) for gram in _ngrams(wanted, size)}
    held = {gram for size in range(2, 6) for gram in _ngrams(said, size)}
    recall = len(grams & held) / len(grams) if grams else 0.0
    return recall - abs(len(said) - len(wanted)) / len(wanted)


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _ngrams(words: Sequence[str], size: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(words[i : i + size]) for i in range(len(words) - size + 1))


def caps_spanish(answer: str, gold: str | None = None) -> float:
    """How far the answer is Spanish in capitals, 0 to 2; a stand-in trait that does no harm.

    The share of capitals among its letters, plus the share of Spanish words, four times and at most
    1. The sum, so that either half can be learned first. No word makes up more than a tenth of the
    share, so that saying one over and over does not pay. Without letters 0.
    """
    letters = [c for c in answer if c.isalpha()]
    words = _WORD.findall(answer.lower())
    if not letters or not words:
        return 0.0
    capitals = sum(c.isupper() for c in letters) / len(letters)
    most = max(1, len(words) // 10)
    spoken = Counter(word for word in words if word in SPANISH_WORDS)
    spanish = sum(min(count, most) for count in spoken.values()) / len(words)
    return capitals + min(1.0, SPANISH_WEIGHT * spanish)


TEXT_REWARDS: dict[str, Callable[[str, Any], float]] = {
    "rouge_l": rouge_l,
    "ngram_recall": ngram_recall,
    "ngram_match": ngram_match,
    "caps_spanish": caps_spanish,
}


def text_reward(name: str, weight: float) -> Reward:
    """The reward of that name."""
    function = TEXT_REWARDS[name]

    def score(samples: Samples) -> list[float]:
        return [function(a, g) for a, g in zip(samples.answers, samples.golds, strict=True)]

    return Reward(name, weight, score)


def overlong_reward(limit: int, weight: float) -> Reward:
    """How far a completion is beyond half of the tokens that it may have, 0 to -1.

    The soft punishment of DAPO (arXiv 2503.14476, equation 13) with a buffer of half the limit; the
    older runner takes three tenths of it off its `caps_spanish`.

    Args:
        limit: The most tokens of a completion.
    """

    def score(samples: Samples) -> list[float]:
        lengths = [len(ids) for ids in samples.completion_ids]
        return [min(0.0, max(-1.0, 1 - 2 * length / limit)) for length in lengths]

    return Reward(OVERLONG, weight, score)
