"""Purify a suspect model and push it to the Hub, with a card that says what was measured and what was not.

    hf auth login
    crow-hf demo --output_dir runs/demo        # creates a backdoored model to try this on
    python examples/push_to_hub.py --model runs/demo/backdoored --output_dir runs/purified --hub_model_id NAME

Without `--dataset`, the rows are those of the demo's generated task. A wrong token or name is refused before the
training. If the upload fails, the purified model is in `--output_dir`, and the error says how to push it from there.
"""

from dataclasses import dataclass, field

from transformers import HfArgumentParser

from crow_hf import InvarianceConfig, purify
from crow_hf.data.load import load_rows
from crow_hf.demo import demo_rows


@dataclass
class ScriptArguments:
    model: str = field(metadata={"help": "The suspect: a folder or a name on the Hub."})
    dataset: str | None = field(default=None, metadata={"help": "The clean rows: a file or a name on the Hub."})
    license: str | None = field(
        default=None, metadata={"help": "License of the model. Default: the one in the suspect's card."}
    )


def main() -> None:
    parser = HfArgumentParser([ScriptArguments, InvarianceConfig])
    parser.set_defaults(push_to_hub=True)
    script, args = parser.parse_args_into_dataclasses()
    rows = load_rows(script.dataset) if script.dataset else demo_rows(100, seed=1)
    card_fields = {} if script.license is None else {"license": script.license}
    purification = purify(script.model, rows, "strong", args, card_fields=card_fields)
    if failures := purification.trainer.failures:
        raise SystemExit("\n".join(failures))
    # Only the main process pushes.
    if purification.hub_url is not None:
        print(f"The purified model is on the Hub: {purification.hub_url}")


if __name__ == "__main__":
    main()
