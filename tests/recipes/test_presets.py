"""Tests of the recipes' arguments."""

from crow_hf import CrowConfig
from crow_hf.methods.invariance.config import InvarianceConfig
from crow_hf.recipes.presets import RECIPES, control_config, lora_config, recipe_config
from crow_hf.recipes.purification import purify
from helpers.recipes import ROWS, arguments
from helpers.tiny import tiny_llama


def test_paper_is_crow_as_published(tmp_path, byte_tokenizer):
    """
    Section 4.4 of the paper: a LoRA of rank 8 on all linear layers, 5 epochs, a batch size of 8, a learning rate of
    1e-3, a cosine schedule with a tenth of warm-up.
    """
    args = recipe_config("paper", str(tmp_path / "run"), use_cpu=True, report_to="none", save_strategy="no")
    found = (args.learning_rate, args.num_train_epochs, args.per_device_train_batch_size, args.alpha, args.epsilon)
    assert found == (1e-3, 5, 8, 5.5, 0.1)
    assert args.lr_scheduler_type == "cosine" and args.warmup_steps == 0.1
    assert args.consistency_layers == "paper" and args.epsilon_mode == "absolute"
    trainer = purify(tiny_llama(), ROWS, "paper", args, processing_class=byte_tokenizer, merge=False).trainer
    assert trainer.state.max_steps == 10
    adapter = trainer.model.peft_config["default"]
    assert (adapter.r, adapter.lora_alpha) == (8, 16)
    assert {"q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj", "gate_proj"} == set(adapter.target_modules)


def test_settings_of_the_recipes(tmp_path):
    path = str(tmp_path)
    assert type(recipe_config("strong", path, use_cpu=True)) is InvarianceConfig
    assert type(recipe_config("paper", path, use_cpu=True)) is CrowConfig
    guide, default = recipe_config("guide", path, use_cpu=True), CrowConfig(path, use_cpu=True)
    for name in (
        "learning_rate",
        "num_train_epochs",
        "per_device_train_batch_size",
        "alpha",
        "epsilon",
        "warmup_steps",
    ):
        assert getattr(guide, name) == getattr(default, name)
    changed = [recipe_config(recipe, path, use_cpu=True, learning_rate=3e-4, alpha=1.0) for recipe in RECIPES]
    assert all(args.learning_rate == 3e-4 and args.alpha == 1.0 and args.output_dir == path for args in changed)
    strong = recipe_config("strong", path, use_cpu=True)
    assert strong.screen_rows and strong.num_canaries == 2 and strong.num_written_rows == 100
    assert (strong.keep, strong.label_weight, strong.alpha, strong.learning_rate) == (0, 0, 0, None)


def test_control_of_crow_has_its_arguments_without_the_consistency_loss(tmp_path):
    args = recipe_config("paper", str(tmp_path), use_cpu=True, seed=3)
    control = control_config(args, len(ROWS))
    assert type(control) is CrowConfig and control.alpha == 0
    assert control.to_dict() | {"alpha": 5.5} == args.to_dict()


def test_control_of_invariance_takes_as_many_steps_as_canaries_and_training(tmp_path):
    """Fails if the control trains for fewer steps than the purification, which would flatter the purification."""
    settings = {"max_steps": -1, "num_views": 20, "num_canaries": 2, "num_train_epochs": 3, "learning_rate": 3e-4}
    args = arguments(tmp_path, **settings)
    # 20 views of the 12 rows are 5 batches of 4, in 3 epochs. Canaries: 3 kinds of prompts, 10 of each, in batches.
    assert control_config(args, len(ROWS)).max_steps == 15 + 8
    # More rows than views are all used.
    assert control_config(args, 41).max_steps == 33 + 8
    # So are those that the suspect writes.
    assert control_config(arguments(tmp_path, **settings, num_written_rows=29), len(ROWS)).max_steps == 33 + 8
    assert (
        control_config(arguments(tmp_path, max_steps=7, num_canaries=0, learning_rate=3e-4), len(ROWS)).max_steps == 7
    )
    control = control_config(args, len(ROWS))
    assert type(control) is CrowConfig and control.alpha == 0 and control.train_sampling_strategy == "random"
    assert (control.learning_rate, control.lr_scheduler_type) == (args.learning_rate, args.lr_scheduler_type)


def test_lora_of_the_recipes_has_twice_its_rank_as_alpha():
    assert [(lora_config(rank).r, lora_config(rank).lora_alpha) for rank in (8, 3)] == [(8, 16), (3, 6)]
