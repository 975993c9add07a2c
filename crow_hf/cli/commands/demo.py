"""`crow-hf demo`: a backdoor and its removal, on a small model that is trained on the spot."""

from ...demo import run_demo
from ...reporting.verdict import verdict
from ..options import DemoArguments
from ..shared import check_output, print_table


def run(arguments: DemoArguments) -> None:
    check_output(arguments.output_dir)
    comparison = run_demo(arguments.output_dir, arguments.seed)
    print_table(comparison.by_name, "BadNets refusal backdoor in a byte-latent model")
    print(
        f"Models and plots are in {arguments.output_dir}. The report is {arguments.output_dir}/purified/report.html."
    )
    print(verdict(comparison))
