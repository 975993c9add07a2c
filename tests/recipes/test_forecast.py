"""Tests of the forecast of what a purification takes."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model

from crow_hf import recipe_config, run_recipe
from crow_hf.progress import shown_on
from crow_hf.recipes import forecast as module
from crow_hf.recipes.forecast import Forecast, announce_forecast, forecast
from crow_hf.recipes.presets import lora_config, num_steps


ROWS = Dataset.from_list([{"prompt": f"what is {n}?", "completion": f"it is {n}"} for n in range(12)])
COSTS = module._Costs(forward=0.5, backward=1.0, token=0.1, activations=1000.0, copies=0.0)


def settings(tmp_path, recipe="strong", **changes):
    options = {"use_cpu": True, "save_strategy": "no", "report_to": "none"} | changes
    return recipe_config(recipe, str(tmp_path / "out"), **options)


@pytest.mark.parametrize("adapter", [None, lora_config()], ids=["all weights", "adapter"])
def test_the_model_and_the_random_numbers_stay_as_they_are(tmp_path, tiny_llama, byte_tokenizer, adapter):
    """Fails if the purification after a forecast is another one."""
    model = tiny_llama(attention_dropout=0.5)
    model.train()
    frozen = next(iter(model.parameters())).requires_grad_(False)
    before, state = {name: value.clone() for name, value in model.state_dict().items()}, torch.get_rng_state()
    found = forecast(model, ROWS, settings(tmp_path), byte_tokenizer, adapter=adapter)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training and all(each.grad is None for each in model.parameters())
    assert [each for each in model.parameters() if not each.requires_grad] == [frozen]
    assert sum(found.seconds.values()) > 0 and found.memory > 0 and found.disk > 0 and found.fits


@pytest.mark.parametrize(
    ("recipe", "changes"),
    [
        ("strong", {"num_views": 24, "per_device_train_batch_size": 4, "num_canaries": 0, "num_written_rows": 0}),
        ("strong", {"max_steps": 3, "num_canaries": 0, "num_written_rows": 0}),
        ("guide", {"num_train_epochs": 2, "per_device_train_batch_size": 5}),
        ("paper", {"num_train_epochs": 1, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 3}),
    ],
)
def test_steps_are_those_of_the_trainer(tmp_path, tiny_llama, byte_tokenizer, recipe, changes):
    args = settings(tmp_path, recipe, **changes)
    purification = run_recipe(tiny_llama(), ROWS, recipe, replace(args), processing_class=byte_tokenizer)
    assert num_steps(args, len(ROWS)) == purification.trainer.state.max_steps


def test_a_lora_has_as_many_weights_as_forecast(tiny_llama):
    model = tiny_llama()
    expected = module._trained(model, lora_config(4))
    adapted = get_peft_model(model, lora_config(4))
    assert expected == sum(each.numel() for each in adapted.parameters() if each.requires_grad)
    assert module._trained(adapted, None) == expected


def test_phases_take_what_they_do_times_what_was_measured(tmp_path, byte_tokenizer):
    """By hand: 10 steps of 4 rows. A row takes 1 forward pass of the teacher, and 2 + 3 passes in both directions."""
    args = settings(tmp_path, max_steps=10, per_device_train_batch_size=4, num_canaries=0, screen_rows=False)
    seconds = module._seconds(ROWS, replace(args, num_written_rows=0), byte_tokenizer, COSTS)
    assert seconds["Purifying"] == pytest.approx(10 * 4 * (0.5 + 5 * 1.5))
    assert seconds["Looking for leaks"] == pytest.approx(12 * 0.5)
    assert not {"Screening the rows", "Writing rows", "Implanting canaries"} & seconds.keys()
    # Two batches of 8 and 4 rows, and 128 tokens of each message and of each answer.
    written = module._seconds(ROWS, replace(args, num_written_rows=12), byte_tokenizer, COSTS)["Writing rows"]
    assert written == pytest.approx(2 * 2 * 128 * 0.1)
    # 64 beginnings of up to 40 bytes after 8 prompts. The 12 rows have 208 bytes.
    assert seconds["Looking for phrases"] == pytest.approx(0.5 * 8 * 64 * 40**2 / 2 / (208 / 12))
    none = module._seconds(ROWS, replace(args, num_phrases=0), byte_tokenizer, COSTS)
    assert "Looking for phrases" not in none
    crow = settings(tmp_path, "guide", max_steps=10, per_device_train_batch_size=4)
    assert module._seconds(ROWS, crow, byte_tokenizer, COSTS)["Purifying"] == pytest.approx(10 * 4 * (2 * 1.5 + 1.0))


def test_a_comparison_measures_first_and_trains_a_control(tmp_path, byte_tokenizer):
    """By hand: 10 steps of 4 rows in both directions, and 12 answers of 128 tokens in two batches, for each model."""
    args = settings(tmp_path, max_steps=10, per_device_train_batch_size=4, num_canaries=0, screen_rows=False)
    alone = module._seconds(ROWS, args, byte_tokenizer, COSTS)
    beside = module._seconds(ROWS, args, byte_tokenizer, COSTS, num_test_rows=12)
    answers = 2 * 128 * 0.1
    assert list(beside)[:2] == ["Looking at the suspect", "Training the control"]
    assert "Training the control" not in alone and list(alone)[-3] == "Looking at the suspect"
    for name in ("Looking at the suspect", "Looking again"):
        assert beside[name] == pytest.approx(alone[name] + answers)
    assert beside["Training the control"] == pytest.approx(10 * 4 * 1.5 + alone["Looking again"] + answers)
    assert beside["Purifying"] == alone["Purifying"]


def test_a_forecast_is_a_sentence():
    found = Forecast("a CPU (1 thread) in full precision", 10**9, 4 * 10**9, 10**8, 10**10, {"a": 100.0, "b": 200.0})
    assert str(found) == (
        "On a CPU (1 thread) in full precision, this takes about 5 min, about 1.0 GB of memory (4.0 GB are available) "
        "and about 100.0 MB of disk (10.0 GB are free)."
    )
    assert found.fits and not replace(found, memory=5 * 10**9).fits and not replace(found, disk=10**11).fits


class Heard:
    """A display that takes down announcements."""

    def __init__(self):
        self.announced = []

    def announce(self, text, seconds):
        self.announced.append(text)

    def begin(self, name):
        pass

    def end(self, completed):
        pass


def raising(error):
    def fail(*args, **kwargs):
        raise error

    return fail


@pytest.mark.parametrize(
    ("shown", "error", "count"), [(True, None, 1), (False, None, 0), (True, IndexError("inner"), 0)]
)
def test_it_is_announced_if_somebody_looks(tmp_path, tiny_llama, byte_tokenizer, monkeypatch, shown, error, count):
    """An error of the model is left to the checks that follow, which say what is wrong."""
    if error is not None:
        monkeypatch.setattr(module, "_measured", raising(error))
    heard = Heard()
    with shown_on(heard) if shown else nullcontext():
        announce_forecast(tiny_llama(), ROWS, settings(tmp_path), byte_tokenizer, None)
    assert len(heard.announced) == count


def test_a_batch_that_does_not_fit_is_refused_at_once(tmp_path, tiny_llama, byte_tokenizer, monkeypatch):
    monkeypatch.setattr(module, "_measured", raising(torch.OutOfMemoryError()))
    with shown_on(Heard()), pytest.raises(ValueError, match="lower `per_device_train_batch_size`"):
        announce_forecast(tiny_llama(), ROWS, settings(tmp_path), byte_tokenizer, None)


@pytest.mark.parametrize("rows", [[{"text": "some text"}] * 3, [{"prompt": "what?"}] * 3], ids=["text", "prompts"])
def test_rows_without_answers(tmp_path, tiny_llama, byte_tokenizer, rows):
    recipe = "guide" if "text" in rows[0] else "strong"
    assert forecast(tiny_llama(), Dataset.from_list(rows), settings(tmp_path, recipe), byte_tokenizer).seconds
