"""`ow fields`: what `create` takes, from the models that check it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, get_args

import click

from openweights.cli.output import fail, json_option, print_json, print_table
from openweights.client.params import field_meanings
from openweights.number_words import number_words

if TYPE_CHECKING:
    from pydantic import BaseModel
    from pydantic.fields import FieldInfo

HEAD = """\
# Every field

What `ow.fine_tuning.create` takes, all as flat keyword arguments, with defaults and the losses that
read each field; where it says all, every loss does. A field of another loss is refused where it
asks for something, else left out with a warning. What is known of one in the terminal:
`ow fields NAME`. This page is made by `ow fields --markdown`.
"""


@dataclass(frozen=True, slots=True)
class FieldRow:
    """A field as people read of it.

    Attributes:
        default: As Python; None for a field that must be given.
        losses: Those that read it; empty for all.
        choices: Values that it may have, where these are few.
    """

    name: str
    default: str | None
    losses: tuple[str, ...]
    meaning: str
    choices: tuple[str, ...]


@click.command()
@click.argument("name", required=False)
@click.option("--markdown", is_flag=True, help="Print the page of the documentation.")
@json_option
def fields(name: str | None, markdown: bool, as_json: bool) -> None:
    """List the fields of fine-tuning jobs, or explain one.

    With the default of each, the losses that read it, and what it means. The name of a loss lists
    those that it reads and others do not.
    """
    sections = field_sections()
    if markdown:
        click.echo(page(sections), nl=False)
    elif own := [row for found in sections.values() for row in found if name in row.losses]:
        _print_rows(own)
    elif name is not None:
        _explain(name, sections)
    elif as_json:
        print_json({title: rows for title, rows in sections.items()})
    else:
        _print_rows([row for found in sections.values() for row in found])


def _print_rows(rows: list[FieldRow]) -> None:
    print_table(("field", "default", "losses", "meaning"), [_cells(row) for row in rows])


def _explain(name: str, sections: dict[str, list[FieldRow]]) -> None:
    from openweights.errors import closest
    from openweights.jobs.unsloth.config.other_names import meant_field

    found = [row for rows in sections.values() for row in rows if row.name == name]
    if not found:
        known = [row.name for rows in sections.values() for row in rows]
        near = meant_field(name) or closest(name, known)
        remedy = f"did you mean {near}?" if near else "`ow fields` lists them"
        fail(f"there is no field {name}; {remedy}")
    for row in found:
        losses = ", ".join(row.losses) or "all losses"
        click.echo(f"{row.name}  ({losses})\n  {row.meaning}")
        if row.choices:
            click.echo(f"  one of {', '.join(row.choices)}")
        click.echo("  must be given" if row.default is None else f"  default: {row.default}")


def _cells(row: FieldRow) -> tuple[str, ...]:
    return row.name, row.default or "-", ", ".join(row.losses) or "all", row.meaning


def field_sections() -> dict[str, list[FieldRow]]:
    """The fields by what they are about."""
    from openweights.client.job_options import JobOptions
    from openweights.jobs.unsloth.config.fields import MultipleChoiceCallback, SamplingCallback
    from openweights.jobs.unsloth.validate import TrainingConfig

    rows = list(_rows(TrainingConfig))
    own = {prefix: [row for row in rows if row.name.startswith(prefix)] for prefix in _PREFIXES}
    return {
        "The model and its training": [r for r in rows if not r.name.startswith(_PREFIXES)],
        "Self-distillation": own["sdft_"],
        "Rewards": own["grpo_"],
        "Entries of sampling_callbacks": list(_rows(SamplingCallback)),
        "Entries of mcq_callbacks": list(_rows(MultipleChoiceCallback)),
        "How and where the job runs": list(_rows(JobOptions)),
    }


_PREFIXES = ("sdft_", "grpo_")


def page(sections: dict[str, list[FieldRow]]) -> str:
    """`docs/fields.md`."""
    text = HEAD
    for title, rows in sections.items():
        text += (
            f"\n## {title}\n\n| field | default | losses | meaning |\n| --- | --- | --- | --- |\n"
        )
        text += "".join(_markdown(row) for row in rows)
    return text


def _markdown(row: FieldRow) -> str:
    default = "required" if row.default is None else f"`{row.default}`"
    meaning = row.meaning + (f" One of {', '.join(row.choices)}." if row.choices else "")
    cells = (f"`{row.name}`", default, ", ".join(row.losses) or "all", meaning)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


def _rows(model: type[BaseModel]) -> Iterator[FieldRow]:
    from openweights.jobs.unsloth.config.problems import field_losses

    said = meanings(model)
    for name, field in model.model_fields.items():
        default = None if field.is_required() else field.get_default(call_default_factory=True)  # pyright: ignore[reportUnknownMemberType]
        losses = field_losses(name, "")
        yield FieldRow(
            name,
            None if field.is_required() else _literal(default),
            () if losses == ("",) else losses,
            said[name],
            tuple(_choices(field)),
        )


def _literal(default: object) -> str:
    return number_words(default) if isinstance(default, float) else repr(default)


def _choices(field: FieldInfo) -> Iterator[str]:
    """The values of a `Literal`, with those of further types as their names."""
    for value in get_args(field.annotation):
        if isinstance(value, str):
            yield repr(value)


def meanings(model: type[BaseModel]) -> dict[str, str]:
    """What the docstrings of a model and of what it inherits say of each field.

    Raises:
        KeyError: They say nothing of one.
    """
    found = field_meanings(model)
    missing = model.model_fields.keys() - found.keys()
    if missing:
        raise KeyError(f"{model.__name__} says nothing of {', '.join(sorted(missing))}")
    return {name: found[name] for name in model.model_fields}
