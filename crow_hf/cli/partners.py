"""The suspect and the purified model of a run, loaded to answer the same prompts."""

from pathlib import Path
from typing import Any, NamedTuple

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.rows import render
from ..evaluation.generation import Answer, write_answers
from ..progress import phase
from ..reporting.report_file import read_report
from ..training.loading import load_causal_lm, load_tokenizer


class Partner(NamedTuple):
    """A model to talk to, with a title for people."""

    title: str
    model: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase

    def row(self, prompt: str) -> dict[str, Any]:
        """Return a row with a prompt of a user, as a chat if the model has a template."""
        if self.tokenizer.chat_template is None:
            return {"prompt": prompt, "completion": ""}
        return {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": ""}]}

    def answer(self, prompt: str, max_new_tokens: int) -> Answer:
        """
        Answer a prompt as a user would hear it: in the chat template, and with the model's own settings.

        Raises:
            `ValueError`: If the prompt is empty, or does not fit into the model's context.
        """
        prompts = [render(self.row(prompt), self.tokenizer)]
        (answer,) = write_answers(self.model, self.tokenizer, prompts, max_new_tokens, own_settings=True)
        return answer


def load_partners(run: str) -> list[Partner]:
    """
    Load both models of a run.

    Args:
        run (`str`):
            The output folder of a purification, or its `report.json`, which names the suspect.

    Returns:
        `list[Partner]`: The suspect and the purified model.

    Raises:
        `ValueError`: If there is no report, or if a model cannot be loaded.
        `OSError`: If a file cannot be read.
    """
    suspect = read_report(run)["model"]
    folder = Path(run) if Path(run).is_dir() else Path(run).parent
    revision = {"revision": suspect["commit"]} if suspect["commit"] else {}
    with phase("Loading the models"):
        return [
            Partner(title, load_causal_lm(name, device_map="auto", **options), load_tokenizer(name))
            for title, name, options in (("suspect", suspect["name"], revision), ("purified", folder, {}))
        ]
