"""Tests of what a recipe writes and pushes."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import concatenate_datasets
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from crow_hf import load_causal_lm
from crow_hf.evaluation.retention import measure_retention
from crow_hf.files import claim, own_claims
from crow_hf.recipes import comparison as comparison_module
from crow_hf.recipes import purification as purification_module
from crow_hf.recipes import rehearsal as rehearsal_module
from crow_hf.recipes import saving as saving_module
from crow_hf.recipes.comparison import compare_defences
from crow_hf.recipes.presets import RECIPES
from crow_hf.recipes.purification import purify
from crow_hf.recipes.saving import prepare_output
from crow_hf.training.loading import load_tokenizer
from crow_hf.training.saves import stored_dtype
from helpers.recipes import ROWS, arguments
from helpers.tiny import same_weights, tiny_llama, weights_of


MODEL = {"README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer_config.json"}
REPORT = {"report.html", "report.json"}


def test_a_used_output_folder_is_refused_before_the_work(tmp_path, byte_tokenizer, monkeypatch):
    tried = []
    monkeypatch.setattr(rehearsal_module, "draw_canaries", lambda *args: tried.append(1) or [])
    args = arguments(tmp_path, num_canaries=1)
    Path(args.output_dir).mkdir()
    for name in ("model.safetensors", "report.json"):
        file = Path(args.output_dir) / name
        file.touch()
        with pytest.raises(ValueError, match="output_dir"):
            purify(tiny_llama(), ROWS, args=args, processing_class=byte_tokenizer)
        file.unlink()
    assert not tried


@pytest.mark.parametrize("recipe", RECIPES)
def test_purify_writes_model_tokenizer_card_and_report(recipe, tmp_path, byte_tokenizer):
    """Fails if a file is missing, if the saved weights are not those of the result, or if the card is wrong."""
    args = arguments(tmp_path, recipe)
    fields = {"language": "en", "datasets": ["me/rows", str(tmp_path)]}
    found = purify(tiny_llama(), ROWS, recipe, args, processing_class=byte_tokenizer, max_rows=0, card_fields=fields)
    folder = Path(args.output_dir)
    assert {path.name for path in folder.iterdir()} >= MODEL | REPORT
    assert found.trainer.failures == [] and found.hub_url is None
    assert same_weights(weights_of(load_causal_lm(folder)), weights_of(found.model))
    assert load_tokenizer(str(folder))("ab")["input_ids"] == byte_tokenizer("ab")["input_ids"]
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert f"recipe: {recipe}" in card and "max_rows: 0" in card and "language: en" in card and "- me/rows" in card
    assert str(tmp_path) not in card


@pytest.fixture
def hub(monkeypatch):
    """A Hub without a network. `pushed` holds the calls of `push_folder`, which fail if `error` is set."""
    fake = SimpleNamespace(pushed=[], error=None)

    def create_repository(args, *others):
        return f"me/{Path(args.output_dir).name}"

    def push_folder(folder, name, **settings):
        fake.pushed.append(({path.name for path in Path(folder).iterdir()}, name, settings))
        if fake.error is not None:
            raise fake.error
        return SimpleNamespace(repo_url=f"https://hub.test/{name}")

    for module in ("recipes.saving", "training.hub"):
        monkeypatch.setattr(f"crow_hf.{module}.create_repository", create_repository)
    monkeypatch.setattr("crow_hf.recipes.saving.push_folder", push_folder)
    return fake


def test_the_complete_folder_is_pushed(hub, tmp_path, byte_tokenizer):
    """Fails if the folder is pushed before its card, twice, or with other settings than those of the arguments."""
    settings = {"push_to_hub": True, "hub_token": "hf_token", "hub_private_repo": True, "hub_revision": "purified"}
    args = arguments(tmp_path, "guide", **settings)
    found = purify(tiny_llama(), ROWS, "guide", args, processing_class=byte_tokenizer)
    ((files, name, sent),) = hub.pushed
    assert files >= MODEL | REPORT and name == "me/run0"
    assert sent == {"token": "hf_token", "private": True, "revision": "purified"}
    assert found.hub_url == "https://hub.test/me/run0" and found.trainer.failures == []
    assert '"me/run0"' in (Path(args.output_dir) / "README.md").read_text(encoding="utf-8")


def test_a_failed_push_is_a_failure_of_the_trainer(hub, tmp_path, byte_tokenizer):
    """Fails if a failed push raises and costs the result, or if it goes unnoticed."""
    hub.error = OSError("The upload to me/run0 failed.")
    args = arguments(tmp_path, "guide", push_to_hub=True)
    found = purify(tiny_llama(), ROWS, "guide", args, processing_class=byte_tokenizer)
    assert len(hub.pushed) == 1 and found.hub_url is None
    assert found.trainer.failures == ["The upload to me/run0 failed."]
    assert {path.name for path in Path(args.output_dir).iterdir()} >= MODEL | REPORT
    assert same_weights(weights_of(load_causal_lm(args.output_dir)), weights_of(found.model))


def test_a_repository_that_cannot_be_opened_is_reported_before_the_work(tmp_path, byte_tokenizer, monkeypatch):
    def refuse(args):
        raise OSError("The repository cannot be opened.")

    monkeypatch.setattr("crow_hf.recipes.saving.create_repository", refuse)
    monkeypatch.setattr(rehearsal_module, "recorder_of", lambda *args: pytest.fail("The model is used."))
    with pytest.raises(OSError, match="cannot be opened"):
        purify(
            tiny_llama(),
            ROWS,
            "guide",
            arguments(tmp_path, "guide", push_to_hub=True),
            processing_class=byte_tokenizer,
        )


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("asked", [None, "float32"])
def test_the_dtype_of_the_suspect_comes_back(recipe, asked, tmp_path, byte_tokenizer, monkeypatch):
    """Fails if the folder doubles in size, the report says otherwise, or another model is measured than saved."""
    measured = []

    def record(model, *args):
        measured.append(weights_of(model))
        return measure_retention(model, *args)

    monkeypatch.setattr(purification_module, "measure_retention", record)
    tiny_llama().to(torch.bfloat16).save_pretrained(tmp_path / "suspect")
    args = arguments(tmp_path, recipe, model_init_kwargs=None if asked is None else {"dtype": asked})
    found = purify(tmp_path / "suspect", ROWS, recipe, args, processing_class=byte_tokenizer)
    wanted = torch.float32 if asked else torch.bfloat16
    saved = load_causal_lm(args.output_dir)
    assert saved.dtype == found.model.dtype == wanted and saved.config.dtype == wanted
    assert found.report["model"]["dtype"] == str(wanted).removeprefix("torch.")
    assert f"saved in {found.report['model']['dtype']}" in (Path(args.output_dir) / "README.md").read_text()
    assert same_weights(weights_of(saved), weights_of(found.model)) and same_weights(measured[-1], weights_of(saved))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_an_adapter_is_measured_in_the_dtypes_in_which_it_is_loaded(dtype, tmp_path, byte_tokenizer, monkeypatch):
    """Fails if a base of 16 bits is measured in float32, or an adapter of 16 bits is not, as PEFT does."""
    measured = []

    def record(model, *args):
        measured.append({name: (tensor.dtype, tensor.clone()) for name, tensor in model.named_parameters()})
        return measure_retention(model, *args)

    monkeypatch.setattr(purification_module, "measure_retention", record)
    tiny_llama().to(torch.bfloat16).save_pretrained(tmp_path / "base")
    base = load_causal_lm(tmp_path / "base")
    settings = LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
    get_peft_model(base, settings).to(dtype).save_pretrained(tmp_path / "suspect")
    args = arguments(tmp_path, "guide")
    purify(tmp_path / "suspect", ROWS, "guide", args, processing_class=byte_tokenizer)
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), args.output_dir)
    for name, tensor in loaded.named_parameters():
        assert measured[-1][name][0] == tensor.dtype and torch.equal(measured[-1][name][1], tensor), name
    assert stored_dtype(args.output_dir) == dtype


def test_a_float16_model_is_not_computed_in_float16_on_a_cpu(tmp_path, byte_tokenizer, monkeypatch):
    """Fails if the measurements take many times as long as they need, or if they change the model."""
    measured = []

    def record(model, *args):
        measured.append(model.dtype)
        return measure_retention(model, *args)

    monkeypatch.setattr(purification_module, "measure_retention", record)
    tiny_llama().to(torch.float16).save_pretrained(tmp_path / "suspect")
    args = arguments(tmp_path)
    found = purify(tmp_path / "suspect", ROWS, args=args, processing_class=byte_tokenizer)
    saved = load_causal_lm(args.output_dir)
    assert measured == [torch.float32] and saved.dtype == found.model.dtype == torch.float16
    assert same_weights(weights_of(saved), weights_of(found.model))


@pytest.mark.parametrize("kept", [None, 2])
def test_checkpoints_of_a_finished_run_are_removed_unless_they_are_kept_on_purpose(kept, tmp_path, byte_tokenizer):
    args = arguments(tmp_path, "guide", save_strategy="steps", save_steps=1, save_total_limit=kept)
    purify(tiny_llama(), ROWS, "guide", args, processing_class=byte_tokenizer)
    assert len(list(Path(args.output_dir).glob("checkpoint-*"))) == (kept or 0)


def test_the_model_is_saved_before_anything_else_can_fail(tmp_path, byte_tokenizer, monkeypatch):
    """Fails if hours of training are lost with a measurement, a card, a report, or a file of the suspect."""

    def broken(*args, **kwargs):
        raise RecursionError("too deep")

    for name in ("build_model_card", "write_report", "copy_side_files"):
        monkeypatch.setattr(f"crow_hf.recipes.saving.{name}", broken)
    monkeypatch.setattr(purification_module, "measure_retention", broken)
    args = arguments(tmp_path, "guide", save_strategy="steps", save_steps=1)
    found = purify(tiny_llama(), ROWS, "guide", args, processing_class=byte_tokenizer)
    assert same_weights(weights_of(load_causal_lm(args.output_dir)), weights_of(found.model))
    assert len(found.trainer.failures) == 3 and all("too deep" in each for each in found.trainer.failures)
    # Whoever has lost something may want to go on from here.
    assert len(list(Path(args.output_dir).glob("checkpoint-*"))) == 2


def test_files_of_the_suspect_are_in_the_purified_folder(tmp_path, byte_tokenizer):
    suspect = tmp_path / "suspect"
    tiny_llama().save_pretrained(suspect)
    (suspect / "processor_config.json").write_text("{}")
    args = arguments(tmp_path, "guide")
    purify(suspect, ROWS, "guide", args, processing_class=byte_tokenizer)
    assert (Path(args.output_dir) / "processor_config.json").read_text().strip() == "{}"


def test_two_processes_do_not_write_to_one_folder(tmp_path, byte_tokenizer):
    """Fails if the model of one run ends up beside the report of another."""
    args = arguments(tmp_path, "guide")
    code = "import sys; from crow_hf.files import claim; claim(sys.argv[1]); print(1, flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code, args.output_dir], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout.readline() == b"1\n"
        with pytest.raises(ValueError, match="Another run is writing"):
            purify(tiny_llama(), ROWS, "guide", args, processing_class=byte_tokenizer)
        other.communicate(b"\n")
    purify(tiny_llama(), ROWS, "guide", args, processing_class=byte_tokenizer)


def test_a_refused_call_keeps_no_folder(tmp_path, byte_tokenizer, monkeypatch):
    """Fails if a notebook in which a call failed keeps the command line out of the folder."""
    args = arguments(tmp_path, "guide")

    def refuse(*others):
        # A thread is outside of the call.
        with ThreadPoolExecutor() as pool, pytest.raises(ValueError, match="Another run is writing"):
            pool.submit(claim, args.output_dir).result()
        raise ValueError("refused")

    for module in (purification_module, comparison_module):
        monkeypatch.setattr(module, "check_base", refuse)
    options = {"recipe": "guide", "args": args, "processing_class": byte_tokenizer}
    with pytest.raises(ValueError, match="refused"):
        purify(tiny_llama(), ROWS, **options)
    assert not Path(args.output_dir).exists()
    with pytest.raises(ValueError, match="refused"):
        compare_defences(tiny_llama, train_dataset=ROWS, test_dataset=ROWS, **options)
    assert not Path(args.output_dir).exists()


def test_a_run_is_resumed_in_its_own_folder(tmp_path, monkeypatch):
    """Fails if the model and the checkpoints of one run are replaced by those of another."""
    monkeypatch.setattr("crow_hf.training.checkpoints.incomplete_files", lambda checkpoint: [])
    args = arguments(tmp_path, "guide")
    with own_claims():
        with pytest.raises(ValueError, match="resume a run in its own `output_dir`"):
            prepare_output(args, str(tmp_path / "other" / "checkpoint-3"))
        own = str(Path(args.output_dir) / "checkpoint-3")
        assert prepare_output(args, own) == own


@pytest.mark.parametrize("name", ["README.md", "config.json"])
def test_the_card_and_the_config_of_another_model_are_not_overwritten(name, tmp_path):
    args = arguments(tmp_path, "guide")
    Path(args.output_dir).mkdir()
    Path(args.output_dir, name).write_text("{}")
    with own_claims(), pytest.raises(ValueError, match=f"holds another {name}"):
        prepare_output(args, None)


def test_the_saved_model_is_measured_quantized(tmp_path, byte_tokenizer, monkeypatch):
    """
    The weights are not quantized here, so that bitsandbytes need not be installed. Fails if another model is measured
    than the saved one, if canaries or held-out rows are left out, or if the report is silent.
    """
    for module in (saving_module, purification_module):
        monkeypatch.setattr(module, "quantized", lambda name: {})
    args = arguments(tmp_path, num_canaries=1, max_steps=3)
    rows = concatenate_datasets([ROWS.map(lambda row, n=n: {"prompt": f"{n} {row['prompt']}"}) for n in range(4)])
    found = purify(tiny_llama(), rows, args=args, processing_class=byte_tokenizer, quantization="nf4")
    assert found.trainer.failures == [] and found.quantized == "purified, nf4"
    assert found.canaries[0].quantized == found.canaries[0].after
    assert found.held_out[found.quantized].clean == found.held_out["purified"].clean
    assert found.report["quantized"] in found.report["evaluations"]
    assert "purified, nf4" in (Path(args.output_dir) / "report.html").read_text(encoding="utf-8")


def test_a_suspect_that_cannot_be_quantized_is_refused_before_the_work(tmp_path, byte_tokenizer, monkeypatch):
    """Fails if bitsandbytes says so only after the training. The fault is made here, so it need not be installed."""
    for module in (saving_module, purification_module):
        monkeypatch.setattr(module, "quantized", lambda name: {})
    tiny_llama().save_pretrained(tmp_path / "suspect")
    monkeypatch.setattr(saving_module, "load_causal_lm", lambda *_, **__: SimpleNamespace(device="cpu"))
    with pytest.raises(ValueError, match="suspect cannot be run in nf4 .*: leave out `quantization`"):
        purify(
            str(tmp_path / "suspect"),
            ROWS,
            args=arguments(tmp_path / "out"),
            processing_class=byte_tokenizer,
            quantization="nf4",
        )


def test_a_quantization_that_cannot_be_measured_is_refused_before_the_work(tmp_path, byte_tokenizer):
    with pytest.raises(ValueError, match="got 'int3'"):
        purify(tiny_llama(), ROWS, args=arguments(tmp_path), processing_class=byte_tokenizer, quantization="int3")
    assert not list(tmp_path.glob("run*/*"))
