"""Tests of `report.json` as a file, with real reports of tiny runs."""

import json
import os

import jsonschema
import pytest

from crow_hf.reporting.checksums import CHECKSUMS, compare_checksums
from crow_hf.reporting.report_file import FORMAT, REPORT_DATA, SCHEMA, digest_of, read_report


def strict(schema):
    """The schema, with no key that it does not describe."""
    if isinstance(schema, list):
        return [strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {"additionalProperties": False} if "properties" in schema and schema.get("type") == "object" else {}
    return closed | {name: strict(each) for name, each in schema.items()}


def test_the_schema_describes_every_key_of_a_report(compared, purified):
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    for record in (compared.record, purified.record):
        jsonschema.validate(record, strict(SCHEMA), cls=jsonschema.Draft202012Validator)


def test_a_report_is_read_as_it_was_written(purified):
    record = read_report(purified.folder)
    assert record == purified.record == read_report(purified.folder / REPORT_DATA)
    assert record["format"] == FORMAT and record["digest"] == digest_of(record)


def signed(record):
    return record | {"digest": digest_of(record)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda record: None, "does not exist: wait until the purification is finished"),
        (lambda record: "{", "is not JSON"),
        (lambda record: "[]", r"has the format None, but this version of crow_hf reads the format 2"),
        (lambda record: record | {"format": 1}, "has the format 1"),
        (lambda record: record | {"kept": 0.0, "recipe": "paper"}, "was changed after it was written"),
        (lambda record: signed(record | {"canaries": 3}), r"is no report: \$.canaries is wrong"),
    ],
)
def test_what_cannot_be_relied_on_is_refused(change, message, purified, tmp_path):
    changed = change(purified.record)
    if changed is not None:
        text = changed if isinstance(changed, str) else json.dumps(changed)
        (tmp_path / REPORT_DATA).write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        read_report(tmp_path)


def test_a_pipe_is_not_waited_for(tmp_path):
    """Fails if a folder from a stranger can stop the gate for ever."""
    for name, read in ((REPORT_DATA, read_report), (CHECKSUMS, compare_checksums)):
        os.mkfifo(tmp_path / name)
        with pytest.raises(ValueError, match="is a pipe or a device"):
            read(tmp_path)
