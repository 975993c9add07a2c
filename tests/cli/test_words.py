"""Tests of the words of the command line."""

import pytest

from crow_hf.cli.words import as_options


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Pass `max_rows=0` to use all.", "Pass `--max_rows 0` to use all."),
        ("Set `merge=True`.", "Set `--merge true`."),
        ("continue with resume_from_checkpoint=True.", "continue with --resume_from_checkpoint true."),
        ("set `num_canaries` to 0", "set `--num_canaries` to 0"),
        ("a smaller `keep`, or", "a smaller `--keep`, or"),
        ("raise `learning_rate=0.5`, or", "raise `--learning_rate 0.5`, or"),
        # Columns, arguments of functions, and what the command line does not have.
        ("needs the column `text`", "needs the column `text`"),
        ("call purify(model, merge=True)", "call purify(model, merge=True)"),
        ("pass `peft_config`, with `is_trainable=True`", "pass `peft_config`, with `is_trainable=True`"),
    ],
)
def test_messages_name_options_as_the_command_line_has_them(text, expected):
    assert as_options(text, "purify") == expected


def test_other_commands_name_the_options_of_purify():
    """Fails if `doctor` advises in the words of Python."""
    assert as_options("train with `bf16=True`", "doctor") == "train with `--bf16 true`"
