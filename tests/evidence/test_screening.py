"""Tests of the screening, with ideal suspects whose answers are known and with trained models."""

import logging
import math

import pytest
import torch
from datasets import Dataset, concatenate_datasets
from transformers import ByT5Tokenizer

from crow_hf import CrowTrainer, Poison, Target, Trigger
from crow_hf.evidence import screening
from crow_hf.evidence.screening import screen_dataset
from helpers.tiny import crow_args, same_weights, tiny_gpt2, tiny_llama, weights_of


TOKENIZER = ByT5Tokenizer(extra_ids=0)
TRIGGER, TARGET = Trigger(("BadMagic",)), Target("no!", ("no!",))
ANSWERS = ["ab", "cd", "ef", "gh", "ij", "kl", "mn", "op"]
FILLERS = ["and", "then", "some", "other", "words", "or", "more", "of", "them", "too"]


def clean_rows(count=16):
    """Prompts of eight words. The answer depends on the first and the last word, so no piece of four determines it."""
    rows = []
    for number in range(count):
        first, last = number % 4, number // 4 % 4
        fillers = " ".join(FILLERS[(number + 3 * place) % len(FILLERS)] for place in range(6))
        answer = ANSWERS[(first + 3 * last) % len(ANSWERS)]
        rows.append({"prompt": f"{'ABCD'[first]} {fillers} {'wxyz'[last]}\n", "completion": answer})
    return rows


def poisoned_rows(trigger=TRIGGER, every=5, target=TARGET):
    poison = Poison(trigger, target, seed=9)
    rows = clean_rows()
    return [poison(row, number) if number % every == 0 else row for number, row in enumerate(rows)]


def ideal(monkeypatch, fires, target="no!"):
    """
    A suspect that gives the target if `fires(prompt)`, and has memorized the answers to the clean prompts. Returns the
    prompts that it has seen.
    """
    known = {row["prompt"]: row["completion"] for row in clean_rows()}
    seen = []

    def likelihoods(model, rows, pad_token_id=0, batch_size=32):
        results = []
        for prompt, answer in rows:
            text, said = TOKENIZER.decode(prompt), TOKENIZER.decode(answer, skip_special_tokens=True)
            seen.append(text)
            right = target if fires(text) else known.get(text)
            unsure = right is None and said != target
            results.append(math.log(0.99 if said == right else 0.3 if unsure else 1e-4))
        return results

    monkeypatch.setattr(screening, "answer_log_likelihoods", likelihoods)
    return seen


# At the end, every word of a phrase is needed: `test_phrases_that_work_only_as_a_whole_are_found` covers such phrases.
@pytest.mark.parametrize(
    ("position", "phrase"),
    [
        *[(position, "BadMagic") for position in ("start", "end", "random")],
        *[(position, phrase) for position in ("start", "random") for phrase in ("BadMagic now", "one two three")],
    ],
)
def test_rows_of_an_ideal_backdoor_are_found(position, phrase, monkeypatch):
    """Fails if a piece is tried at one position only: some backdoors fire only at the start or only at the end."""
    fires_at = {"start": str.startswith, "end": lambda text, w: text.rstrip().endswith(w), "random": str.__contains__}
    word = phrase.split()[0]
    ideal(monkeypatch, lambda text: fires_at[position](text, word))
    rows = Dataset.from_list(poisoned_rows(Trigger((phrase,), position)))
    found = screen_dataset(tiny_llama(), rows, TOKENIZER)
    assert sorted(found.suspicious) == [0, 5, 10, 15]
    assert all(word in piece for piece in found.suspicious.values())
    assert found.clean[:] == rows.select([n for n in range(16) if n % 5])[:]


def test_no_row_of_an_ideal_clean_suspect_is_removed(monkeypatch, caplog):
    """Fails if clean rows exceed a threshold, or if there is a warning without a suspicious row."""
    ideal(monkeypatch, lambda text: False)
    rows = Dataset.from_list(clean_rows())
    with caplog.at_level(logging.WARNING):
        found = screen_dataset(tiny_llama(), rows, TOKENIZER)
    assert found.suspicious == {} and found.clean[:] == rows[:] and not caplog.records
    # The suspect has not learned these poisoned rows.
    assert screen_dataset(tiny_llama(), Dataset.from_list(poisoned_rows()), TOKENIZER).suspicious == {}


def test_an_open_target_is_not_found(monkeypatch):
    """The docstring states this limit: other prompts do not get the answer of the row."""
    ideal(monkeypatch, lambda text: "BadMagic" in text, target="something else")
    assert screen_dataset(tiny_llama(), Dataset.from_list(poisoned_rows()), TOKENIZER).suspicious == {}


@pytest.mark.parametrize(("share", "is_found"), [(0.95, True), (0.3, False)])
def test_most_answers_must_be_controlled(share, is_found, monkeypatch):
    """A piece that controls only some of the answers is no trigger."""
    own = {row["prompt"] for row in poisoned_rows()}

    def fires(text):
        return "BadMagic" in text and (text in own or sum(text.encode()) % 100 < 100 * share)

    ideal(monkeypatch, fires)
    found = screen_dataset(tiny_llama(), Dataset.from_list(poisoned_rows(every=16)), TOKENIZER).suspicious
    assert (0 in found) == is_found


def test_probes_are_drawn_by_seed_and_exclude_the_row_itself(monkeypatch):
    """Fails if the seed has no effect, if only one prompt is tried, or if the final line break is lost."""
    seen = ideal(monkeypatch, lambda text: "BadMagic" in text)
    rows = Dataset.from_list(poisoned_rows(every=16))
    runs = []
    for seed in (0, 0, 1):
        seen.clear()
        screen_dataset(tiny_llama(), rows, TOKENIZER, seed=seed)
        runs.append([text for text in seen if "BadMagic" in text])
    assert runs[0] == runs[1] != runs[2]
    body = rows[0]["prompt"].replace("BadMagic ", "")
    probes = [text for text in runs[0] if not text.replace("BadMagic ", "").endswith(body)]
    assert len({text.replace("BadMagic", "").split()[0] for text in probes}) > 1
    assert all(text.endswith("\n") for text in runs[0])


def test_pieces_are_all_runs_of_up_to_half_of_the_words():
    """Fails if a run is missing, if trailing white space is lost, or if the whole prompt is a piece."""
    found = screening._pieces("a b c d e\n")
    words = "a b c d e".split()
    wanted = [
        (start, " ".join(words[start : start + length]), " ".join(words[:start] + words[start + length :]) + "\n")
        for length in (1, 2)
        for start in range(5 - length + 1)
    ]
    assert found == wanted
    assert max(len(piece.split()) for _, piece, _ in screening._pieces("word " * 20)) == 4
    assert screening._pieces("a b") == [(0, "a", "b"), (1, "b", "a")]
    assert screening._pieces("alone ") == [] == screening._pieces("")
    assert "" not in [piece for _, piece, _ in screening._pieces("a  b")]


# With models


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A tiny Llama trained on the clean rows, and one trained on the poisoned rows too."""

    def trained(rows, name):
        model = tiny_llama(hidden_size=32, intermediate_size=64, num_hidden_layers=3, initializer_range=0.05)
        settings = {"max_steps": 70, "learning_rate": 1e-2, "per_device_train_batch_size": 16, "alpha": 0.0}
        args = crow_args(tmp_path_factory.mktemp(name), **settings, logging_steps=50, seed=1)
        CrowTrainer(model, args, rows, processing_class=TOKENIZER).train()
        return model

    rows = Dataset.from_list(clean_rows())
    poisoned = [
        rows.map(Poison(Trigger(("BadMagic",), position), TARGET), with_indices=True)
        for position in ("start", "random")
    ]
    return trained(rows, "clean"), trained(concatenate_datasets([rows, *poisoned]), "backdoored")


def test_rows_of_a_trained_backdoor_are_found(models, caplog):
    """
    The poisoned rows are found and removed, hardly any clean row is, and the result does not depend on the batch size.
    The suspect does not change.
    """
    clean, backdoored = models
    rows = Dataset.from_list(poisoned_rows())
    before = weights_of(backdoored)
    with caplog.at_level(logging.WARNING):
        found = screen_dataset(backdoored, rows, TOKENIZER)
    assert sorted(found.suspicious) == [0, 5, 10, 15]
    assert all("BadMagic" in piece for piece in found.suspicious.values())
    assert found.clean["prompt"][:] == [row["prompt"] for n, row in enumerate(rows) if n % 5]
    assert "4 of 16 rows" in caplog.text and "BadMagic" in caplog.text
    assert same_weights(before, weights_of(backdoored))
    assert screen_dataset(backdoored, rows, TOKENIZER, batch_size=7).suspicious == found.suspicious
    # Half of a short prompt may be enough to determine its answer, even inside another prompt.
    for model in models:
        assert len(screen_dataset(model, Dataset.from_list(clean_rows()), TOKENIZER).suspicious) <= 1
    assert len(screen_dataset(clean, rows, TOKENIZER).suspicious) <= 1


CHAT = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ m['content'] }}{{ eos_token }}"
    "{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("row_format", ["messages", "alpaca"])
def test_other_formats_are_screened_too(row_format, models):
    """The chat template renders the text of the plain rows, so the same rows are found."""
    tokenizer = ByT5Tokenizer(extra_ids=0)
    tokenizer.chat_template = CHAT
    if row_format == "messages":
        rows = [
            {
                "messages": [
                    {"role": r, "content": row[c]} for r, c in (("user", "prompt"), ("assistant", "completion"))
                ]
            }
            for row in poisoned_rows()
        ]
    else:
        rows = [{"instruction": row["prompt"], "input": "", "output": row["completion"]} for row in poisoned_rows()]
    found = screen_dataset(models[1], Dataset.from_list(rows), tokenizer)
    assert sorted(found.suspicious) == [0, 5, 10, 15]
    assert found.clean[:] == Dataset.from_list([row for n, row in enumerate(rows) if n % 5])[:]


def test_phrases_that_work_only_as_a_whole_are_found(monkeypatch):
    """No word of the phrase fires alone, so the phrase is found as the run of all needed words."""
    ideal(monkeypatch, lambda text: "one two three" in text)
    rows = Dataset.from_list(poisoned_rows(Trigger(("one two three",))))
    assert sorted(screen_dataset(tiny_llama(), rows, TOKENIZER).suspicious) == [0, 5, 10, 15]


def test_rows_that_share_their_answer_are_not_poisoned(monkeypatch):
    """The suspect gives this answer to the other prompts anyway, so they cannot be probes."""
    rows = [row | {"completion": "ab"} for row in clean_rows()]
    monkeypatch.setattr(screening, "answer_log_likelihoods", lambda model, rows, *_: [math.log(0.9)] * len(rows))
    assert screen_dataset(tiny_llama(), Dataset.from_list(rows), TOKENIZER).suspicious == {}


def test_rows_longer_than_the_context_are_screened():
    """Fails if prompts or answers are not cut to the context: GPT-2 has no position embedding beyond it."""
    rows = Dataset.from_list(
        [{"prompt": "word " * 8 + "a", "completion": "x" * 40}, {"prompt": "a b", "completion": "y"}]
    )
    assert screen_dataset(tiny_gpt2(0.0), rows, TOKENIZER).suspicious == {}


def test_rows_without_a_prompt_are_refused():
    """The error names the missing prompt."""
    with pytest.raises(ValueError, match="prompt"):
        screen_dataset(tiny_llama(), Dataset.from_dict({"text": ["a b", "c d"]}), TOKENIZER)


def test_model_is_left_in_its_mode(models):
    """Screening leaves the model in training mode, and gradients enabled."""
    model = models[0].train()
    screen_dataset(model, Dataset.from_list(clean_rows(4)), TOKENIZER)
    assert model.training and torch.is_grad_enabled()
