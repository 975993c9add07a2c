"""Purify a model and push it to the Hub, with a card that says what was shown and what was not.

    hf auth login
    crow-hf demo --output_dir runs/demo        # makes a backdoored model to try it on
    python examples/push_to_hub.py --model runs/demo/backdoored --output_dir runs/purified --hub_model_id NAME

Without `--dataset` the rows are those of the demo's generated task. If the upload fails, the model is in
`--output_dir`, and the message says how to push it from there.
"""

from dataclasses import dataclass, field

from transformers import HfArgumentParser

from crow_hf import InvarianceConfig, purify
from crow_hf.data.load import load_rows
from crow_hf.demo import demo_rows


@dataclass
class ScriptArguments:
    model: str = field(metadata={"help": "The suspect: a folder or a name on the Hub."})
    dataset: str | None = field(default=None, metadata={"help": "A file or a name on the Hub, with clean rows."})
    license: str | None = field(
        default=None, metadata={"help": "License of the model, if the suspect's card names none."}
    )


def main() -> None:
    script, args = HfArgumentParser([ScriptArguments, InvarianceConfig]).parse_args_into_dataclasses()
    # `purify` opens the repository before it trains, so a wrong token shows at once.
    args.push_to_hub = True
    rows = load_rows(script.dataset) if script.dataset else demo_rows(100, seed=1)
    card_fields = {} if script.license is None else {"license": script.license}
    purification = purify(script.model, rows, args=args, card_fields=card_fields)
    # One process pushes. The others have no address.
    if purification.hub_url is not None:
        print(f"The purified model is on the Hub: {purification.hub_url}")
    for failure in purification.trainer.failures:
        print(failure)


if __name__ == "__main__":
    main()
