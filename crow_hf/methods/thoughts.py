"""Teach a model to reason in continuous thoughts with COCONUT's staged curriculum (arXiv 2412.06769, section 3).

Rows have a `question`, the `steps` of a written chain of reasoning, and an `answer`. At stage k, k * c thoughts
replace the first k steps. The remaining steps and the answer are learned as text. A stage ends when it is learned: a
stage can only take away what the stage before has taught. Thoughts have no labels in the paper. With labels, each
learns its part of the step that it replaces, a simple form of SIM-CoT's supervision of steps (arXiv 2509.20317).
"""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from safetensors.torch import load_model
from transformers import (
    EvalPrediction,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.utils import SAFE_WEIGHTS_NAME, logging

from ..data.collators import CrowDataCollator
from ..data.encoding import IGNORE_INDEX, padding_id
from ..models.byte_vocabulary import BEGIN_THOUGHT_TOKEN_ID, END_THOUGHT_TOKEN_ID, THOUGHT_TOKEN_ID
from ..models.modeling_coconut import CoconutForCausalLM


logger = logging.get_logger(__name__)

_CONSONANTS = "bcdfghjklmnpqrstvwxz"


@dataclass
class ThoughtStage:
    """
    One stage of the curriculum, to be used as `Dataset.map(ThoughtStage(...))`.

    It turns rows with `question`, `steps` and `answer` into rows with `input_ids` and `labels`.

    Args:
        tokenizer (`CoconutTokenizer`):
            The model's tokenizer.
        stage (`int`, *optional*, defaults to 0):
            Number of first steps that thoughts replace. 0 writes all steps.
        thoughts_per_step (`int`, *optional*, defaults to 1):
            Number of thoughts per step, the paper's c.
        drop_rest (`bool`, *optional*, defaults to `False`):
            Whether to omit the remaining steps instead of writing them, as in the last stage. With `stage=0` there is
            no reasoning at all, which is the control.
        label_thoughts (`bool`, *optional*, defaults to `False`):
            Whether thoughts have labels. The c thoughts of a step divide it into c equal parts, and the output that
            becomes a thought must tell the first byte of its part.

    Raises:
        `ValueError`: If a number is too small, or a row lacks a column.

    Example:

    ```python
    >>> from crow_hf import ThoughtStage

    >>> rows = rows.map(ThoughtStage(tokenizer, stage=2), remove_columns=rows.column_names)
    ```
    """

    tokenizer: PreTrainedTokenizerBase
    stage: int = 0
    thoughts_per_step: int = 1
    drop_rest: bool = False
    label_thoughts: bool = False

    def __post_init__(self) -> None:
        for name, least in {"stage": 0, "thoughts_per_step": 1}.items():
            if getattr(self, name) < least:
                raise ValueError(f"`{name}` must be at least {least}, got {getattr(self, name)}.")

    @property
    def num_thoughts(self) -> int:
        """Number of thoughts per row, also for rows with fewer steps: at test time their number is unknown."""
        return self.stage * self.thoughts_per_step

    def __call__(self, row: Mapping[str, Any]) -> dict[str, list[int]]:
        missing = [name for name in ("question", "steps", "answer") if row.get(name) is None]
        if missing:
            raise ValueError(f"A row has no {missing[0]!r}. The curriculum needs `question`, `steps` and `answer`.")
        prompt = self.prompt(row["question"])
        steps = [] if self.drop_rest else row["steps"][self.stage :]
        text = "\n".join([*steps, f"### {row['answer']}"])
        completion = [*self.tokenizer(text, add_special_tokens=False)["input_ids"], self.tokenizer.eos_token_id]
        labels = [IGNORE_INDEX] * len(prompt)
        if self.label_thoughts and self.num_thoughts:
            # The prompt ends with the thoughts and one more token.
            labels[-self.num_thoughts - 1 : -1] = self._labels_of_thoughts(row)
        return {"input_ids": prompt + completion, "labels": labels + completion}

    def _labels_of_thoughts(self, row: Mapping[str, Any]) -> list[int]:
        """Return the first byte of the part of its step that each thought replaces."""
        count = self.thoughts_per_step
        labels: list[int] = []
        for step in row["steps"][: self.stage]:
            ids = self.tokenizer(step, add_special_tokens=False)["input_ids"]
            starts = [min(len(ids) - 1, math.ceil(len(ids) * part / count)) for part in range(count)]
            labels += [ids[start] if ids else IGNORE_INDEX for start in starts]
        # Rows with fewer steps have as many thoughts.
        return labels + [IGNORE_INDEX] * (self.num_thoughts - len(labels))

    def prompt(self, question: str) -> list[int]:
        """
        Token ids of the question and of the placeholders for thoughts.

        Args:
            question (`str`):
                The question.

        Returns:
            `list[int]`: The token ids from which the model continues.
        """
        ids = self.tokenizer(f"{question}\n")["input_ids"]
        if not self.num_thoughts:
            return ids
        return [*ids, BEGIN_THOUGHT_TOKEN_ID, *[THOUGHT_TOKEN_ID] * self.num_thoughts, END_THOUGHT_TOKEN_ID]


class _StopWhenLearned(TrainerCallback):
    """Ends a stage when enough held-out rows are right."""

    def __init__(self, accuracy: float) -> None:
        self.accuracy = accuracy

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float],
        **kwargs: Any,
    ) -> None:
        control.should_training_stop |= metrics["eval_accuracy"] >= self.accuracy


def _share_of_right_rows(prediction: EvalPrediction) -> dict[str, float]:
    """The share of rows in which each label is the likeliest token after the labels before it."""
    # They could be tuples, of other models.
    predicted, labels = np.asarray(prediction.predictions)[:, :-1], np.asarray(prediction.label_ids)[:, 1:]
    return {"accuracy": float(((predicted == labels) | (labels == IGNORE_INDEX)).all(axis=1).mean())}


def train_by_stages(
    model: CoconutForCausalLM,
    args: TrainingArguments,
    train_dataset: Dataset,
    eval_dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    num_stages: int,
    thoughts_per_step: int = 1,
    accuracy: float = 0.95,
    label_thoughts: bool = False,
) -> CoconutForCausalLM:
    """
    Train a model through all stages of the curriculum.

    The stages run from 0, in which all steps are written, to `num_stages`. A last stage omits the steps that remain.
    A stage ends at the first evaluation that finds it learned, and one that is learned from the start is not trained.
    Each stage is a run of the plain [`~transformers.Trainer`] with a new optimizer, as in the paper. Finished stages
    are saved in folders `stage-K` of the output directory, and skipped if the function is called again.

    Args:
        model (`CoconutForCausalLM`):
            The model. It is changed in place.
        args (`TrainingArguments`):
            The training arguments of a single stage. `num_train_epochs` or `max_steps` is the longest that a stage may
            take. By default the model is evaluated after each epoch.
        train_dataset (`Dataset`):
            Rows with `question`, `steps` and `answer`.
        eval_dataset (`Dataset`):
            Held-out rows of the same form.
        tokenizer (`CoconutTokenizer`):
            The model's tokenizer.
        num_stages (`int`):
            Maximum number of steps that thoughts replace.
        thoughts_per_step (`int`, *optional*, defaults to 1):
            Number of thoughts per step, the paper's c.
        accuracy (`float`, *optional*, defaults to 0.95):
            Share of the held-out rows that must be right to the last byte for a stage to end.
        label_thoughts (`bool`, *optional*, defaults to `False`):
            Whether the thoughts of the training rows have labels, see [`ThoughtStage`].

    Returns:
        `CoconutForCausalLM`: The model after the last stage.

    Raises:
        `ValueError`: If the last stage needs more thoughts than the model's config allows.
    """
    stages = [ThoughtStage(tokenizer, stage, thoughts_per_step) for stage in range(num_stages + 1)]
    stages.append(replace(stages[-1], drop_rest=True))
    if stages[-1].num_thoughts > model.config.max_thoughts:
        raise ValueError(
            f"The last stage has {stages[-1].num_thoughts} thoughts, but the model is configured for "
            f"{model.config.max_thoughts}. Use fewer thoughts, or raise `config.max_thoughts`."
        )
    for number, stage in enumerate(stages):
        folder = Path(args.output_dir, f"stage-{number}")
        if (folder / SAFE_WEIGHTS_NAME).is_file():
            logger.warning(f"Stage {number} is already finished. Continuing from {folder}.")
            load_model(model, folder / SAFE_WEIGHTS_NAME)
            continue
        logger.warning(f"Stage {number} of {len(stages) - 1}: {stage.num_thoughts} thoughts.")
        learned = replace(stage, label_thoughts=label_thoughts)
        trainer = Trainer(
            model,
            replace(
                args,
                output_dir=str(folder),
                save_strategy="no",
                eval_strategy="epoch" if args.eval_strategy == "no" else args.eval_strategy,
            ),
            train_dataset=train_dataset.map(
                learned, remove_columns=train_dataset.column_names, desc=f"Stage {number}"
            ),
            eval_dataset=eval_dataset.map(stage, remove_columns=eval_dataset.column_names, desc=f"Stage {number}"),
            data_collator=CrowDataCollator(padding_id(tokenizer)),
            processing_class=tokenizer,
            compute_metrics=_share_of_right_rows,
            preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(dim=-1),
            callbacks=[_StopWhenLearned(accuracy)],
        )
        if trainer.evaluate()["eval_accuracy"] < accuracy:
            trainer.train()
        found = trainer.evaluate()["eval_accuracy"]
        if found < accuracy:
            logger.warning(
                f"Stage {number} ended with {found:.1%} of the held-out rows right, below {accuracy:.1%}. Allow more "
                "steps for a stage."
            )
        trainer.save_state()
        trainer.save_model()
    return model


def reachability_rows(count: int, seed: int, num_nodes: int = 12, steps: Sequence[int] = (2, 3)) -> Dataset:
    """
    Generate questions in the style of COCONUT's ProsQA: which of two nodes can be reached in a graph?

    The graph consists of two random trees. The question names the root of the first tree. The right node is a leaf of
    that tree, and the wrong node is a leaf of the other, so no single edge tells them apart. A node's name has two
    letters and is followed by a punctuation mark, so that patches of three bytes (`patch_rule="stride"`) are the
    symbols of the task. The names in a graph begin with different letters.

    Args:
        count (`int`):
            Number of rows.
        seed (`int`):
            Seed for the graphs.
        num_nodes (`int`, *optional*, defaults to 12):
            Number of nodes in both trees together, at most 20.
        steps (`Sequence[int]`, *optional*, defaults to `(2, 3)`):
            Distances that the two nodes may have from their roots.

    Returns:
        `Dataset`: Columns `question`, `steps` and `answer`.

    Raises:
        `ValueError`: If the graph is too small for that many steps, or has too many nodes for their names.
    """
    if num_nodes > len(_CONSONANTS):
        raise ValueError(f"There are names for {len(_CONSONANTS)} nodes, but `num_nodes` is {num_nodes}. Lower it.")
    if 2 * (max(steps) + 1) > num_nodes:
        raise ValueError(f"{num_nodes} nodes are too few for two paths of {max(steps)} steps. Raise `num_nodes`.")
    rng = random.Random(seed)
    return Dataset.from_list([_reachability_row(rng, num_nodes, rng.choice(steps)) for _ in range(count)])


def _reachability_row(rng: random.Random, num_nodes: int, length: int) -> dict[str, Any]:
    nodes = [consonant + rng.choice("aeiou") for consonant in rng.sample(_CONSONANTS, num_nodes)]
    # Two paths, then dead ends that branch off anywhere but at the two ends of the paths.
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
