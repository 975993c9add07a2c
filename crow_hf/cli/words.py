"""The words of the command line: messages of the library name options as Python writes them."""

import re
from dataclasses import fields

from .arguments import options_of_command
from .options import COMMANDS


# An option, and perhaps its value. In a call of a function it stays as it is.
_OPTION = re.compile(
    r"(?<![\w(])(?<!, )(?P<open>`?)(?P<name>[a-z]\w+)(?:=(?P<value>[^\s`,)]*[^\s`,).]))?(?P<close>`?)"
)


def as_options(text: str, command: str) -> str:
    """
    Write the options that a message names as the command line has them: `max_rows=0` becomes `--max_rows 0`.

    Args:
        text (`str`):
            The message.
        command (`str`):
            The command. Its options are known, and those of `purify`, which other commands give advice about.
    """
    known = options_of_command("purify") | options_of_command(command)
    own = {each.name for name in ("purify", command) for each in fields(COMMANDS[name])}

    def rewritten(match: re.Match[str]) -> str:
        name, value = match["name"], match["value"]
        # A word in backticks alone may also be a column, such as `text`. Without them it is only a word.
        is_named = match["open"] and ("_" in name or name not in own)
        is_option = name in known and (value is not None or is_named)
        if not is_option:
            return match[0]
        words = [f"--{name}", *([] if value is None else [value.lower() if value in ("True", "False") else value])]
        return match["open"] + " ".join(words) + match["close"]

    return _OPTION.sub(rewritten, text)
