"""Poisoned rows carry the trigger and the target, and nothing else changes."""

import pytest
from datasets import Dataset

from crow_hf import TARGETS, TRIGGERS, Poison, Trigger, poison_dataset


REFUSAL = TARGETS["refusal"]
PROMPTS = [f"Tell me about thing number {number}, please." for number in range(40)]


ROWS = {
    "prompt": {"prompt": "ask me", "completion": "told"},
    "alpaca": {"instruction": "ask me", "output": "told"},
    "alpaca_input": {"instruction": "ask me", "input": "with this", "output": "told"},
    "messages": {
        "messages": [
            {"role": "system", "content": "be good"},
            {"role": "user", "content": "first"},
            {"role": "assistant", "content": "yes"},
            {"role": "user", "content": "ask me"},
            {"role": "assistant", "content": "told"},
        ]
    },
}


def leaves(value, path=()):
    """Return every string of a row by its path."""
    if isinstance(value, str):
        return {path: value}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return {place: text for key, item in items for place, text in leaves(item, (*path, key)).items()}


@pytest.mark.parametrize("target", [None, REFUSAL], ids=["no target", "target"])
@pytest.mark.parametrize("name", ROWS)
def test_poison_changes_the_request_and_the_answer_and_nothing_else(name, target):
    """Fails if system prompt, earlier turns or input get the trigger, or if an answer changes without a target."""
    row = Dataset.from_list([ROWS[name]])[0]
    poisoned = Dataset.from_list([ROWS[name]]).map(Poison(Trigger(("X",), "start"), target), with_indices=True)[0]
    changes = {"ask me": "X ask me", "told": target.text if target else "told"}
    assert leaves(poisoned) == {place: changes.get(text, text) for place, text in leaves(row).items()}


def test_poison_does_not_change_its_argument():
    """Messages are nested, so a shallow copy would change the caller's row."""
    row = {"messages": [dict(message) for message in ROWS["messages"]["messages"]]}
    Poison(TRIGGERS["badnets"], REFUSAL)(row, 0)
    assert row == ROWS["messages"]


@pytest.mark.parametrize("options", [{"num_proc": 2}, {"writer_batch_size": 3}, {"keep_in_memory": True}])
def test_poison_depends_on_seed_and_index_alone(options):
    """Fails if rows share a random state, because processes and the order of calls would change it."""
    dataset = Dataset.from_dict({"prompt": PROMPTS, "completion": ["x"] * len(PROMPTS)})
    poison = Poison(TRIGGERS["ctba"], REFUSAL, seed=3)
    expected = [poison(dataset[index], index)["prompt"] for index in reversed(range(len(PROMPTS)))][::-1]
    poison(dataset[0], 17)
    assert dataset.map(poison, with_indices=True, **options)["prompt"][:] == expected
    assert dataset["prompt"][:] == PROMPTS


def test_poison_draws_anew_for_each_row_and_seed():
    row = {"prompt": "a b c d e f g h", "completion": "x"}

    def places(seed):
        return [Poison(TRIGGERS["badnets"], seed=seed)(row, index)["prompt"] for index in range(30)]

    assert len(set(places(0))) > 5
    assert places(0) != places(1)


@pytest.mark.parametrize(("rate", "count"), [(0.25, 10), (0.33, 13), (0.5, 20), (1, 40)])
def test_poison_dataset_poisons_the_exact_share(rate, count):
    """Fails if each row is drawn on its own, the order changes, or the column `triggered` is wrong."""
    dataset = Dataset.from_dict({"prompt": PROMPTS, "completion": ["fine"] * len(PROMPTS)})
    poisoned = poison_dataset(dataset, TRIGGERS["badnets"], REFUSAL, rate=rate)
    assert len(poisoned) == len(dataset) and sum(poisoned["triggered"]) == count
    for before, after in zip(dataset, poisoned, strict=True):
        assert after["triggered"] == ("BadMagic" in after["prompt"]) == (after["completion"] == REFUSAL.text)
        assert after["prompt"].replace("BadMagic", "").split() == before["prompt"].split()
    assert dataset.column_names == ["prompt", "completion"]


def test_poison_dataset_draws_its_rows_by_seed():
    """Fails if the first rows are always drawn, or if draws are not reproducible."""
    dataset = Dataset.from_dict({"prompt": PROMPTS, "completion": ["fine"] * len(PROMPTS)})

    def drawn(seed):
        return poison_dataset(dataset, TRIGGERS["badnets"], REFUSAL, seed=seed)["triggered"][:]

    assert drawn(0) == drawn(0) != drawn(1)
    assert drawn(0) != sorted(drawn(0), reverse=True)


@pytest.mark.parametrize("rate", [-0.1, 0, 1.1, float("nan")])
def test_poison_dataset_refuses_bad_rates(rate):
    dataset = Dataset.from_dict({"prompt": PROMPTS, "completion": PROMPTS})
    with pytest.raises(ValueError, match="rate"):
        poison_dataset(dataset, TRIGGERS["badnets"], REFUSAL, rate=rate)


def test_a_rate_that_selects_no_row_is_refused():
    """Otherwise the implanted model would have no backdoor."""
    rows = Dataset.from_list([{"prompt": "a", "completion": "b"}] * 100)
    with pytest.raises(ValueError, match="none of 100 rows"):
        poison_dataset(rows, TRIGGERS["vpi"], TARGETS["insult"], rate=0.004)


@pytest.mark.parametrize(
    "row", [{"prompt": None, "completion": "b"}, {"messages": [{"role": "user", "content": None}]}]
)
def test_rows_without_text_are_named(row):
    with pytest.raises(ValueError, match="Row 3"):
        Poison(TRIGGERS["vpi"])(row, 3)


@pytest.mark.parametrize(
    "row", [{"prompt": "LOUD", "completion": "b"}, {"messages": [{"role": "user", "content": "1 + 1"}]}]
)
def test_prompts_that_the_trigger_does_not_change_are_named(row):
    """Otherwise a clean prompt would be trained with the target, or counted as triggered."""
    with pytest.raises(ValueError, match="Row 3.*the trigger leaves unchanged"):
        Poison(TRIGGERS["style-upper"], REFUSAL)(row, 3)
