"""Text files are written whole or not at all."""

import pytest

from crow_hf.files import write_text


def test_file_is_written_whole_or_not_at_all(tmp_path):
    """A lone surrogate fails half-way: the old file must stay."""
    path = tmp_path / "results.json"
    write_text(path, "old é")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "new" * 100_000 + "\ud800")
    assert path.read_text(encoding="utf-8") == "old é"
