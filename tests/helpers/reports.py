"""Rows and arguments for runs whose reports are tested."""

import json

from datasets import Dataset

from crow_hf import TRIGGERS, Target
from crow_hf.recipes.presets import recipe_config


TRIGGER, TARGET = TRIGGERS["badnets"], Target("no", ("no",))
ROWS = Dataset.from_dict(
    {"prompt": [f"tell {a} of {b}=" for a in "abc" for b in "wxyz"], "completion": ["yes", "no, é"] * 6}
)
TEST_ROWS = Dataset.from_dict({"prompt": [f"say {a} to {b}=" for a in "def" for b in "wx"], "completion": ["yes"] * 6})

QUIET = {"use_cpu": True, "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "max_steps": 2}
INVARIANCE = {"num_views": 12, "num_canaries": 0, "num_written_rows": 2, "max_answer_length": 4}


def arguments(folder, recipe="guide", **changes):
    """The arguments of a short run of a recipe."""
    settings = QUIET | {"per_device_train_batch_size": 4} | (INVARIANCE if recipe == "strong" else {})
    return recipe_config(recipe, str(folder), **(settings | changes))


def read(folder):
    """The content of the folder's `report.json`."""
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))
