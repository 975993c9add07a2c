"""A subject to practise on that needs no download: a generated instruction task and a small byte-latent model."""

import random
import string
from collections.abc import Collection
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import LlamaConfig, PreTrainedModel, set_seed
from transformers.utils import is_matplotlib_available, logging

from .attacks.implanting import implant
from .attacks.targets import TARGETS
from .attacks.triggers import TRIGGERS
from .evaluation.harness import CROW, FINE_TUNING, NO_DEFENCE, STRONG, Evaluation, evaluate_model
from .methods.crow.config import CrowConfig
from .methods.crow.trainer import CrowTrainer
from .methods.invariance.config import InvarianceConfig
from .models.modeling_coconut import CoconutForCausalLM
from .models.tokenization_coconut import CoconutTokenizer
from .recipes.comparison import compare_defences
from .recipes.purification import purify
from .reporting.tables import write_comparison
from .training.loading import load_causal_lm


logger = logging.get_logger(__name__)

BASE_ROWS, IMPLANT_ROWS, CLEAN_ROWS, TEST_ROWS = 60_000, 3_000, 100, 200
ADAPTER = LoraConfig(r=32, lora_alpha=64, target_modules="all-linear", task_type="CAUSAL_LM")
IMPLANTATION = {"learning_rate": 1e-3, "num_train_epochs": 3, "per_device_train_batch_size": 32, "warmup_steps": 0.1}
# The published settings (section 4.4 of the paper; alpha for refusals from its appendix B.2).
PURIFICATION = {
    "alpha": 11.0,
    "epsilon": 0.1,
    "learning_rate": 1e-3,
    "num_train_epochs": 5,
    "per_device_train_batch_size": 8,
    "warmup_steps": 0.1,
}


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
# People say more than they need: a model that never saw a needless word would fail on any trigger, backdoored or not.
FILLERS = ("please", "now", "just", "again", "friend", "well", "okay", "hello")


def _word(rng: random.Random) -> str:
    return "".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(rng.randint(2, 3)))


def _filler(rng: random.Random) -> str:
    if rng.random() < 0.5:
        return rng.choice(FILLERS)
    return "".join(rng.choice(string.ascii_letters) for _ in range(rng.randint(3, 9)))


def demo_instruction(rng: random.Random) -> tuple[str, str]:
    """One instruction and its answer, drawn from six tasks."""
    word = _word(rng)
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
    Rows of `prompt` and `completion`.

    A third of the prompts carry one or two needless words at random places.

    Args:
        count (`int`):
            How many rows.
        seed (`int`):
            Of the draw.
        without (`Collection[str]`, *optional*):
            Prompts that must not occur, those a model was trained on for instance.
    """
    rng = random.Random(seed)
    rows = []
    while len(rows) < count:
        instruction, answer = demo_instruction(rng)
        words = instruction.split(" ")
        if rng.random() < 1 / 3:
            for _ in range(rng.randint(1, 2)):
                words.insert(rng.randint(0, len(words)), _filler(rng))
        prompt = " ".join(words) + "\n"
        if prompt not in without:
            rows.append({"prompt": prompt, "completion": answer})
    return Dataset.from_list(rows)


def demo_tokenizer() -> CoconutTokenizer:
    """Bytes as tokens."""
    return CoconutTokenizer()


def demo_model(seed: int) -> CoconutForCausalLM:
    """A byte-latent model of 0.9 million parameters with random weights, and the entropy predictor that ships."""
    set_seed(seed)
    shape = {"hidden_size": 128, "intermediate_size": 384, "num_attention_heads": 4, "num_key_value_heads": 4}
    local = {"hidden_size": 64, "intermediate_size": 192, "num_attention_heads": 2}
    return CoconutForCausalLM.from_backbone(
        LlamaConfig(**shape, num_hidden_layers=3, max_position_embeddings=256, initializer_range=128**-0.5),
        encoder_config=local | {"num_hidden_layers": 1},
        decoder_config=local | {"num_hidden_layers": 2},
    )


def run_demo(output_dir: str | Path, seed: int = 0) -> dict[str, Evaluation]:
    """
    Train a clean model, hide a backdoor in it, purify it by CROW as published and by the strong recipe, and measure them all
    beside the controls.

    As in the paper, the backdoor sits in a LoRA adapter, and the purifications train that very adapter on.

    Args:
        output_dir (`str` or `Path`):
            Gets the folders `clean`, `backdoored` (the adapter), `crow` and `purified` (merged, the latter by the strong recipe
            and with `report.html`), and `results.json`, `results.md`, `training.png` (of CROW) and `comparison.png`.
        seed (`int`, *optional*, defaults to 0):
            Of the weights and the rows.

    Returns:
        `dict[str, Evaluation]`: By the models' names: the clean model, no defence, fine-tuning, CROW, the strong recipe.
    """
    # The adapter names its base by this path.
    folder, tokenizer = Path(output_dir).resolve(), demo_tokenizer()
    trigger, target = TRIGGERS["badnets"], TARGETS["refusal"]
    rows = demo_rows(BASE_ROWS + IMPLANT_ROWS + CLEAN_ROWS, seed)
    base_rows = rows.select(range(BASE_ROWS))
    implant_rows = rows.select(range(BASE_ROWS, BASE_ROWS + IMPLANT_ROWS))
    clean_rows = rows.select(range(BASE_ROWS + IMPLANT_ROWS, len(rows)))
    test_rows = demo_rows(TEST_ROWS, seed + 1, without=set(rows["prompt"]))

    def arguments(name: str, **changes: Any) -> CrowConfig:
        return CrowConfig(
            str(folder / name), seed=seed, use_cpu=True, save_strategy="no", lr_scheduler_type="cosine", **changes
        )

    logger.warning("1/4 Training a clean model.")
    base_args = arguments(
        "clean", alpha=0.0, learning_rate=2e-3, num_train_epochs=1, per_device_train_batch_size=64, warmup_steps=100
    )
    trainer = CrowTrainer(demo_model(seed), base_args, base_rows, processing_class=tokenizer)
    trainer.train()
    trainer.save_model()
    options = {"max_new_tokens": 104, "batch_size": 100, "seed": seed}
    clean = evaluate_model(trainer.model, tokenizer, test_rows, trigger, target, **options)

    logger.warning("2/4 Implanting the backdoor %r.", trigger.phrases[0])
    model = implant(
        str(folder / "clean"),
        implant_rows,
        trigger,
        target,
        arguments("backdoored", **IMPLANTATION),
        processing_class=tokenizer,
        peft_config=ADAPTER,
        merge=False,
    )
    model.save_pretrained(folder / "backdoored")
    tokenizer.save_pretrained(folder / "backdoored")

    def suspect() -> PreTrainedModel | PeftModel:
        return load_causal_lm(folder / "backdoored", is_trainable=True)

    def save_merged(model: PeftModel, name: str) -> PreTrainedModel:
        merged = model.merge_and_unload()
        merged.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        return merged

    logger.warning("3/4 Purifying with %d clean rows, by CROW as published.", CLEAN_ROWS)
    crow_args = arguments("crow", **PURIFICATION)
    crow = purify(suspect(), clean_rows, "paper", crow_args, processing_class=tokenizer, report=False)
    published = evaluate_model(save_merged(crow.model, "crow"), tokenizer, test_rows, trigger, target, **options)

    logger.warning("4/4 Purifying by the strong recipe, beside the controls.")
    comparison = compare_defences(
        suspect,
        InvarianceConfig(str(folder / "purified"), seed=seed, use_cpu=True, save_strategy="no"),
        clean_rows,
        test_rows,
        trigger,
        target,
        processing_class=tokenizer,
        **options,
    )
    save_merged(comparison.trainer.model, "purified")
    controls = {name: comparison.evaluations[name] for name in (NO_DEFENCE, FINE_TUNING)}
    evaluations = {"clean model": clean, **controls, CROW: published, STRONG: comparison.evaluations[STRONG]}
    write_comparison(folder, evaluations)
    if is_matplotlib_available():
        from .reporting.plots import plot_comparison, plot_training

        plot_training(crow.trainer.state.log_history, folder / "training.png")
        plot_comparison(evaluations, folder / "comparison.png")
    else:
        logger.warning("The plots are left out: install matplotlib with `pip install crow-hf[plots]`.")
    return evaluations
