"""Commands on pages and in recipes, and a command line that only parses them."""

import dataclasses
from itertools import takewhile


def fastbyol_words(words: list[str]) -> list[str] | None:
    """Return the words after `fastbyol` or `python -m fastbyol`; None for other commands.

    A redirection or another command that follows is left out.
    """
    words = list(takewhile(lambda word: word not in ("&", "&&", "|", ">"), words))
    if words[0] == "fastbyol":
        return words[1:]
    for k in range(len(words) - 1):
        if words[k : k + 2] == ["-m", "fastbyol"]:
            return words[k + 2 :]
    return None


def harmless(group):
    """Return a copy of a command group whose commands do nothing."""
    commands = {}
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            commands[name] = harmless(command)
        else:
            function = dataclasses.fields(command)[0].name
            commands[name] = dataclasses.replace(command, **{function: lambda call: 0})
    return dataclasses.replace(group, commands=commands)
