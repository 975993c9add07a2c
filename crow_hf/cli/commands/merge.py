"""`crow-hf merge`: merge an adapter into the weights of its base model."""

from ...data.visible import printable
from ...training.merging import merge_adapter
from ..options import MergeArguments
from ..shared import check_output


def run(arguments: MergeArguments) -> None:
    check_output(arguments.output_dir)
    merge_adapter(arguments.model, arguments.output_dir)
    print(printable(f"The merged model is in {arguments.output_dir}."))
