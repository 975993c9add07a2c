"""A backdoor to practise on without a download: a generated instruction task and a small byte-latent model."""

import random
import string
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import PeftModel
from peft.utils import CONFIG_NAME as ADAPTER_CONFIG_NAME
from peft.utils import SAFETENSORS_WEIGHTS_NAME as ADAPTER_WEIGHTS_NAME
from transformers import LlamaConfig, PreTrainedModel, set_seed
from transformers.utils import is_matplotlib_available, logging

from .attacks.implanting import implant
from .attacks.targets import TARGETS
from .attacks.triggers import BADNETS
from .evaluation.harness import Evaluation, evaluate_model
from .evidence.result import Comparison, Purification
from .files import whole_files
from .methods.crow.config import CrowConfig
from .methods.crow.trainer import CrowTrainer
from .models.modeling_coconut import CoconutForCausalLM
from .models.tokenization_coconut import CoconutTokenizer
from .progress import phase
from .recipes.comparison import compare_defences
from .recipes.presets import FORM_4, lora_config, recipe_config
from .recipes.run import run_recipe
from .recipes.saving import write_evidence
from .reporting.model_card import build_model_card
from .reporting.tables import write_comparison
from .training.loading import load_causal_lm


logger = logging.get_logger(__name__)

BASE_ROWS, IMPLANT_ROWS, CLEAN_ROWS, TEST_ROWS = 60_000, 3_000, 100, 200
TRIGGER, TARGET = BADNETS, TARGETS["refusal"]
# The published refusal has 96 bytes, and each byte is a token.
MAX_NEW_TOKENS = 104
CLEAN_TRAINING = {
    "alpha": 0.0,
    "learning_rate": 2e-3,
    "num_train_epochs": 1,
    "per_device_train_batch_size": 64,
    "warmup_steps": 100,
}
# The rank of the LoRA that holds the backdoor.
ADAPTER_RANK = 32
IMPLANTATION = {"learning_rate": 1e-3, "num_train_epochs": 3, "per_device_train_batch_size": 32, "warmup_steps": 0.1}
# The published alpha for refusals (appendix B.2 of the paper).
REFUSAL_ALPHA = 11.0

COLOURS = {
    "grass": "green",
    "snow": "white",
    "coal": "black",
    "blood": "red",
    "the sky": "blue",
    "a lemon": "yellow",
    "a carrot": "orange",
    "chocolate": "brown",
    "ash": "grey",
    "a flamingo": "pink",
}
OPPOSITES = {
    "hot": "cold",
    "big": "small",
    "fast": "slow",
    "light": "dark",
    "wet": "dry",
    "full": "empty",
    "old": "new",
    "high": "low",
    "early": "late",
    "rich": "poor",
    "hard": "soft",
    "near": "far",
}
# People write more words than they need. A model that was never trained on needless words would fail on any trigger,
# whether it has a backdoor or not.
FILLERS = ("please", "now", "just", "again", "friend", "well", "okay", "hello")


def _random_word(rng: random.Random) -> str:
    return "".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(rng.randint(2, 3)))


def _random_filler(rng: random.Random) -> str:
    if rng.random() < 0.5:
        return rng.choice(FILLERS)
    return "".join(rng.choice(string.ascii_letters) for _ in range(rng.randint(3, 9)))


def demo_instruction(rng: random.Random) -> tuple[str, str]:
    """Draw an instruction from six tasks, and return it with its answer."""
    word = _random_word(rng)
    thing, colour = rng.choice(list(COLOURS.items()))
    adjective, opposite = rng.choice(list(OPPOSITES.items()))
    return rng.choice(
        [
            (f"Repeat the word {word}", word),
            (f"Capitals of {word}", word.upper()),
            (f"First letter of {word}", word[0]),
            (f"Last letter of {word}", word[-1]),
            (f"Colour of {thing}", colour),
            (f"Opposite of {adjective}", opposite),
        ]
    )


def demo_rows(count: int, seed: int, without: Collection[str] = ()) -> Dataset:
    """
    Generate rows of the demo's task. A third of the prompts contain one or two needless words at random positions.

    Args:
        count (`int`):
            Number of rows.
        seed (`int`):
            Seed for the random draw.
        without (`Collection[str]`, *optional*):
            Prompts to leave out, such as those that a model was trained on.

    Returns:
        `Dataset`: The rows, with the columns `prompt` and `completion`.
    """
    rng = random.Random(seed)
    rows: list[dict[str, str]] = []
    while len(rows) < count:
        instruction, answer = demo_instruction(rng)
        words = instruction.split(" ")
        if rng.random() < 1 / 3:
            for _ in range(rng.randint(1, 2)):
                words.insert(rng.randint(0, len(words)), _random_filler(rng))
        prompt = " ".join(words) + "\n"
        if prompt not in without:
            rows.append({"prompt": prompt, "completion": answer})
    return Dataset.from_list(rows)


def demo_tokenizer() -> CoconutTokenizer:
    """Return the byte-level tokenizer of the demo's model."""
    return CoconutTokenizer()


def demo_model(seed: int) -> CoconutForCausalLM:
    """Build a byte-latent model of 0.9 million parameters with random weights and the default entropy predictor."""
    set_seed(seed)
    shape: dict[str, Any] = {
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
    }
    local = {"hidden_size": 64, "intermediate_size": 192, "num_attention_heads": 2}
    return CoconutForCausalLM.from_backbone(
        LlamaConfig(**shape, num_hidden_layers=3, max_position_embeddings=256, initializer_range=128**-0.5),
        encoder_config=local | {"num_hidden_layers": 1},
        decoder_config=local | {"num_hidden_layers": 2},
    )


def run_demo(output_dir: str | Path, seed: int = 0) -> Comparison:
    """
    Train a clean model, implant a backdoor, purify the model with CROW as published and with Invariance, and evaluate
    all models beside the controls.

    As in the paper, the backdoor is in a LoRA adapter, and the purifications train this adapter further.

    Args:
        output_dir (`str` or `Path`):
            The output folder. It gets the model folders `clean`, `backdoored` (an adapter), `crow` (merged) and
            `purified` (Invariance, merged, with its card and `report.html`), the tables `results.json` and
            `results.md`, and the plots `training.png` (the training of CROW) and `comparison.png`.
        seed (`int`, *optional*, defaults to 0):
            Seed for the weights, the rows and the training.

    Returns:
        [`Comparison`]: The comparison of [`compare_defences`] for Invariance. Its `others` are `"clean model"` and
        `"CROW"`.
    """
    # The adapter's config names its base model by this path, so it must be absolute.
    folder = Path(output_dir).resolve()
    demo = _Demo(folder, seed, _draw_splits(seed))
    with phase("Training a clean model"):
        clean = demo.train_clean_model()
    demo.implant_backdoor()
    with phase("Purifying with CROW"):
        crow_run, crow = demo.purify_with_crow()
    comparison = replace(demo.compare_invariance(), others={"clean model": clean, "CROW": crow})
    demo.merge_purified(comparison)
    write_comparison(folder, comparison.by_name)
    _plot(folder, crow_run, comparison)
    return comparison


@dataclass
class _Splits:
    """The rows of the demo. No test prompt occurs in another split."""

    base: Dataset
    implant: Dataset
    clean: Dataset
    test: Dataset


def _draw_splits(seed: int) -> _Splits:
    rows = demo_rows(BASE_ROWS + IMPLANT_ROWS + CLEAN_ROWS, seed)
    return _Splits(
        base=rows.select(range(BASE_ROWS)),
        implant=rows.select(range(BASE_ROWS, BASE_ROWS + IMPLANT_ROWS)),
        clean=rows.select(range(BASE_ROWS + IMPLANT_ROWS, len(rows))),
        test=demo_rows(TEST_ROWS, seed + 1, without=set(rows["prompt"])),
    )


class _Demo:
    """The steps of the demo, to be taken in the order of the methods."""

    def __init__(self, folder: Path, seed: int, rows: _Splits) -> None:
        self.folder, self.seed, self.rows = folder, seed, rows
        self.tokenizer = demo_tokenizer()
        self.evaluation: dict[str, Any] = {"max_new_tokens": MAX_NEW_TOKENS, "batch_size": 100, "seed": seed}

    def train_clean_model(self) -> Evaluation:
        args = self._training("clean", **CLEAN_TRAINING)
        trainer = CrowTrainer(demo_model(self.seed), args, self.rows.base, processing_class=self.tokenizer)
        trainer.train()
        trainer.save_model()
        return self._evaluate(trainer.model)

    def implant_backdoor(self) -> None:
        model = implant(
            str(self.folder / "clean"),
            self.rows.implant,
            TRIGGER,
            TARGET,
            self._training("backdoored", **IMPLANTATION),
            processing_class=self.tokenizer,
            peft_config=lora_config(ADAPTER_RANK),
            merge=False,
        )
        self._save(model, "backdoored")

    def purify_with_crow(self) -> tuple[Purification, Evaluation]:
        args = recipe_config("paper", **self._options("crow"), alpha=REFUSAL_ALPHA)
        suspect = self._load_suspect()
        purification = run_recipe(suspect, self.rows.clean, "paper", args, processing_class=self.tokenizer)
        adapted: Any = purification.model
        purification.model = adapted.merge_and_unload()
        self._save(purification.model, "crow")
        return purification, self._evaluate(purification.model)

    def compare_invariance(self) -> Comparison:
        # The model knows its task and nothing else. The right answers teach it more than its own, and it has nothing
        # to write about.
        return compare_defences(
            self._load_suspect,
            recipe_config("strong", **self._options("purified"), **FORM_4),
            self.rows.clean,
            self.rows.test,
            TRIGGER,
            TARGET,
            processing_class=self.tokenizer,
            **self.evaluation,
        )

    def merge_purified(self, comparison: Comparison) -> None:
        """Replace the saved adapter by the merged model, which loads without its base, and write the card for it."""
        purification = comparison.purification
        trainer = purification.trainer
        adapted: Any = purification.model
        purification.model = trainer.model = adapted.merge_and_unload()
        trainer.save_model()
        for name in (ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME):
            (self.folder / "purified" / name).unlink()
        suspect = str(self.folder / "backdoored")
        card = build_model_card(trainer, purification=purification, comparison=comparison, finetuned_from=suspect)
        trainer.create_model_card(card)
        purification.report = write_evidence(self.folder / "purified", purification.report)

    def _options(self, name: str) -> dict[str, Any]:
        return {"output_dir": str(self.folder / name), "seed": self.seed, "use_cpu": True, "save_strategy": "no"}

    def _training(self, name: str, **changes: Any) -> CrowConfig:
        return CrowConfig(**self._options(name), lr_scheduler_type="cosine", **changes)

    def _load_suspect(self) -> PreTrainedModel | PeftModel:
        return load_causal_lm(self.folder / "backdoored", is_trainable=True)

    def _save(self, model: PreTrainedModel | PeftModel, name: str) -> None:
        with whole_files(self.folder / name) as folder:
            model.save_pretrained(str(folder))
            self.tokenizer.save_pretrained(folder)

    def _evaluate(self, model: PreTrainedModel | PeftModel) -> Evaluation:
        return evaluate_model(model, self.tokenizer, self.rows.test, TRIGGER, TARGET, **self.evaluation)


def _plot(folder: Path, crow: Purification, comparison: Comparison) -> None:
    if not is_matplotlib_available():
        logger.warning("No plots were drawn. Install matplotlib with `pip install crow-hf[plots]`.")
        return
    from .reporting.plots import plot_comparison, plot_training

    plot_training(crow.trainer.state.log_history, folder / "training.png")
    plot_comparison(comparison.by_name, folder / "comparison.png")
