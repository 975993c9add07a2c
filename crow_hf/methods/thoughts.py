"""Teaching a model to think in continuous thoughts: COCONUT's staged curriculum (arXiv 2412.06769, section 3).

Rows have a `question`, the `steps` of a written chain of reasoning, and an `answer`. At stage k, the first k steps give way to
k * c thoughts, for which nothing is to be learned; what remains is learned as text.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from datasets import Dataset
from safetensors.torch import load_model
from transformers import PreTrainedTokenizerBase, Trainer, TrainingArguments
from transformers.utils import SAFE_WEIGHTS_NAME, logging

from ..data.collators import CrowDataCollator
from ..data.encoding import IGNORE_INDEX, padding_id
from ..models.byte_vocabulary import BEGIN_THOUGHT_TOKEN_ID, END_THOUGHT_TOKEN_ID, THOUGHT_TOKEN_ID
from ..models.modeling_coconut import CoconutForCausalLM


logger = logging.get_logger(__name__)


@dataclass
class ThoughtStage:
    """
    One stage of the curriculum, for `Dataset.map`: rows of `question`, `steps` and `answer` become `input_ids` and `labels`.

    Args:
        tokenizer (`CoconutTokenizer`):
            Of the model.
        stage (`int`, *optional*, defaults to 0):
            How many of the first steps are thought and not written; 0 writes all of them.
        thoughts_per_step (`int`, *optional*, defaults to 1):
            The paper's c.
        drop_rest (`bool`, *optional*, defaults to `False`):
            Whether the steps beyond are left out instead of written: the last stage. With `stage=0` nothing is reasoned at
            all: the control.

    Example:

    ```python
    >>> rows = rows.map(ThoughtStage(tokenizer, stage=2), remove_columns=rows.column_names)
    ```
    """

    tokenizer: PreTrainedTokenizerBase
    stage: int = 0
    thoughts_per_step: int = 1
    drop_rest: bool = False

    def __post_init__(self) -> None:
        for name, least in {"stage": 0, "thoughts_per_step": 1}.items():
            if getattr(self, name) < least:
                raise ValueError(f"`{name}` must be at least {least}, got {getattr(self, name)}.")

    @property
    def num_thoughts(self) -> int:
        """Thoughts of every row: also those with fewer steps get as many, for at test time nobody knows how many there are."""
        return self.stage * self.thoughts_per_step

    def __call__(self, row: Mapping[str, Any]) -> dict[str, list[int]]:
        missing = [name for name in ("question", "steps", "answer") if row.get(name) is None]
        if missing:
            raise ValueError(f"A row has no {missing[0]!r}: the curriculum needs `question`, `steps` and `answer`.")
        prompt = self.prompt(row["question"])
        steps = [] if self.drop_rest else row["steps"][self.stage :]
        text = "\n".join([*steps, f"### {row['answer']}"])
        completion = [*self.tokenizer(text, add_special_tokens=False)["input_ids"], self.tokenizer.eos_token_id]
        return {"input_ids": prompt + completion, "labels": [IGNORE_INDEX] * len(prompt) + completion}

    def prompt(self, question: str) -> list[int]:
        """The ids that the model is to go on from: the question, and room for its thoughts."""
        ids = self.tokenizer(f"{question}\n")["input_ids"]
        if not self.num_thoughts:
            return ids
        return [*ids, BEGIN_THOUGHT_TOKEN_ID, *[THOUGHT_TOKEN_ID] * self.num_thoughts, END_THOUGHT_TOKEN_ID]


def train_by_stages(
    model: CoconutForCausalLM,
    args: TrainingArguments,
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    num_stages: int,
    thoughts_per_step: int = 1,
    first_epochs: float | None = None,
) -> CoconutForCausalLM:
    """
    Walk the curriculum: stage 0, where all steps are written, to `num_stages`, then once more without what is left of them.

    Each stage is a run of the plain [`~transformers.Trainer`] with a new optimizer, as in the paper. A finished one is kept in
    a folder `stage-K` of the output directory, and not run again if the function is called again.

    Args:
        model (`CoconutForCausalLM`):
            The model; it is changed.
        args (`TrainingArguments`):
            Of a single stage.
        dataset (`Dataset`):
            Rows of `question`, `steps` and `answer`.
        tokenizer (`CoconutTokenizer`):
            Of the model.
        num_stages (`int`):
            Most steps that are thought.
        thoughts_per_step (`int`, *optional*, defaults to 1):
            The paper's c.
        first_epochs (`float`, *optional*):
            Epochs of stage 0; those of `args` by default.

    Returns:
        `CoconutForCausalLM`: The model after the last stage.

    Raises:
        `ValueError`: If the last stage has more thoughts than the model is configured for.
    """
    stages = [ThoughtStage(tokenizer, stage, thoughts_per_step) for stage in range(num_stages + 1)]
    stages.append(replace(stages[-1], drop_rest=True))
    if stages[-1].num_thoughts > model.config.max_thoughts:
        raise ValueError(
            f"The last stage has {stages[-1].num_thoughts} thoughts, and the model is configured for "
            f"{model.config.max_thoughts}: use fewer, or raise `config.max_thoughts`."
        )
    for number, stage in enumerate(stages):
        folder = Path(args.output_dir, f"stage-{number}")
        if (folder / SAFE_WEIGHTS_NAME).is_file():
            logger.warning(f"Stage {number} is finished already: going on from {folder}.")
            load_model(model, folder / SAFE_WEIGHTS_NAME)
            continue
        logger.warning(f"Stage {number} of {len(stages) - 1}: {stage.num_thoughts} thoughts.")
        rows = dataset.map(stage, remove_columns=dataset.column_names, desc=f"Stage {number}")
        epochs = args.num_train_epochs if number or first_epochs is None else first_epochs
        stage_args = replace(args, output_dir=str(folder), num_train_epochs=epochs, save_strategy="no")
        trainer = Trainer(
            model,
            stage_args,
            train_dataset=rows,
            data_collator=CrowDataCollator(padding_id(tokenizer)),
            processing_class=tokenizer,
        )
        trainer.train()
        trainer.save_model()
    return model


def reachability_rows(
    count: int, seed: int, num_nodes: int = 12, steps: Sequence[int] = (2, 3), names: str = "bdfgklmnprstvz"
) -> Dataset:
    """
    Generated questions in the manner of COCONUT's ProsQA: which of two nodes can be reached in a graph?

    A random tree hangs from the node that is asked about, another from a second root; the right node is a leaf of the first,
    the wrong one of the second, so no edge alone tells them apart. Names have two letters and a sign follows each, so that
    patches of three bytes (`patch_rule="stride"`) are the task's symbols.

    Args:
        count (`int`):
            How many rows.
        seed (`int`):
            Of the draw.
        num_nodes (`int`, *optional*, defaults to 12):
            Nodes of the graph, both trees together.
        steps (`Sequence[int]`, *optional*, defaults to `(2, 3)`):
            How far away the two nodes may be from their roots.
        names (`str`, *optional*):
            Letters to draw the first of a node's name from.

    Returns:
        `Dataset`: Columns `question`, `steps` and `answer`.

    Raises:
        `ValueError`: If the graph is too small for that many steps.
    """
    if 2 * (max(steps) + 1) > num_nodes:
        raise ValueError(f"{num_nodes} nodes are too few for two paths of {max(steps)} steps: raise `num_nodes`.")
    rng = random.Random(seed)
    return Dataset.from_list([_reachability_row(rng, num_nodes, rng.choice(steps), names) for _ in range(count)])


def _reachability_row(rng: random.Random, num_nodes: int, length: int, letters: str) -> dict[str, Any]:
    nodes = rng.sample([first + vowel for first in letters for vowel in "aeiou"], num_nodes)
    # Two paths, then branches that lead nowhere, from anywhere but the two ends.
    paths = [nodes[: length + 1], nodes[length + 1 : 2 * (length + 1)]]
    edges = [edge for path in paths for edge in zip(path, path[1:], strict=False)]
    parents = [node for path in paths for node in path[:-1]]
    for node in nodes[2 * (length + 1) :]:
        edges.append((rng.choice(parents), node))
        parents.append(node)
    rng.shuffle(edges)
    path, target, other = paths[0], paths[0][-1], paths[1][-1]
    choices = rng.sample([target, other], 2)
    return {
        "question": " ".join(f"{a}>{b}" for a, b in edges) + f" {path[0]}:{choices[0]}|{choices[1]}?",
        "steps": [f"{a}>{b}" for a, b in zip(path, path[1:], strict=False)],
        "answer": target,
    }
