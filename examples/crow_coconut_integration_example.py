"""Run the project's guide: cut text into patches, purify a byte-latent model on RedPajama, and plot the metrics.

    python examples/crow_coconut_integration_example.py --output_dir runs/guide --offline_sample

Without `--model`, the script uses a small model with random weights, which shows how the parts fit together. Without
`--offline_sample`, it reads the clean text from the sample of RedPajama on the Hub, or from the shards of
`--data_files`.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

from transformers import HfArgumentParser, LlamaConfig, set_seed

from crow_hf import (
    CoconutForCausalLM,
    CoconutTokenizer,
    apply_crow_to_coconut,
    doctor,
    entropy_patching,
    load_causal_lm,
    plot_crow_training_progress,
)


@dataclass
class Arguments:
    output_dir: str = field(metadata={"help": "New folder for the purified model, metrics.json and training.png."})
    model: str | None = field(
        default=None, metadata={"help": "The suspect, a CoconutForCausalLM: a folder or a name on the Hub."}
    )
    max_chars: int = field(default=1000, metadata={"help": "Number of characters of RedPajama to read."})
    data_files: str | None = field(default=None, metadata={"help": "Local shards of RedPajama, or a glob pattern."})
    offline_sample: bool = field(default=False, metadata={"help": "Use a generated text instead of RedPajama."})
    epsilon: float = field(default=0.1, metadata={"help": "Size of the adversarial step on the embeddings."})
    alpha: float = field(default=5.5, metadata={"help": "Weight of the consistency loss."})
    learning_rate: float = field(default=2e-5, metadata={"help": "Peak learning rate."})


def random_model() -> CoconutForCausalLM:
    set_seed(0)
    shape = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 3, "num_attention_heads": 4}
    return CoconutForCausalLM.from_backbone(
        LlamaConfig(**shape, max_position_embeddings=1024, initializer_range=128**-0.5)
    )


def main() -> None:
    args = HfArgumentParser(Arguments).parse_args_into_dataclasses()[0]
    folder = Path(args.output_dir)
    if folder.exists():
        raise SystemExit(f"{folder} already exists: choose another --output_dir.")
    folder.mkdir(parents=True)
    model = load_causal_lm(args.model, is_trainable=True) if args.model else random_model()

    # 1. Cut text into patches. A patch begins where the model's entropy predictor is uncertain about the next byte.
    predictor, module = model.latent_transformer.entropy_predictor, model.binary_patch_module
    text = b"Where one word ends, a patch begins."
    print(b"|".join(entropy_patching(text, predictor, module.threshold, module.relative_threshold)).decode())

    # 2. Check for problems that would spoil the purification.
    for finding in doctor(model, processing_class=CoconutTokenizer()):
        print(f"{finding.level:8} {finding.name}: {finding.found} {finding.remedy}")

    # 3. Purify the model with CROW.
    purified_model, metrics = apply_crow_to_coconut(
        coconut_model=model,
        max_chars=args.max_chars,
        epsilon=args.epsilon,
        alpha=args.alpha,
        learning_rate=args.learning_rate,
        data_files=args.data_files,
        offline_sample=args.offline_sample,
    )

    # 4. Save the model and its metrics. They do not show whether a backdoor is gone: `crow-hf evaluate` measures that.
    distance = metrics["summary"]["consistency_perturbed"]
    print(f"Distance between perturbed layers: {distance['first']:.3g} at first, {distance['last']:.3g} at last.")
    purified_model.save_pretrained(folder)
    CoconutTokenizer().save_pretrained(folder)
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=1, allow_nan=False), encoding="utf-8")
    plot_crow_training_progress(metrics, folder / "training.png")


if __name__ == "__main__":
    main()
