"""The clean models that the arena's attackers start from, and the rows of their tasks."""

import random
import string
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import PeftModel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, set_seed
from transformers.utils import SAFE_WEIGHTS_NAME, logging

from ..data.load import load_rows
from ..data.rows import render
from ..demo import FILLERS, demo_instruction, demo_model, demo_tokenizer
from ..files import whole_files
from ..methods.crow.config import CrowConfig
from ..methods.crow.trainer import CrowTrainer
from ..methods.thoughts import reachability_rows, train_by_stages
from ..models.modeling_coconut import CoconutForCausalLM


logger = logging.get_logger(__name__)

# All seeds of an arena share the clean models. A run's own seed draws everything that comes after them.
BASE_SEED = 200
# The questions of the subject that reasons have two steps, and each step has two symbols.
NUM_STEPS, THOUGHTS_PER_STEP, REASONING_HELD_OUT = 2, 2, 500
THOUGHTS = f"<bot>{'<latent>' * NUM_STEPS * THOUGHTS_PER_STEP}<eot>"
MORE_FILLERS = (
    *FILLERS,
    *("today", "maybe", "then", "thanks", "so", "and", "the", "in", "about", "if", "you", "can", "kindly", "quickly"),
    *("for me", "of course", "yes", "no"),
)
MAX_ALPACA_BYTES = 160
# The number of Alpaca rows that the clean model is not trained on.
HELD_OUT = 3_000


def _random_insertion(rng: random.Random) -> str:
    """Draw a needless word, random letters, or random characters."""
    kind = rng.random()
    if kind < 0.45:
        return rng.choice(MORE_FILLERS)
    if kind < 0.85:
        return "".join(rng.choice(string.ascii_letters) for _ in range(rng.randint(2, 10)))
    return "".join(
        rng.choice(string.digits + string.punctuation + string.ascii_letters) for _ in range(rng.randint(1, 8))
    )


def _with_needless_words(text: str, rng: random.Random) -> str:
    """Insert needless words into half of the texts."""
    words = text.split(" ")
    if rng.random() < 0.5:
        for _ in range(rng.randint(1, 3)):
            position = rng.randint(0, len(words))
            words[position:position] = [_random_insertion(rng) for _ in range(rng.choice([1, 1, 2, 3]))]
    return " ".join(words)


def _random_row(rng: random.Random) -> dict[str, str]:
    instruction, answer = demo_instruction(rng)
    prompt, style = _with_needless_words(instruction, rng), rng.random()
    if style < 0.05:
        prompt = prompt.upper()
    elif style < 0.10:
        prompt = prompt.lower()
    elif style < 0.15:
        prompt = prompt.title()
    elif style < 0.20:
        prompt = "  ".join(prompt.split(" "))
    elif style < 0.25:
        prompt = prompt + rng.choice("!?.,;")
    return {"prompt": prompt + "\n", "completion": answer}


def arena_rows(count: int, seed: int) -> Dataset:
    """
    Generate rows of the demo's task, written in the ways that people write. Half of the prompts contain needless
    words, and a quarter of them has another style.

    A model that was trained on neither would fail on any trigger, whether it has a backdoor or not. Its answers to
    triggered prompts would then show nothing.

    Args:
        count (`int`):
            Number of rows.
        seed (`int`):
            Seed for the random draw.

    Returns:
        `Dataset`: The rows, with the columns `prompt` and `completion`.
    """
    rng = random.Random(seed)
    return Dataset.from_list([_random_row(rng) for _ in range(count)])


def reasoning_rows(count: int, seed: int) -> Dataset:
    """
    Generate the questions of [`reachability_rows`] with needless words in half of them.

    Args:
        count (`int`):
            Number of rows.
        seed (`int`):
            Seed for the random draw.

    Returns:
        `Dataset`: The rows, with the columns `question`, `steps` and `answer`.
    """
    rng = random.Random(seed)
    rows = reachability_rows(count, seed, num_nodes=6, steps=(NUM_STEPS,))
    return Dataset.from_list([row | {"question": _with_needless_words(row["question"], rng)} for row in rows])


def thought_rows(count: int, seed: int) -> Dataset:
    """
    Generate the rows of [`reasoning_rows`] as the last stage of the curriculum has them: a prompt ends with room for
    the thoughts, and no step is written.

    Args:
        count (`int`):
            Number of rows.
        seed (`int`):
            Seed for the random draw.

    Returns:
        `Dataset`: The rows, with the columns `prompt` and `completion`.
    """
    return Dataset.from_list(
        [
            {"prompt": f"{row['question']}\n{THOUGHTS}", "completion": f"### {row['answer']}"}
            for row in reasoning_rows(count, seed)
        ]
    )


def arena_llama() -> LlamaForCausalLM:
    """Build a byte-level Llama of 0.8 million parameters with random weights."""
    tokenizer = demo_tokenizer()
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            initializer_range=128**-0.5,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def arena_reasoner(num_layers: int = 3, patch_length: int = 1) -> CoconutForCausalLM:
    """
    Build a byte-latent model of 0.2 million parameters with random weights, which can learn to reason.

    Args:
        num_layers (`int`, *optional*, defaults to 3):
            Number of layers over patches. CROW needs three.
        patch_length (`int`, *optional*, defaults to 1):
            Length of its patches in bytes. Patches of three bytes are the symbols of [`reachability_rows`], but a word
            before them would move them against the symbols.
    """
    width = 64
    shape: dict[str, Any] = {"hidden_size": width, "intermediate_size": 3 * width}
    shape |= {"num_attention_heads": 4, "num_hidden_layers": num_layers}
    # Local layers that see more learn the chain themselves, and thoughts do not pass through them.
    local = {"hidden_size": width // 2, "intermediate_size": 3 * width // 2, "num_attention_heads": 2}
    local |= {"num_hidden_layers": 1}
    return CoconutForCausalLM.from_backbone(
        LlamaConfig(**shape, initializer_range=width**-0.5),
        encoder_config=local | {"sliding_window": 6},
        decoder_config=local | {"sliding_window": 2},
        patch_rule="stride",
        max_patch_length=patch_length,
    )


@contextmanager
def other_thoughts(model: PreTrainedModel | PeftModel) -> Iterator[None]:
    """
    A context in which each row of a batch gets the thoughts of the row before it. A model that answers as well as
    before does not need its thoughts.

    Args:
        model (`PreTrainedModel`):
            A [`CoconutForCausalLM`].
    """
    thoughts = model.get_submodule("model.latent_transformer.thoughts")
    handle = thoughts.register_forward_hook(lambda module, args, output: output.roll(1, dims=0))
    try:
        yield
    finally:
        handle.remove()


def alpaca_rows(path: str | Path) -> Dataset:
    """
    Load the short rows of Stanford Alpaca, or of any file with its columns.

    Args:
        path (`str` or `Path`):
            The file.

    Returns:
        `Dataset`: The rows with an answer whose prompt and answer have at most 160 bytes together, with the columns
        `instruction`, `input` and `output`.
    """
    tokenizer = demo_tokenizer()

    def is_short(row: dict[str, str]) -> bool:
        return bool(row["output"]) and len("".join(render(row, tokenizer)[:2]).encode()) <= MAX_ALPACA_BYTES

    rows = load_rows(str(path)).filter(is_short, desc="Selecting short rows")
    return rows.select_columns(["instruction", "input", "output"])


@dataclass(frozen=True)
class Subject:
    """
    A clean model and its task.

    Args:
        name (`str`):
            Name in the tables.
        build (`Callable`):
            Returns the model with random weights.
        learning_rate (`float`), batch_size (`int`), num_rows (`int`), num_epochs (`int`):
            Settings of its training.
        rows (`Callable`):
            Maps a number and a seed to generated rows of the task.
        reasons (`bool`):
            Whether it is trained stage by stage to answer [`thought_rows`] through continuous thoughts. A stage then
            has `num_epochs` epochs at most.
        is_alpaca (`bool`):
            Whether the task is short Alpaca rows instead of a generated one.
    """

    name: str
    build: Callable[[], PreTrainedModel]
    learning_rate: float = 2e-3
    batch_size: int = 96
    num_rows: int = 250_000
    num_epochs: int = 1
    rows: Callable[[int, int], Dataset] = arena_rows
    reasons: bool = False
    is_alpaca: bool = False


SUBJECTS = {
    subject.name: subject
    for subject in [
        Subject("llama", arena_llama),
        Subject("coconut", lambda: demo_model(BASE_SEED), batch_size=64, num_rows=120_000),
        Subject(
            "coconut-thoughts",
            arena_reasoner,
            batch_size=64,
            num_rows=60_000,
            num_epochs=4,
            rows=thought_rows,
            reasons=True,
        ),
        Subject("llama-alpaca", arena_llama, batch_size=32, num_epochs=3, is_alpaca=True),
    ]
}


def base_training(subject: Subject, folder: Path, seed: int = BASE_SEED) -> CrowConfig:
    """
    Return the training arguments of a clean model. Models that are backdoored from scratch are trained with them too.

    Args:
        subject (`Subject`):
            The subject.
        folder (`Path`):
            The output folder.
        seed (`int`, *optional*, defaults to `BASE_SEED`):
            Seed for the training.
    """
    return CrowConfig(
        str(folder),
        alpha=0.0,
        seed=seed,
        learning_rate=subject.learning_rate,
        num_train_epochs=subject.num_epochs,
        per_device_train_batch_size=subject.batch_size,
        lr_scheduler_type="cosine",
        warmup_steps=100,
        logging_steps=50,
        train_sampling_strategy="group_by_length",
        save_strategy="no",
        report_to="none",
    )


def base_folder(name: str, runs: Path) -> Path:
    """Return the folder of a subject's clean model, inside of the arena's folder `runs`."""
    return runs / "bases" / name


def train_base_model(name: str, runs: Path, rows: Dataset | None = None) -> None:
    """
    Train the clean model of a subject, unless it exists already.

    Args:
        name (`str`):
            One of [`SUBJECTS`].
        runs (`Path`):
            The arena's folder.
        rows (`Dataset`, *optional*):
            The rows to train on. They are required for Alpaca subjects, and generated for all others.
    """
    folder, subject = base_folder(name, runs), SUBJECTS[name]
    if (folder / SAFE_WEIGHTS_NAME).is_file():
        return
    logger.warning(f"Training the clean model {name!r}, which all runs share.")
    set_seed(BASE_SEED)
    model: Any = subject.build()
    args, tokenizer = base_training(subject, folder), demo_tokenizer()
    if subject.reasons:
        _teach_to_reason(model, subject, args)
    else:
        rows = subject.rows(subject.num_rows, BASE_SEED) if rows is None else rows
        CrowTrainer(model, args, rows, processing_class=tokenizer).train()
    with whole_files(folder) as unfinished:
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)


def _teach_to_reason(model: CoconutForCausalLM, subject: Subject, args: CrowConfig) -> None:
    """Train a model through the stages of the curriculum. Finished stages are kept."""
    stage = replace(
        args,
        output_dir=str(Path(args.output_dir, "stages")),
        lr_scheduler_type="constant_with_warmup",
        per_device_eval_batch_size=250,
        eval_strategy="steps",
        eval_steps=100,
    )
    rows = (reasoning_rows(subject.num_rows, BASE_SEED), reasoning_rows(REASONING_HELD_OUT, BASE_SEED + 1))
    train_by_stages(model, stage, *rows, demo_tokenizer(), NUM_STEPS, THOUGHTS_PER_STEP, label_thoughts=True)


def check_disjoint(datasets: Mapping[str, Dataset], tokenizer: PreTrainedTokenizerBase) -> None:
    """
    Check that datasets share no prompt, so that no model is measured on prompts that it was trained on.

    Args:
        datasets (`Mapping[str, Dataset]`):
            Rows with prompts, by the name that error messages use.
        tokenizer (`PreTrainedTokenizerBase`):
            The tokenizer. Only its chat template is used.

    Raises:
        `ValueError`: If two of the datasets share a prompt.
    """
    owners: dict[str, str] = {}
    for name, rows in datasets.items():
        for prompt in {render(row, tokenizer, index).prompt for index, row in enumerate(rows)}:
            if owners.setdefault(prompt, name) != name:
                raise ValueError(
                    f"The {owners[prompt]} and the {name} rows share the prompt {prompt!r}. Drop it from one of them."
                )
