"""Purify a suspect model with CROW in your own script.

    crow-hf demo --output_dir runs/demo        # creates a backdoored model to try this on
    python examples/purify.py --model runs/demo/backdoored --output_dir runs/purified

    accelerate launch examples/purify.py ...   # on several GPUs

Without `--dataset`, the rows are those of the demo's generated task. A real suspect needs about 100 clean rows of the
kind that it was trained on.
"""

from dataclasses import dataclass, field

from transformers import HfArgumentParser

from crow_hf import CrowConfig, CrowTrainer
from crow_hf.data.load import load_rows
from crow_hf.demo import demo_rows
from crow_hf.recipes.presets import lora_config


@dataclass
class ScriptArguments:
    model: str = field(metadata={"help": "The suspect: a folder or a name on the Hub."})
    dataset: str | None = field(default=None, metadata={"help": "The clean rows: a file or a name on the Hub."})
    lora: bool = field(default=False, metadata={"help": "Train a fresh LoRA instead of all weights."})


def main() -> None:
    script, args = HfArgumentParser([ScriptArguments, CrowConfig]).parse_args_into_dataclasses()
    rows = load_rows(script.dataset) if script.dataset else demo_rows(100, seed=1)
    trainer = CrowTrainer(script.model, args, rows, peft_config=lora_config() if script.lora else None)
    trainer.train()
    trainer.save_model()  # also pushes the model if --push_to_hub is set


if __name__ == "__main__":
    main()
