"""Rows and arguments for short runs of the recipes."""

from datasets import Dataset

from crow_hf.recipes.presets import recipe_config


PROMPTS = [f"tell {a} of thing {b}=" for a in "abc" for b in "wxyz"]
ANSWERS = [f"{a}{b}" for a in "abc" for b in "wxyz"]
ROWS = Dataset.from_dict({"prompt": PROMPTS, "completion": ANSWERS})
QUIET = {
    "use_cpu": True,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "max_steps": 2,
    "per_device_train_batch_size": 4,
}
INVARIANCE = {
    "num_views": 12,
    "num_canaries": 0,
    "num_written_rows": 0,
    "num_phrases": 0,
    "screen_rows": False,
    "max_answer_length": 4,
}


def arguments(tmp_path, recipe="strong", **kwargs):
    """The arguments of a short run of a recipe. Each call has an output folder of its own."""
    settings = QUIET | (INVARIANCE if recipe == "strong" else {}) | kwargs
    return recipe_config(recipe, str(tmp_path / f"run{len(list(tmp_path.glob('run*')))}"), **settings)
