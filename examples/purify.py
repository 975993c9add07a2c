"""Purify a suspect model with CROW in a script of your own.

    crow-hf demo --output_dir runs/demo        # makes a backdoored model to try it on
    python examples/purify.py --model runs/demo/backdoored --output_dir runs/purified

    accelerate launch examples/purify.py ...   # on several GPUs

Without `--dataset` the rows are those of the demo's generated task; a real suspect needs about 100 clean rows of the
kind it was trained on.
"""

from dataclasses import dataclass, field

from peft import LoraConfig
from transformers import HfArgumentParser

from crow_hf import CrowConfig, CrowTrainer
from crow_hf.data.load import load_rows
from crow_hf.demo import demo_rows


@dataclass
class ScriptArguments:
    model: str = field(metadata={"help": "The suspect: a folder or a name on the Hub."})
    dataset: str | None = field(default=None, metadata={"help": "A file or a name on the Hub, with clean rows."})
    lora: bool = field(default=False, metadata={"help": "Train a LoRA instead of all weights."})


def main() -> None:
    script, args = HfArgumentParser([ScriptArguments, CrowConfig]).parse_args_into_dataclasses()
    rows = load_rows(script.dataset) if script.dataset else demo_rows(100, seed=1)
    trainer = CrowTrainer(
        script.model,
        args,
        rows,
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear") if script.lora else None,
    )
    trainer.train()
    trainer.save_model()  # and pushes it, with --push_to_hub


if __name__ == "__main__":
    main()
