"""The rows of the arena's tasks."""

import pytest
from datasets import Dataset

from crow_hf.arena.subjects import arena_rows, check_disjoint


def test_arena_rows_are_the_same_for_a_seed():
    rows = arena_rows(30, 3)
    assert rows.to_list() == arena_rows(30, 3).to_list() != arena_rows(30, 4).to_list()
    assert all(prompt.endswith("<bot><latent><latent><eot>") for prompt in arena_rows(5, 3, thoughts=True)["prompt"])


def test_shared_prompts_are_refused(byte_tokenizer):
    """An unreadable row is named too."""
    rows = Dataset.from_dict({"prompt": ["a", "b"], "completion": ["x", "y"]})
    other = Dataset.from_dict({"prompt": ["c", "b"], "completion": ["x", "z"]})
    check_disjoint({"train": rows, "test": other.select([0])}, byte_tokenizer)
    with pytest.raises(ValueError, match="The train and the test rows share the prompt 'b'"):
        check_disjoint({"train": rows, "test": other}, byte_tokenizer)
    with pytest.raises(ValueError, match="^Row 1 holds NoneType"):
        check_disjoint({"train": Dataset.from_dict({"prompt": ["a", None], "completion": ["x", "y"]})}, byte_tokenizer)
