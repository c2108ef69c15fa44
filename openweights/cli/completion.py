"""`ow completion`: what makes a shell complete commands, options and job ids."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

SHELLS = ("bash", "zsh", "fish")


@click.command()
@click.argument("shell", type=click.Choice(SHELLS))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print what makes SHELL complete commands, options and job ids.

    For bash: eval "$(ow completion bash)" in ~/.bashrc. For zsh: eval "$(ow completion zsh)" in
    ~/.zshrc. For fish: ow completion fish > ~/.config/fish/completions/ow.fish
    """
    kind = get_completion_class(shell)
    assert kind is not None
    click.echo(kind(ctx.find_root().command, {}, "ow", "_OW_COMPLETE").source())
