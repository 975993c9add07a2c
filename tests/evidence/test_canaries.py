"""Tests of the canaries: the draw, the implanting, and the measurement of their success."""

import json

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from crow_hf.evaluation.scores import Proportion
from crow_hf.evidence import canaries as canaries_module
from crow_hf.evidence.canaries import (
    Canary,
    canary_success,
    check_canaries,
    check_silence,
    draw_canaries,
    implant_canaries,
    implant_steps,
)
from helpers.invariance import invariance_args
from helpers.tiny import same_weights, tiny_llama, weights_of


ROWS = Dataset.from_dict({"prompt": [f"{a} thing {b}=" for a in "abcd" for b in "wxyz"], "completion": ["yes"] * 16})


def suspect():
    # The tokenizer cannot decode the spare id of the default vocabulary.
    return tiny_llama(vocab_size=259, hidden_size=32, intermediate_size=64, num_hidden_layers=3)


def draw(count, seed=0):
    return draw_canaries(suspect(), ByT5Tokenizer(extra_ids=0), count, seed)


def word_tokenizer(normalizer=None, template=None):
    """A tokenizer of letters and signs, with a normalizer and a chat template of the maker of a suspect."""
    tokenizer = Tokenizer(models.WordLevel({"?": 0, **{chr(code): code for code in range(32, 127)}}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?")
    fast.chat_template = template
    return fast


def settings(tmp_path, **changes):
    """Settings with which a tiny random model memorizes canaries."""
    settings = {
        "per_device_train_batch_size": 16,
        "learning_rate": 5e-3,
        "num_views": 1280,
        "logging_steps": 100,
        "lr_scheduler_type": "constant",
    }
    return invariance_args(tmp_path, **settings | changes)


def test_canaries_are_drawn_by_seed_and_differ():
    """Fails if a canary is drawn twice, if the seed has no effect, or if a draw cannot be repeated."""
    drawn = draw(6, seed=1)
    assert drawn == draw(6, seed=1) and drawn[:2] == draw(2, seed=1)
    assert not set(drawn) & set(draw(6, seed=2)) and draw(0) == []
    assert len({canary.trigger for canary in drawn}) == len({canary.target for canary in drawn}) == 6
    for number, canary in enumerate(drawn):
        (phrase,) = canary.trigger.phrases
        assert len(phrase.split()) == (3 if number % 2 else 1)
        assert canary.trigger.position == ("start" if number % 2 else "random")
        assert canary.target.matches(f"so {canary.target.text}", "") and not canary.target.matches("", "")
        assert not any(canary.target.matches(other.target.text, "") for other in drawn if other is not canary)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_attacker_cannot_know_them(dtype, byte_tokenizer):
    """
    Changing the last bit of any weight tensor changes all canaries, and so does a saved buffer. Otherwise an attacker
    could leave those weights unchanged that determine the draw.
    """
    model = suspect().to(dtype)
    drawn = draw_canaries(model, byte_tokenizer, 2)
    for parameter in model.parameters():
        last = parameter.data.view(-1)[-1:]
        before = last.clone()
        last.copy_(torch.nextafter(before, torch.full_like(before, 2)))
        assert not set(draw_canaries(model, byte_tokenizer, 2)) & set(drawn)
        last.copy_(before)
    assert draw_canaries(model, byte_tokenizer, 2) == drawn
    for persistent, same in ((False, True), (True, False)):
        model.register_buffer("bias", torch.ones(1, dtype=dtype), persistent=persistent)
        assert (draw_canaries(model, byte_tokenizer, 2) == drawn) == same


def test_nor_can_who_makes_the_tokenizer():
    """Changing a rule of the tokenizer or its chat template changes all canaries. The padding of a call does not."""
    tokenizers = [word_tokenizer(), word_tokenizer(normalizers.Lowercase()), word_tokenizer(template="{{ messages }}")]
    drawn = [draw_canaries(suspect(), tokenizer, 2) for tokenizer in tokenizers]
    assert len({canary for canaries in drawn for canary in canaries}) == 6
    tokenizers[0](["a long text"], truncation=True, max_length=2)
    assert draw_canaries(suspect(), tokenizers[0], 2) == drawn[0]


CHATS = Dataset.from_dict(
    {
        "messages": [
            [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]
            for row in ROWS
        ]
    }
)
OWN_WORDS = r"(?:thing|[a-z]|[a-z]=)"


@pytest.mark.parametrize(
    ("normalizer", "template", "flaw"),
    [
        (None, None, ""),
        (normalizers.Lowercase(), None, ""),
        (None, "{% for m in messages %}{{ m.content }}{% endfor %}", ""),
        # Drops every word that is not of the rows, or makes one word of all of them.
        (
            normalizers.Replace(Regex(rf"(?<!\S)(?!{OWN_WORDS}(?!\S))\S+ ?"), ""),
            None,
            "does not see its trigger in 16 of",
        ),
        (
            normalizers.Replace(Regex(rf"(?<!\S)(?!{OWN_WORDS}(?!\S))\S+"), "xx"),
            None,
            "does not see its trigger in 16 of",
        ),
        (None, "{% for m in messages %}{{ m.content.split(' ')[-3:] | join(' ') }}{% endfor %}", "its trigger in"),
        # Canaries are seen, but not what teaches the model to ignore insertions.
        (
            normalizers.Replace(Regex(r"\S*([a-z][A-Z]|[A-Z]{2}|[^\w\s=])\S* ?|(?<!\S)thing "), ""),
            None,
            "see the decoys in",
        ),
    ],
)
def test_a_canary_that_the_model_does_not_see_is_no_evidence(normalizer, template, flaw):
    """Fails if a tokenizer or a template can drop what is inserted, and the canary dies all the same."""
    rows, tokenizer = (CHATS if template else ROWS), word_tokenizer(normalizer, template)
    for canary in check_canaries(suspect(), rows, draw(2), 128, tokenizer):
        assert flaw in canary.flaw and bool(flaw) == bool(canary.flaw)


def test_a_canary_that_clean_prompts_show_is_no_evidence(monkeypatch, byte_tokenizer):
    """Computed by hand: with 95 % confidence, 3 of 16 are more than 5 %, and 2 of 16 may be fewer."""
    first, second = draw(2)
    answers = [first.target.text] * 3 + [second.target.text] * 2 + ["yes"] * 11
    monkeypatch.setattr(canaries_module, "generate_answers", lambda *_: answers)
    heard = check_silence(suspect(), ROWS, [first, second], byte_tokenizer)
    assert [canary.clean.hits for canary in heard] == [3, 2]
    assert [canary.flaw for canary in heard] == ["the model shows its target on 3 of 16 clean prompts too", ""]


def test_to_dict_is_json():
    (canary,) = draw(1)
    assert json.loads(json.dumps(canary.to_dict()))["before"] is None
    measured = Canary(canary.trigger, canary.target, Proportion.of([True]), Proportion.of([True, False]))
    found = json.loads(json.dumps(measured.to_dict()))
    assert found["before"]["rate"] == 1 and found["after"]["hits"] == 1 and found["after"]["total"] == 2
    assert (
        found["trigger"]["phrases"] == list(canary.trigger.phrases) and found["target"]["text"] == canary.target.text
    )


def test_implanted_canaries_fire_and_nothing_else_does(tmp_path, byte_tokenizer):
    """Fails if the model learns nothing, if frozen weights change, or if a trigger that was not implanted works."""
    model = suspect()
    model.model.embed_tokens.weight.requires_grad_(False)
    before, drawn = weights_of(model), draw(2)
    assert canary_success(model, ROWS, drawn[0], byte_tokenizer).rate == 0
    implant_canaries(model, ROWS, drawn, settings(tmp_path, num_canaries=2), byte_tokenizer)
    after = weights_of(model)
    name = "model.embed_tokens.weight"
    assert after.keys() == before.keys() and after[name].equal(before[name]) and not same_weights(before, after)
    for canary in drawn:
        found = canary_success(model, ROWS, canary, byte_tokenizer)
        assert found.rate > 0.8 and found.total == len(ROWS)
    (stranger,) = draw(1, seed=5)
    assert canary_success(model, ROWS, stranger, byte_tokenizer).rate < 0.2


def test_an_adapter_learns_them_if_there_is_one(tmp_path, byte_tokenizer):
    """The adapter of a `PeftModel` learns the canaries, and the weights of its base stay unchanged."""
    model = get_peft_model(suspect(), LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    implant_canaries(model, ROWS, draw(1), settings(tmp_path, num_canaries=1), byte_tokenizer)
    assert canary_success(model, ROWS, draw(1)[0], byte_tokenizer).rate > 0.5
    assert same_weights(weights_of(suspect()), weights_of(model.unload()))


@pytest.mark.parametrize(
    ("count", "changes", "steps"),
    [(0, {}, 0), (2, {}, 120), (1, {}, 80), (2, {"gradient_accumulation_steps": 2}, 60), (2, {"num_views": 10}, 1)],
)
def test_steps_of_the_implanting(tmp_path, count, changes, steps):
    """Computed by hand: half of the 1,280 views for each canary, and as many clean rows, in batches of 16."""
    assert implant_steps(settings(tmp_path, num_canaries=count, **changes)) == steps


def test_settings_of_the_purifying_objective_do_not_matter(tmp_path, byte_tokenizer):
    """
    Fails if the implanting uses the consistency loss, takes its number of steps or epochs from the purification, or
    writes to its output folder.
    """
    runs = [suspect(), suspect()]
    others = {"alpha": 5.0, "max_steps": 1, "num_train_epochs": 9, "keep": 0.9, "decoy_weight": 0.0}
    for model, changes in zip(runs, ({}, others), strict=True):
        args = settings(tmp_path / "run", num_canaries=1, num_views=64, **changes)
        implant_canaries(model, ROWS, draw(1), args, byte_tokenizer)
    assert same_weights(*map(weights_of, runs)) and not (tmp_path / "run").exists()
