"""`crow-hf chat`: ask a suspect and its purified model the same, side by side."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from peft import PeftModel
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...data.rows import render
from ...data.visible import printable
from ...evaluation.generation import write_answers
from ...progress import phase
from ...reporting.report_file import read_report
from ...training.loading import load_causal_lm, load_tokenizer
from ..options import ChatArguments


QUESTION = "> "


class _Partner(NamedTuple):
    title: str
    model: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase

    def answer(self, prompt: str, max_new_tokens: int) -> str:
        """Answer a prompt as a user would hear it: in the chat template, and with the model's own settings."""
        chat = {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": ""}]}
        row = {"prompt": prompt, "completion": ""} if self.tokenizer.chat_template is None else chat
        prompts = [render(row, self.tokenizer)]
        (answer,) = write_answers(self.model, self.tokenizer, prompts, max_new_tokens, own_settings=True)
        return answer.text


def run(arguments: ChatArguments) -> None:
    suspect = read_report(arguments.run)["model"]
    folder = Path(arguments.run) if Path(arguments.run).is_dir() else Path(arguments.run).parent
    with phase("Loading the models"):
        partners = [
            _Partner(title, load_causal_lm(name, device_map="auto", **options), load_tokenizer(name))
            for title, name, options in (
                ("suspect", suspect["name"], {"revision": suspect["commit"]} if suspect["commit"] else {}),
                ("purified", folder, {}),
            )
        ]
    console = Console(markup=False, emoji=False, highlight=False)
    for prompt in _prompts(console):
        table = Table(*(Column(each.title, ratio=1, overflow="fold") for each in partners), expand=True)
        try:
            answers = [each.answer(prompt, arguments.max_new_tokens) for each in partners]
        except ValueError as error:
            # A prompt that is too long does not end the conversation.
            console.print(Text(printable(str(error))))
            continue
        table.add_row(*(Text(printable(answer)) for answer in answers))
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
