"""Tests of the words of the command line."""

import pytest

from crow_hf.cli.words import as_options, printable


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


def test_control_characters_are_visible():
    """Fails if a file of the suspect can change the title of the terminal or the direction of the text."""
    assert printable("\x1b]0;owned\x07 \u202e \x9b2J") == r"\x1b]0;owned\x07 \u202e \x9b2J"
    assert printable("grün, 中文, 👍\n\tx") == "grün, 中文, 👍\n\tx"
