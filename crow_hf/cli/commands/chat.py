"""`crow-hf chat`: ask a suspect and its purified model the same, side by side."""

from collections.abc import Iterator

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from ...data.visible import printable
from ..options import ChatArguments
from ..partners import load_partners


QUESTION = "> "


def run(arguments: ChatArguments) -> None:
    partners = load_partners(arguments.run)
    console = Console(markup=False, emoji=False, highlight=False)
    for prompt in _prompts(console):
        table = Table(*(Column(each.title, ratio=1, overflow="fold") for each in partners), expand=True)
        try:
            answers = [each.answer(prompt, arguments.max_new_tokens) for each in partners]
        except ValueError as error:
            # A prompt that is too long does not end the conversation.
            console.print(Text(printable(str(error))))
            continue
        table.add_row(*(Text(printable(answer.text)) for answer in answers))
        console.print(table)


def _prompts(console: Console) -> Iterator[str]:
    """Read a prompt a line, until the input ends. Each stands for itself."""
    while True:
        try:
            prompt = console.input(QUESTION)
        except EOFError:
            return
        if prompt.strip():
            yield prompt
