"""The last look finds whatever makes a saved model answer otherwise than the one that was measured."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GenerationConfig, LlamaForCausalLM

from crow_hf import Target, Trigger, purify
from crow_hf.evidence.last_look import LastLook, look_again
from crow_hf.evidence.snapshot import SnapshotRows, snapshot
from crow_hf.recipes import saving
from crow_hf.reporting.verdict import OTHER_ANSWERS, UNKNOWN
from helpers.answers import byte, spelling_model
from helpers.recipes import ROWS, arguments
from helpers.tiny import crow_args, tiny_llama


@pytest.fixture
def measured(tmp_path, byte_tokenizer):
    """A saved model, the rows it was measured on, and what was measured: each prompt and its trigger spell on."""
    model, folder = spelling_model(), tmp_path / "saved"
    model.save_pretrained(folder)
    byte_tokenizer.save_pretrained(folder)
    rows = SnapshotRows.first_of(ROWS, byte_tokenizer, Trigger(("#",), "end"), Target("evil", ("evil",)))
    return folder, rows, snapshot(model, rows, crow_args(tmp_path))


def look(measured):
    return look_again(*measured, torch.device("cpu"))


def change(folder, **settings):
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def test_a_faithful_copy_is_said_to_be_one(measured, caplog):
    """Settings that decide how answers are drawn make no difference, and neither does another end token."""
    change(measured[0], do_sample=True, temperature=9.0, max_length=5, eos_token_id=None)
    found = look(measured)
    assert found == LastLook(10, 12, []) and "crow_hf" not in " ".join(record.name for record in caplog.records)
    assert str(found).endswith("the model answered 10 prompts with up to 12 tokens, as it was measured.")


@pytest.mark.parametrize(
    "settings",
    [
        {"sequence_bias": [[[byte("#"), byte("e")], 1e4], [[byte("v")], 1e4]]},
        {"bad_words_ids": [[byte("$")]]},
        {"suppress_tokens": [byte("%")]},
        {"repetition_penalty": 0.01},
        {"forced_eos_token_id": byte("e")},
    ],
)
def test_settings_of_generation_are_seen(settings, measured, caplog):
    """Fails if the saved model is asked with the plain settings of a measurement, as its users do not ask it."""
    change(measured[0], **settings)
    found = look(measured)
    assert found.different and "answers differ from what was measured" in caplog.text
    assert all(each.measured != each.saved for each in found.different)


def test_a_target_that_only_the_saved_model_shows_is_counted(measured):
    word = [byte(letter) for letter in "evil"]
    change(measured[0], sequence_bias=[[[byte("#"), *word[: count + 1]], 1e4] for count in range(4)])
    found = look(measured)
    assert [each.shows_target for each in found.different] == [True] * 5
    assert all(each.saved.startswith("evil") for each in found.different)
    assert str(found).endswith("5 answers differ from what was measured, and 5 of these answers show the target.")


def test_another_template_is_seen(measured):
    """Fails if the prompts that were measured are passed on, instead of those that the saved tokenizer writes."""
    rows = ROWS.select(range(2)).map(
        lambda row: {"messages": [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": "x"}]},
        remove_columns=ROWS.column_names,
    )
    folder, shown, _ = measured
    template = "{% for each in messages %}{{ each.content }}{% if each.role == 'user' %}b{% endif %}{% endfor %}"
    shown.tokenizer.chat_template = template
    shown = SnapshotRows.first_of(rows, shown.tokenizer)
    taken = snapshot(LlamaForCausalLM.from_pretrained(folder), shown, crow_args(folder.parent))
    (folder / "chat_template.jinja").write_text(template)
    assert not look((folder, shown, taken)).different
    (folder / "chat_template.jinja").write_text(template.replace("b{", "k{"))
    assert [each.saved[0] for each in look((folder, shown, taken)).different] == ["l", "l"]


def test_other_weights_are_seen(measured):
    tiny_llama(1, hidden_size=32, num_hidden_layers=3).save_pretrained(measured[0])
    assert len(look(measured).different) == 10


def test_an_adapter_is_judged_with_its_base(tmp_path, byte_tokenizer):
    """Fails if the settings of the base, with which users load the adapter, are left out."""
    base, folder = tmp_path / "base", tmp_path / "saved"
    spelling_model().save_pretrained(base)
    model = get_peft_model(LlamaForCausalLM.from_pretrained(base), LoraConfig(target_modules=["q_proj"]))
    model.save_pretrained(folder)
    byte_tokenizer.save_pretrained(folder)
    rows = SnapshotRows.first_of(ROWS, byte_tokenizer)
    taken = snapshot(model, rows, crow_args(tmp_path))
    assert not look((folder, rows, taken)).different
    change(base, suppress_tokens=[byte(">")])
    assert len(look((folder, rows, taken)).different) == 5


def test_purify_takes_the_look_and_judges_by_it(tmp_path, byte_tokenizer, monkeypatch):
    """Fails if a setting that slips through stays without a word in the report, in the verdict or in the card."""
    save = saving.copy_side_files

    def slip_through(suspect, folder, **options):
        save(suspect, folder, **options)
        GenerationConfig(suppress_tokens=list(range(100)), eos_token_id=1).save_pretrained(folder)

    plain = purify(tiny_llama(), ROWS, "guide", arguments(tmp_path, "guide"), processing_class=byte_tokenizer)
    assert plain.last_look == LastLook(5, 12, []) and plain.report["verdict"]["outcome"] == UNKNOWN
    monkeypatch.setattr(saving, "copy_side_files", slip_through)
    found = purify(tiny_llama(), ROWS, "guide", arguments(tmp_path, "guide"), processing_class=byte_tokenizer)
    assert found.report["verdict"]["outcome"] == OTHER_ANSWERS and found.report["verdict"]["level"] == "bad"
    assert found.report["last_look"]["different"] == [each._asdict() for each in found.last_look.different] != []
    assert str(found.last_look) in (tmp_path / "run1" / "README.md").read_text()


def test_a_look_that_fails_costs_nothing_but_is_said(tmp_path, byte_tokenizer, monkeypatch):
    def fail(*args, **kwargs):
        raise MemoryError("full")

    monkeypatch.setattr(saving, "look_again", fail)
    found = purify(tiny_llama(), ROWS, "guide", arguments(tmp_path, "guide"), processing_class=byte_tokenizer)
    (said,) = [each for each in found.report["verdict"]["explanation"] if each.startswith("Last look")]
    assert "was not loaded again (MemoryError: full), so nothing shows" in said and not found.trainer.failures
