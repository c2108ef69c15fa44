"""Talks to a model in the browser: a deployment, and gradio's chat before it.

python cookbook/api/gradio_ui.py [--model NAME|FOLDER|ftjob-…] [--port 7860]

Needs gradio (`pip install gradio`). `ow chat MODEL` does the same in the terminal.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from cookbook.models import as_command, choice, parser
from openweights import OpenWeights

Reply = Callable[[str, Sequence[dict[str, Any]]], Iterator[str]]


def replies(client: Any, model: str) -> Reply:
    """What gradio calls with a message and the conversation before it; gives the answer as it
    grows.
    """

    def reply(message: str, history: Sequence[dict[str, Any]]) -> Iterator[str]:
        before = [{"role": turn["role"], "content": turn["content"]} for turn in history]
        asked = [*before, {"role": "user", "content": message}]
        told = ""
        for chunk in client.chat.completions.create(
            model=model, messages=asked, max_tokens=300, stream=True
        ):
            told += chunk.choices[0].delta.content or ""
            yield told

    return reply


def main() -> None:
    """Deploy, and show the page until Ctrl-C."""
    options = parser(__doc__)
    options.add_argument("--port", type=int, default=7860, help="of the page, on this machine")
    asked = options.parse_args()
    try:
        gradio: Any = importlib.import_module("gradio")
    except ModuleNotFoundError:
        raise SystemExit("this page needs gradio: pip install gradio") from None
    ow = OpenWeights()
    chosen = choice(ow, asked)
    with ow.api.deploy(chosen.model, requires_vram_gb=chosen.vram_gb) as client:
        page = gradio.ChatInterface(replies(client, chosen.model), title=chosen.model)
        page.launch(server_name="127.0.0.1", server_port=asked.port)


if __name__ == "__main__":
    as_command(main)
