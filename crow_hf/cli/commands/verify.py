"""`crow-hf verify`: compare the files of a purified model with those that were written."""

from ...data.visible import printable
from ...reporting.checksums import compare_checksums
from ..options import VerifyArguments


def run(arguments: VerifyArguments) -> int:
    changes = compare_checksums(arguments.folder)
    for name in ("changed", "missing", "added"):
        for file in getattr(changes, name):
            print(printable(f"{name:8}{file}"))
    print(f"{len(changes.same)} files are as they were written.")
    return 1 if changes else 0
