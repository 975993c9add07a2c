"""The rows of the arena's tasks."""

from crow_hf.arena.subjects import arena_rows


def test_arena_rows_are_the_same_for_a_seed():
    rows = arena_rows(30, 3)
    assert rows.to_list() == arena_rows(30, 3).to_list() != arena_rows(30, 4).to_list()
    assert all(prompt.endswith("<bot><latent><latent><eot>") for prompt in arena_rows(5, 3, thoughts=True)["prompt"])
