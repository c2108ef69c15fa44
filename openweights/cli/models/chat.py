"""`ow chat` and `ow serve-model`."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from openweights.cli.models.infer import given_params, model_named, sampling_options
from openweights.cli.output import note, printable
from openweights.errors import OpenWeightsError

if TYPE_CHECKING:
    from openweights.client import OpenWeights

_HELP = "/system TEXT  /reset  /compare MODEL|JOB (again without it to stop)  /quit"
_HISTORY = "chat_history"


@dataclass
class Conversation:
    """What was said to some models so far.

    Attributes:
        models: Asked one after the other; the history goes on with the first one's answers.
        asked: Those that have been asked before.
    """

    ow: OpenWeights
    models: list[str]
    params: dict[str, Any]
    system: str | None = None
    messages: list[dict[str, str]] = field(default_factory=list[dict[str, str]])
    asked: set[str] = field(default_factory=set[str])

    def command(self, line: str) -> None:
        """Do what a line that begins with / says."""
        name, _, rest = line.partition(" ")
        rest = rest.strip()
        if name == "/system":
            self.system = rest or None
        elif name == "/reset":
            self.messages.clear()
        elif name == "/compare":
            self.compare_with(rest)
        else:
            note(_HELP)

    def compare_with(self, model: str) -> None:
        """Have a second model answer, too; an empty name ends that."""
        try:
            others = [model_to_ask(self.ow, model)] if model else []
        except OpenWeightsError as error:
            note(str(error))
            return
        self.models = [self.models[0], *others]

    def ask(self, text: str) -> None:
        """Put a question, and print the answers as they come."""
        self.messages.append({"role": "user", "content": text})
        try:
            answers = [self._answer(model) for model in self.models]
        except KeyboardInterrupt:
            self.messages.pop()
            note("stopped")
            return
        except OpenWeightsError as error:
            self.messages.pop()
            note(str(error))
            return
        self.messages.append({"role": "assistant", "content": answers[0]})

    def _answer(self, model: str) -> str:
        from openweights.client.serving.chat import is_openai

        if not is_openai(model) and model not in self.asked:
            note(f"{model} is loaded first, where it does not run yet; Ctrl-C stops the wait")
        self.asked.add(model)
        if len(self.models) > 1:
            click.secho(f"[{model}]", bold=True)
        head = [{"role": "system", "content": self.system}] if self.system else []
        answer: Any = self.ow.chat.completions.create(
            model=model, messages=[*head, *self.messages], stream=True, **self.params
        )
        told = ""
        with contextlib.closing(answer):
            for chunk in answer:
                piece = (chunk.choices[0].delta.content or "") if chunk.choices else ""
                told += piece
                click.echo("".join(c if c == "\n" else printable(c) for c in piece), nl=False)
        click.echo()
        return told


def model_to_ask(ow: OpenWeights, text: str) -> str:
    """A model as it was typed, which is there.

    Raises:
        ConfigError: It is not; says what was probably meant.
    """
    from openweights.client.serving.chat import is_openai
    from openweights.jobs.known_models import check_on_hub
    from openweights.jobs.pinning import pinned_model

    model = model_named(ow, text)
    if not is_openai(model):
        pinned_model(ow, model)
        check_on_hub(ow, model)
    return model


@click.command()
@click.argument("model")
@click.option("--system", help="The system message; /system changes it.")
@sampling_options
def chat(model: str, system: str | None, max_tokens: int | None, temperature: float | None) -> None:
    """Talk to a model in the terminal.

    MODEL is a Hugging Face id, a folder, a fine-tuning job (its newest checkpoint while it trains),
    or a model of OpenAI. It is deployed first, and ends when you leave. /system TEXT, /reset and
    /compare MODEL do what they say; /quit or Ctrl-D leaves.
    """
    from openweights.client import OpenWeights

    ow = OpenWeights()
    params = given_params(max_tokens=max_tokens, temperature=temperature)
    conversation = Conversation(ow, [model_to_ask(ow, model)], params, system)
    note(_HELP)
    try:
        with _line_history(ow.settings.home / _HISTORY):
            _talk(conversation)
    finally:
        ow.close()


def _talk(conversation: Conversation) -> None:
    while True:
        try:
            line = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            click.echo()
            return
        if line in ("/quit", "/exit"):
            return
        if line.startswith("/"):
            conversation.command(line)
        elif line:
            conversation.ask(line)


@contextlib.contextmanager
def _line_history(path: Path) -> Generator[None]:
    """Lines that were typed before come back with the arrow keys, where there is readline."""
    try:
        import readline
    except ImportError:
        yield
        return
    with contextlib.suppress(OSError):
        readline.read_history_file(path)
    yield
    with contextlib.suppress(OSError):
        readline.write_history_file(path)


@click.command("serve-model")
@click.argument("models", metavar="MODEL...", nargs=-1, required=True)
@click.option("--max-model-len", type=click.IntRange(min=1), help="Prompt and answer, in tokens.")
def serve_model(models: Sequence[str], max_model_len: int | None) -> None:
    """Serve models to OpenAI clients.

    Until Ctrl-C. Models on one base share a server; each is printed with its address and key.
    """
    from openweights.client import OpenWeights

    ow = OpenWeights()
    apis = ow.api.multi_deploy(
        [model_to_ask(ow, model) for model in models], **given_params(max_model_len=max_model_len)
    )
    try:
        for model, api in apis.items():
            api.up()
            click.echo(f"{model}  base_url={api.base_url}  api_key={api.api_key}")
        threading.Event().wait()
    except KeyboardInterrupt:
        note("ending")
    finally:
        for api in {id(api): api for api in apis.values()}.values():
            api.down()
