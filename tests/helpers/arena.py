"""Tiny suspects for the arena, and rows of its results."""

from datasets import Dataset
from peft import LoraConfig, get_peft_model

from crow_hf import Target
from crow_hf.arena import table
from crow_hf.arena.attacks import Suspect
from crow_hf.attacks.triggers import get_trigger
from crow_hf.demo import demo_tokenizer
from helpers.tiny import tiny_llama


ROWS = Dataset.from_dict(
    {"prompt": [f"say {word}\n" for word in ("ba", "ko", "mi", "tu")], "completion": list("bkmt")}
)


def save_suspect(folder, route="merged"):
    """Save a tiny model with its tokenizer, as an adapter if the route is `"adapter"`."""
    model = tiny_llama(vocab_size=len(demo_tokenizer()), max_position_embeddings=256)
    if route == "adapter":
        model.save_pretrained(folder / "base")
        model.name_or_path = model.config._name_or_path = str(folder / "base")
        model = get_peft_model(
            model, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
        )
    model.save_pretrained(folder)
    demo_tokenizer().save_pretrained(folder)


def tiny_suspect(folder, attack):
    """A tiny suspect with four rows, saved in `folder` unless it is there already."""
    if not folder.exists():
        save_suspect(folder, attack.route)
        tiny_llama(1, vocab_size=len(demo_tokenizer())).save_pretrained(folder / "clean")
    return Suspect(attack, folder, folder / "clean", get_trigger("badnets"), Target("no", ("no",)), ROWS, ROWS, ROWS)


def counts(hits, total=200):
    return {"hits": hits, "total": total}


def result(attack, method, seed, hits, clean=100, **changes):
    """A row of the results with the columns that the tables read."""
    shares = {name: counts(0) for name in table.SHARES}
    return {
        "attack": attack,
        "method": method,
        "seed": seed,
        "num_clean": 100,
        **shares,
        "attack_success": counts(hits),
        "exact_match_clean": counts(clean),
        "exact_match_triggered": counts(clean // 2),
        "bits_per_byte_clean": 1.0,
        "bits_per_byte_triggered": 1.0,
        "steps": 10,
        "seconds": 2.0,
        **changes,
    }
