"""`crow-hf demo`: a backdoor and its removal, on a small model that is trained on the spot."""

from dataclasses import dataclass, field

from ...demo import run_demo
from ...reporting.verdict import verdict
from ..shared import check_output, print_table


@dataclass
class DemoArguments:
    """Train a small model, implant a backdoor, purify the model, and print the results."""

    output_dir: str = field(metadata={"help": "Folder for the models, tables and plots. It must be new or empty."})
    seed: int = field(default=0, metadata={"help": "Seed for the weights and the rows."})


ARGUMENTS = [DemoArguments]


def run(arguments: DemoArguments) -> None:
    check_output(arguments.output_dir)
    comparison = run_demo(arguments.output_dir, arguments.seed)
    print_table(comparison.by_name, "BadNets refusal backdoor in a byte-latent model")
    print(
        f"Models and plots are in {arguments.output_dir}. The report is {arguments.output_dir}/purified/report.html."
    )
    print(verdict(comparison))
