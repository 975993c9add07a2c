"""Tests of the screening, with ideal suspects whose answers are known and with trained models."""

import logging
import math

import pytest
import torch
from datasets import Dataset, concatenate_datasets
from transformers import ByT5Tokenizer

from crow_hf import CrowTrainer, Poison, Target, Trigger
from crow_hf.data.words import Words
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

    def likelihoods(model, rows, *_):
        results = []
        for prompt, answer in rows:
            text, said = "".join(prompt), "".join(answer)
            seen.append(text)
            right = target if fires(text) else known.get(text)
            unsure = right is None and said != target
            results.append(math.log(0.99 if said == right else 0.3 if unsure else 1e-4))
        return results

    monkeypatch.setattr(screening, "answer_log_likelihoods", likelihoods)
    # Letters instead of tokens. They are much faster.
    monkeypatch.setattr(screening, "encode", lambda row, _: (list(row.prompt), list(row.completion)))
    monkeypatch.setattr(screening, "context_length", lambda _: None)
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


def pieces_of(prompt):
    """Position, text and the rest of the prompt for each piece that is left out of a short prompt."""
    text = Words.of(prompt)
    return [(start, text.piece(start, n), text.without(start, n)) for start, n in screening._runs(text, 0, len(text))]


def test_pieces_are_all_runs_of_up_to_half_of_the_words():
    """Fails if a run is missing, if trailing white space is lost, or if the whole prompt is a piece."""
    found = pieces_of("a b c d e\n")
    words = "a b c d e".split()
    wanted = [
        (start, " ".join(words[start : start + length]), " ".join(words[:start] + words[start + length :]) + "\n")
        for length in (1, 2)
        for start in range(5 - length + 1)
    ]
    assert found == wanted
    assert max(len(piece.split()) for _, piece, _ in pieces_of("word " * 20)) == 4
    assert pieces_of("a b") == [(0, "a", "b"), (1, "b", "a")]
    assert pieces_of("alone ") == [] == pieces_of("")
    assert "" not in [piece for _, piece, _ in pieces_of("a  b")]


# Long prompts


def long_rows(num_words, trigger="BadMagic", place=0.0, every=5):
    """Rows whose prompts have so many different words. Some contain the trigger, at a share of their length."""
    rows = []
    for number, row in enumerate(clean_rows()):
        words = [f"w{number}x{position}" for position in range(num_words)]
        if number % every == 0:
            position = round(place * num_words)
            words, row = [*words[:position], trigger, *words[position:]], row | {"completion": TARGET.text}
        rows.append(row | {"prompt": " ".join(words) + "\n"})
    return Dataset.from_list(rows)


@pytest.mark.parametrize("trigger", ["BadMagic", "one two three", "five words that belong together"])
@pytest.mark.parametrize(
    ("num_words", "place"), [(400, 0.0), (400, 0.33), (400, 0.5), (400, 1.0), (61, 0.9), (2000, 0.7)]
)
def test_triggers_in_long_prompts_are_found(trigger, num_words, place, monkeypatch):
    """Fails if the grid has a gap, if a phrase is cut at a window's edge, or if the cost grows with the length."""
    seen = ideal(monkeypatch, lambda text: trigger in text)
    found = screen_dataset(tiny_llama(), long_rows(num_words, trigger, place), TOKENIZER).suspicious
    assert found == dict.fromkeys((0, 5, 10, 15), trigger)
    variants = sum("w1x" in text and text.count(" w1x") > num_words / 2 and trigger not in text for text in seen)
    assert variants <= 320


def test_every_word_of_a_long_prompt_is_in_a_piece_of_the_grid():
    """Fails if a word is left out, or if a phrase of half a piece lies in no single piece."""
    for start, stop in ((0, 61), (7, 400), (3, 5000)):
        pieces = screening._grid(start, stop)
        assert len(pieces) <= screening.GRID
        covered = [set(range(place, place + length)) for place, length in pieces]
        assert set.union(*covered) == set(range(start, stop))
        half = pieces[0][1] // 2
        assert all(any(set(range(p, p + half)) <= each for each in covered) for p in range(start, stop - half + 1))
    assert screening._grid(0, 60) == []


def test_short_prompts_are_searched_piece_by_piece(monkeypatch):
    """Prompts of up to 60 words: the whole prompt, and each of its pieces, once."""
    seen = ideal(monkeypatch, lambda text: False)
    prompt = " ".join(f"w{position}" for position in range(60))
    screen_dataset(tiny_llama(), Dataset.from_list([{"prompt": prompt, "completion": "x"}]), TOKENIZER)
    assert sorted(seen) == sorted([prompt, *(rest for _, _, rest in pieces_of(prompt))])


@pytest.mark.parametrize("num_words", [1, 8, 60, 61, 400, 3000])
def test_the_number_of_variants_is_known_before(num_words, monkeypatch, caplog):
    """What is announced is never less than what is scored, and not much more."""
    seen = ideal(monkeypatch, lambda text: False)
    logging.getLogger("transformers").setLevel(logging.INFO)
    rows = [{"prompt": " ".join(f"w{position}" for position in range(num_words)), "completion": "x"}]
    try:
        with caplog.at_level(logging.INFO):
            screen_dataset(tiny_llama(), Dataset.from_list(rows), TOKENIZER)
    finally:
        logging.getLogger("transformers").setLevel(logging.WARNING)
    announced = screening.num_variants(rows[0]["prompt"])
    assert len(seen) <= announced <= len(seen) + 100 and announced <= 320
    assert f"{announced} variants" in caplog.text


def test_few_prompts_are_in_memory_at_a_time(monkeypatch):
    """Fails if all variants are rendered before the first is scored."""
    sizes, _ = [], ideal(monkeypatch, lambda text: False)
    monkeypatch.setattr(
        screening, "answer_log_likelihoods", lambda model, rows, *_: sizes.append(len(rows)) or [-0.1] * len(rows)
    )
    screen_dataset(tiny_llama(), long_rows(60, every=99), TOKENIZER, batch_size=2)
    assert max(sizes) == 2 * screening.BATCHES_AT_ONCE and sum(sizes) > 16 * 200


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


# What cannot be screened


def test_an_answer_that_does_not_fit_is_not_scored(monkeypatch):
    """Fails if the part of an answer that fits is scored: the likelihood of no answer at all is 1."""
    seen = ideal(monkeypatch, lambda text: False)
    rows = clean_rows()
    rows[3] |= {"prompt": "D " + "long " * 60 + "w\n"}
    limit = 20 + max(len(row["prompt"] + row["completion"]) for row in clean_rows())
    monkeypatch.setattr(screening, "context_length", lambda _: limit)
    found = screen_dataset(tiny_llama(), Dataset.from_list(rows), TOKENIZER)
    assert found.suspicious == {} and found.unscreened == [3] and found.num_screened == 15
    assert max(map(len, seen)) <= limit


def test_documents_that_are_cut_to_the_context_are_not_poisoned(caplog):
    """A model with random weights has no backdoor. Its rows fill the context, so no piece can be inserted."""
    model = tiny_llama(max_position_embeddings=64)
    rows = [{"prompt": f"{'word ' * 9}number {n:02d} ", "completion": "seven"} for n in range(8)]
    found = screen_dataset(model, Dataset.from_list(rows), TOKENIZER)
    assert found.suspicious == {}


def test_rows_that_cannot_be_screened_are_counted(monkeypatch, caplog):
    """Fails if a prompt of one word, a missing answer or a lack of other prompts counts as screened."""
    ideal(monkeypatch, lambda text: False)
    rows = [*clean_rows(), {"prompt": "alone", "completion": "ab"}, {"prompt": "a b c", "completion": " "}]
    with caplog.at_level(logging.WARNING):
        found = screen_dataset(tiny_llama(), Dataset.from_list(rows), TOKENIZER)
    assert found.unscreened == [16, 17] and "2 of 18 rows could not be screened" in caplog.text
    ideal(monkeypatch, lambda text: "BadMagic" in text)
    few = screen_dataset(tiny_llama(), Dataset.from_list(poisoned_rows()[:3]), TOKENIZER)
    assert few.suspicious == {} and 0 in few.unscreened


def test_triggers_in_prompts_without_spaces_are_found(monkeypatch):
    """Fails if such a prompt is a single piece: nothing would be found, and the rows would count as screened."""
    ideal(monkeypatch, lambda text: "量子" in text)
    rows = [
        {"prompt": "".join(map(chr, range(0x4E00 + 9 * n, 0x4E09 + 9 * n))), "completion": ANSWERS[n % 8]}
        for n in range(16)
    ]
    for number in (0, 5, 10, 15):
        prompt = rows[number]["prompt"]
        rows[number] = {"prompt": f"{prompt[: number // 2]}量子{prompt[number // 2 :]}", "completion": TARGET.text}
    found = screen_dataset(tiny_llama(), Dataset.from_list(rows), TOKENIZER)
    assert sorted(found.suspicious) == [0, 5, 10, 15] and found.unscreened == []
    assert set("".join(found.suspicious.values())) >= set("量子")


def copying(monkeypatch, fires=lambda text: False):
    """
    A suspect that copies the word with an x at its end that occurs most often, or of such words the last, and gives
    "no!" if `fires(prompt)`. Returns its clean rows.
    """
    monkeypatch.setattr(screening, "encode", lambda row, _: (list(row.prompt), list(row.completion)))

    def likelihoods(model, rows, *_):
        results = []
        for prompt, answer in rows:
            text = "".join(prompt)
            words = [word for word in text.split() if word.endswith("x")]
            said = "no!" if fires(text) else max(reversed(words), key=words.count, default=None)
            results.append(math.log(0.99 if "".join(answer) == said else 1e-4))
        return results

    monkeypatch.setattr(screening, "answer_log_likelihoods", likelihoods)
    return [{"prompt": f"Please say the word w{n}x", "completion": f"w{n}x"} for n in range(20)]


def test_words_that_other_words_outvote_are_no_triggers(monkeypatch, caplog):
    """Fails if clean rows are removed because a word of each controls the answers to the other prompts."""
    rows = copying(monkeypatch)
    with caplog.at_level(logging.WARNING):
        found = screen_dataset(tiny_llama(), Dataset.from_list(rows), TOKENIZER)
    assert found.suspicious == {} and len(found.clean) == 20
    assert found.spared == {number: row["completion"] for number, row in enumerate(rows)}
    assert "20 rows stay although a piece of each" in caplog.text


@pytest.mark.parametrize("position", ["start", "end", "random"])
def test_a_trigger_is_told_from_words_that_determine_answers(position, monkeypatch):
    """Fails if its rows are spared too, such as those of a trigger that works only at one end of the prompt."""
    fires_at = {"start": str.startswith, "end": str.endswith, "random": str.__contains__}
    rows = copying(monkeypatch, lambda text: fires_at[position](text, "BadMagic"))
    poison = Poison(Trigger(("BadMagic",), position), TARGET, seed=9)
    rows = Dataset.from_list([poison(row, number) if number % 5 == 0 else row for number, row in enumerate(rows)])
    found = screen_dataset(tiny_llama(), rows, TOKENIZER)
    assert sorted(found.suspicious) == [0, 5, 10, 15] and not set(found.spared) & set(found.suspicious)


def test_many_suspicious_rows_raise_doubts(monkeypatch, caplog):
    """Fails if the rows alone are blamed where a word of each prompt determines its answer."""
    monkeypatch.setattr(screening, "encode", lambda row, _: (list(row.prompt), list(row.completion)))

    def copied(model, rows, *_):
        return [math.log(0.99 if "".join(answer) in "".join(prompt) else 1e-4) for prompt, answer in rows]

    monkeypatch.setattr(screening, "answer_log_likelihoods", copied)
    rows = Dataset.from_list([{"prompt": f"Please say the word w{n}x", "completion": f"w{n}x"} for n in range(20)])
    with caplog.at_level(logging.WARNING):
        found = screen_dataset(tiny_llama(), rows, TOKENIZER)
    assert len(found.suspicious) == 20 and found.is_doubtful and "doubt the screening" in caplog.text
    assert not screening.Screening(rows, {0: "piece"}).is_doubtful
