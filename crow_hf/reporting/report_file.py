"""`report.json` as a file: its version, its schema, and whether it is as it was written."""

import hashlib
import json
from pathlib import Path
from typing import Any

from ..files import check_regular


REPORT_PAGE, REPORT_DATA = "report.html", "report.json"
Record = dict[str, Any]
# It grows when a key goes, changes its meaning, or is needed by the gate.
FORMAT = 2
SCHEMA = json.loads((Path(__file__).parent / "report.schema.json").read_text(encoding="utf-8"))


def digest_of(record: Record) -> str:
    """Return the SHA-256 hash of a report without its own `digest`, over its JSON with sorted keys."""
    content = {name: value for name, value in record.items() if name != "digest"}
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def read_report(path: str | Path) -> Record:
    """
    Read a `report.json`.

    Args:
        path (`str` or `Path`):
            The file, or the folder that holds it.

    Returns:
        `dict`: The content, with the keys of [`crow_hf.reporting.record`].

    Raises:
        `ValueError`: If it is no report, has another version, or was edited.
        `OSError`: If it cannot be read.
    """
    file = Path(path) / REPORT_DATA if Path(path).is_dir() else Path(path)
    if not file.exists():
        raise ValueError(f"{file} does not exist: wait until the purification is finished, or pass another path.")
    check_regular(file)
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON ({error}): pass a report that a purification wrote.") from error
    version = record.get("format") if isinstance(record, dict) else None
    if version != FORMAT:
        raise ValueError(
            f"{file} has the format {version!r}, but this version of crow_hf reads the format {FORMAT}: purify again, "
            "or use the version that wrote it."
        )
    if record.get("digest") != digest_of(record):
        raise ValueError(f"{file} was changed after it was written: use the file that the purification wrote.")
    # Its import can take seconds.
    import jsonschema

    problem = jsonschema.exceptions.best_match(jsonschema.Draft202012Validator(SCHEMA).iter_errors(record))
    if problem is not None:
        raise ValueError(f"{file} is no report: {problem.json_path} is wrong ({problem.message[:200]}).")
    return record
