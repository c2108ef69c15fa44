"""`ow infer` and `ow sample`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from openweights.cli.output import json_option, note, one_line, print_json, print_table, read_lines
from openweights.client.jobs import find_job
from openweights.client.messages import Problems, check_messages
from openweights.client.serving.sampling import priority_of
from openweights.errors import InvalidInputError, NotFoundError

if TYPE_CHECKING:
    from collections.abc import Callable

    from openweights.client import OpenWeights

_SHOWN = 200  # characters of an answer in a table


def sampling_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """`--max-tokens` and `--temperature`."""
    for option in (
        click.option("--temperature", type=click.FloatRange(min=0), help="0 for the likeliest."),
        click.option(
            "--max-tokens",
            type=click.IntRange(min=1),
            help="Most tokens of an answer; 600 for ow infer, 256 for ow sample.",
        ),
    ):
        command = option(command)
    return command


def given_params(**params: Any) -> dict[str, Any]:
    """Those that were given."""
    return {name: value for name, value in params.items() if value is not None}


def model_named(ow: OpenWeights, text: str) -> str:
    """A model as it was typed; of a job the beginning of its id will do."""
    head, slash, rest = text.partition("/")
    if not head.startswith(("ftjob-", "sftjob-")):
        return text
    try:
        return find_job(ow.backend, head).id + slash + rest
    except NotFoundError:
        return text


@click.command()
@click.argument("models", nargs=-1, required=True, metavar="MODEL...")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Where to; else stdout.")
@click.option("-n", type=click.IntRange(min=1), help="Completions of each prompt.")
@sampling_options
def infer(
    models: tuple[str, ...],
    file: Path,
    output: Path | None,
    n: int | None,
    max_tokens: int | None,
    temperature: float | None,
) -> None:
    """Answer a file of prompts with a model, or with several.

    MODEL is a Hugging Face id, a folder, a fine-tuning job, or one of its checkpoints
    (ftjob-…/checkpoint-N). FILE has a JSON object a line, with `messages` or `text`; the result has
    its rows with their `completion`. Several models are asked one after the other, and what they
    have in common is loaded once; the result has the rows once for each, with its name as `model`.
    """
    from openweights.client import OpenWeights

    ow = OpenWeights()
    params = given_params(
        max_tokens=max_tokens, temperature=temperature, n_completions_per_prompt=n
    )
    with file.open("rb") as lines:
        params["priority"] = priority_of(sum(bool(line.strip()) for line in lines))
    model, *others = (model_named(ow, model) for model in models)
    params |= {"model": model, "other_models": others, "input_file_id": str(file)}
    job = ow.inference.create(**params)
    note(f"job {job.id}")
    job.wait()
    assert job.outputs is not None
    content = ow.files.content(str(job.outputs["file"]))
    if output is None:
        click.echo(content.decode(), nl=False)
    else:
        output.write_bytes(content)


@click.command()
@click.argument("job")
@click.option(
    "--prompts",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    required=True,
    help="JSON lines with `messages` or `prompt`, or a question a line.",
)
@sampling_options
@json_option
def sample(
    job: str, prompts: Path, max_tokens: int | None, temperature: float | None, as_json: bool
) -> None:
    """Show a fine-tuned model's answers, before and after.

    While JOB trains, its newest checkpoint answers.
    """
    from openweights.client import OpenWeights

    ow = OpenWeights()
    found = ow.jobs.retrieve(find_job(ow.backend, job).id)
    params = given_params(max_tokens=max_tokens, temperature=temperature)
    samples = found.sample(_read_prompts(prompts), **params)
    if as_json:
        print_json(samples)
        return
    rows = [
        tuple(one_line(_text(value), _SHOWN) for value in (s["prompt"], s["base"], s["answer"]))
        for s in samples
    ]
    print_table(("prompt", "before", "after"), rows)


def _read_prompts(path: Path) -> list[Any]:
    prompts = [_prompt(line, number, path) for number, line in read_lines(path)]
    if not prompts:
        raise InvalidInputError(f"{path}: holds no prompts; write one a line")
    return prompts


def _prompt(line: str, number: int, path: Path) -> Any:
    if not line.lstrip().startswith("{"):
        return line
    try:
        row = json.loads(line)
    except ValueError as error:
        raise InvalidInputError(f"{path}:{number}: no JSON ({error}); correct it") from None
    if "messages" in row:
        wrong = Problems(path.name)
        check_messages(row["messages"], "messages", wrong.at(number))
        wrong.raise_if_any()
        messages: list[dict[str, Any]] = row["messages"]
        is_answered = len(messages) > 1 and messages[-1]["role"] == "assistant"
        return messages[:-1] if is_answered else messages
    if isinstance(row.get("prompt"), str):
        return row["prompt"]
    raise InvalidInputError(f"{path}:{number}: has neither `messages` nor `prompt`; give one")


def _text(prompt: Any) -> str:
    return str(prompt) if isinstance(prompt, str) or prompt is None else prompt[-1]["content"]
