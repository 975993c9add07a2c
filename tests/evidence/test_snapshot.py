"""Tests of snapshots: the answers and the layer profile of a model on a few rows."""

import pytest
import torch
from datasets import Dataset

from crow_hf import TRIGGERS, Target
from crow_hf.data.rows import render
from crow_hf.evaluation.generation import generate_answers
from crow_hf.evaluation.layer_profile import layer_profile
from crow_hf.evidence import snapshot as snapshot_module
from crow_hf.evidence.snapshot import SnapshotRows, snapshot
from helpers.tiny import crow_args, ragged_rows, same_weights, tiny_llama, weights_of


TRIGGER, TARGET = TRIGGERS["badnets"], Target("no", ("no",))
ROWS = Dataset.from_dict({"prompt": [f"say {number}=" for number in range(40)], "completion": ["yes"] * 40})


@pytest.fixture(autouse=True)
def short_answers(monkeypatch):
    monkeypatch.setattr(snapshot_module, "SAMPLE_TOKENS", 6)


@pytest.mark.parametrize("trigger", [None, TRIGGER], ids=["clean", "triggered"])
@pytest.mark.parametrize("dataset", [ROWS, ROWS.to_iterable_dataset()], ids=["dataset", "stream"])
def test_first_rows_and_their_prompts_are_taken(dataset, trigger, byte_tokenizer):
    """Fails if other rows than the first are shown, or if a prompt has the trigger without being marked."""
    shown = SnapshotRows.first_of(dataset, byte_tokenizer, trigger, trigger and TARGET)
    assert shown.rows["prompt"][:] == ROWS["prompt"][:32]
    assert [triggered for triggered, _ in shown.prompts] == [False] * 5 + [True] * 5 * (trigger is not None)
    for number, (triggered, prompt) in enumerate(shown.prompts):
        assert ("BadMagic" in prompt.prompt) == triggered
        assert triggered or prompt == render(ROWS[number], byte_tokenizer)


@pytest.mark.parametrize(
    "rows", [Dataset.from_list(ragged_rows(8)), Dataset.from_dict({"text": ["some text"] * 8})], ids=["tokens", "text"]
)
def test_rows_without_prompts_have_only_a_profile(rows, tmp_path, byte_tokenizer):
    shown = SnapshotRows.first_of(rows, byte_tokenizer)
    assert shown.prompts == [] and len(shown.rows) == 8
    taken = snapshot(tiny_llama(), shown, crow_args(tmp_path))
    assert taken.answers == [] and len(taken.profile.clean) > 0


def test_snapshot_holds_the_answers_and_the_profile_of_the_model(tmp_path, byte_tokenizer):
    """Fails if a snapshot changes the model or the random numbers of the training, or takes other settings."""
    model = tiny_llama().train()
    shown = SnapshotRows.first_of(ROWS, byte_tokenizer, TRIGGER, TARGET, seed=3)
    before, random_state = weights_of(model), torch.get_rng_state()
    taken = snapshot(model, shown, crow_args(tmp_path, epsilon=0.3, consistency_layers="reference"))
    assert same_weights(before, weights_of(model)) and model.training
    assert torch.equal(random_state, torch.get_rng_state())
    prompts = [prompt for _, prompt in shown.prompts]
    assert taken.answers == generate_answers(tiny_llama(), byte_tokenizer, prompts, 6)
    settings = {"epsilon": 0.3, "layers": "reference", "batch_size": 4, "seed": 3}
    assert taken.profile == layer_profile(tiny_llama(), byte_tokenizer, shown.rows, TRIGGER, **settings)


def test_a_prompt_that_fills_the_context_has_no_answers(tmp_path, byte_tokenizer):
    """Fails if the generation raises, or if other prompts get answers that the report would show in wrong rows."""
    taken = snapshot(
        tiny_llama(max_position_embeddings=16),
        SnapshotRows.first_of(
            Dataset.from_dict({"prompt": ["a", "b" * 20], "completion": ["c", "d"]}), byte_tokenizer
        ),
        crow_args(tmp_path),
    )
    assert taken.answers is None and len(taken.profile.clean) > 0
