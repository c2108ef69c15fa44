"""`ow eval`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from openweights.cli.models.infer import given_params, model_named
from openweights.cli.output import json_option, note, print_json, print_table


@click.command("eval")
@click.argument("models", metavar="MODEL...", nargs=-1, required=True)
@click.option(
    "--suite",
    multiple=True,
    required=True,
    help="humaneval, gsm8k, tool_use, or what scores answers to --prompts; may be repeated.",
)
@click.option("--prompts", help="JSON lines with `messages`: a file, or a file id.")
@click.option("--judge", help="The model that llm_judge and similarity_judge ask.")
@click.option("--limit", type=click.IntRange(min=1), help="So many problems of each.")
@click.option("--samples", type=click.IntRange(min=1), help="Answers to each problem.")
@click.option("--temperature", type=click.FloatRange(min=0), help="0, the default: the likeliest.")
@click.option("--max-tokens", type=click.IntRange(min=1), help="Most tokens of an answer.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="A folder for the results.")
@json_option
def evaluate(
    models: Sequence[str], suite: Sequence[str], output: Path | None, as_json: bool, **params: Any
) -> None:
    """Score models on problems, side by side.

    MODEL is a Hugging Face id, a folder, a fine-tuning job, one of its checkpoints, or a model of
    OpenAI; differences are to the first. Answers are scored by rouge_l, ngram_recall, caps_spanish,
    llm_judge, similarity_judge, or FILE.py:FUNCTION, when there are --prompts. The table names
    jobs' models by what was done to them; --json has their ids.
    """
    from openweights.client import OpenWeights
    from openweights.client.watching.model_names import model_names
    from openweights.events import Evaluation

    ow = OpenWeights()
    named = [model_named(ow, model) for model in models]
    job = ow.evaluate.create(models=named, suite=list(suite), **given_params(**params))
    note(f"job {job.id}")
    job.wait()
    last = job.runs[-1].id
    events = job.events(type=Evaluation.type)
    scores = [event.data for event in events if event.run_id == last]
    if output is not None:
        job.download(output)
    if as_json:
        print_json(scores)
        return
    columns = ("task", "model", "score", "95 %", "problems", "difference", "95 %")
    names = model_names(ow.backend, (score["model"] for score in scores))
    print_table(columns, [_cells(score, names) for score in scores])


def _cells(score: Mapping[str, Any], names: Mapping[str, str]) -> tuple[str, ...]:
    value, interval = f"{score['score']:.3f}", _interval(score["low"], score["high"])
    model = names.get(score["model"], score["model"])
    own: tuple[str, ...] = (score["task"], model, value, interval, str(score["problems"]))
    if score.get("difference") is None:
        return (*own, "-", "-")
    change, low, high = score["difference"]
    return (*own, f"{change:+.3f}", _interval(low, high, "+"))


def _interval(low: float, high: float, sign: str = "") -> str:
    return f"{low:{sign}.3f} to {high:{sign}.3f}"
