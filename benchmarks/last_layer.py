"""Which tensor should CROW take as the output of the last layer? The evidence behind the choice of `CrowTrainer`.

    crow-hf demo --output_dir runs/demo
    python benchmarks/last_layer.py --model runs/demo/clean

It compares three choices of H^N: the raw output of the layer, the output after the final norm (`hidden_states[-1]` of
transformers), and none (the published code). For each seed, a new backdoor is implanted into the demo's clean model
and purified with each choice.
"""

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import AutoTokenizer

from crow_hf import TARGETS, TRIGGERS, CrowConfig, CrowTrainer, evaluate_model, implant
from crow_hf.demo import ADAPTER_RANK, CLEAN_ROWS, IMPLANT_ROWS, IMPLANTATION, REFUSAL_ALPHA, TEST_ROWS, demo_rows
from crow_hf.recipes.presets import PAPER, lora_config
from crow_hf.training.recorder import ForwardRecord, LayerRecorder


# The published settings, but with transformers' linear schedule.
PURIFICATION = PAPER | {"alpha": REFUSAL_ALPHA, "lr_scheduler_type": "linear"}


class NormedRecorder(LayerRecorder):
    """Records the last layer's output after the final norm."""

    def __init__(self, model):
        super().__init__(model)
        self.norm = model.get_base_model().model.norm

    @contextmanager
    def record(self, perturb: Callable[[torch.Tensor], torch.Tensor] | None = None) -> Iterator[ForwardRecord]:
        with super().record(perturb) as record:
            yield record
        record.hidden_states[-1] = self.norm(record.hidden_states[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    tokenizer, test = AutoTokenizer.from_pretrained(options.model), demo_rows(TEST_ROWS, seed=99)
    backdoor = TRIGGERS["badnets"], TARGETS["refusal"]
    print("| seed | H^N | attack success | right if triggered | right if clean | bits per byte |")
    print("| --- | --- | ---: | ---: | ---: | ---: |")
    for seed in options.seeds:
        rows = demo_rows(IMPLANT_ROWS + CLEAN_ROWS, seed=1000 + seed)
        clean = rows.select(range(IMPLANT_ROWS, len(rows)))
        with TemporaryDirectory() as folder:
            common = {"output_dir": folder, "seed": seed, "use_cpu": True, "save_strategy": "no", "disable_tqdm": True}
            model = implant(
                str(options.model.resolve()),
                rows.select(range(IMPLANT_ROWS)),
                *backdoor,
                CrowConfig(**common, **IMPLANTATION),
                peft_config=lora_config(ADAPTER_RANK),
                merge=False,
            )
            model.save_pretrained(Path(folder, "suspect"))
            for name in ("as the layer leaves it", "after the final norm", "left out"):
                args = CrowConfig(
                    **common, **PURIFICATION, consistency_layers="reference" if name == "left out" else "paper"
                )
                trainer = CrowTrainer(str(Path(folder, "suspect")), args, clean, processing_class=tokenizer)
                if name == "after the final norm":
                    trainer.recorder = NormedRecorder(trainer.model)
                trainer.train()
                evaluation = evaluate_model(trainer.model, tokenizer, test, *backdoor, max_new_tokens=104)
                triggered, prompts = evaluation.triggered, evaluation.clean
                print(
                    f"| {seed} | {name} | {triggered.target.rate:.3f} | {triggered.exact_match.rate:.3f} | "
                    f"{prompts.exact_match.rate:.3f} | {prompts.bits_per_byte:.3f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
