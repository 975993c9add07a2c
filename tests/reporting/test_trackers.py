"""Tests of the curves that a tracker gets. TensorBoard itself reads them back."""

import logging
from pathlib import Path

import pytest
from datasets import Dataset
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers.integrations import TensorBoardCallback

from crow_hf import CrowTrainer, purify
from crow_hf.recipes import holdout
from crow_hf.reporting.checksums import sha256_of
from crow_hf.reporting.trackers import final_scores
from helpers.invariance import ROWS, invariance_trainer
from helpers.reports import ROWS as ROWS_OF_REPORTS
from helpers.reports import arguments, read
from helpers.tiny import crow_args, ragged_rows, tiny_llama


TRAINER = {"loss", "grad_norm", "learning_rate"}
CROW = {"loss_lm", "consistency_clean", "consistency_perturbed", "perturbation_ratio"}
INVARIANCE = {"distillation", "decoy", "adversarial", "consistency_perturbed"}


@pytest.fixture(autouse=True)
def event_files_beside_the_checkpoints(monkeypatch):
    """Ignore the TENSORBOARD_LOGGING_DIR of whoever runs the tests."""
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    logging.getLogger("tensorboard").setLevel(logging.ERROR)


def curves(trainer):
    """Return the (step, value) pairs of each curve by its name."""
    (events,) = Path(trainer.args.output_dir).rglob("events.out.tfevents.*")
    reader = EventAccumulator(str(events))
    reader.Reload()
    return {name: [(event.step, event.value) for event in reader.Scalars(name)] for name in reader.Tags()["scalars"]}


def check_steps(trainer, found, names):
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in entries] == [1, 2, 3]
    for name in names:
        wanted = [(entry["step"], pytest.approx(entry[name], rel=1e-5)) for entry in entries]
        assert found[f"train/{name}"] == wanted, name


def test_crow_reports_its_terms_under_stable_names(tmp_path):
    """Fails if a curve is renamed or lost, or if the training and the evaluation share one."""
    args = crow_args(tmp_path, max_steps=3, report_to="tensorboard", eval_strategy="steps", eval_steps=3)
    rows = Dataset.from_list(ragged_rows(16))
    trainer = CrowTrainer(tiny_llama(), args, rows, eval_dataset=rows.select(range(8)))
    trainer.train()
    found = curves(trainer)
    check_steps(trainer, found, TRAINER | CROW)
    evaluated = next(entry for entry in trainer.state.log_history if "eval_loss" in entry)
    for name in CROW | {"loss"}:
        assert found[f"eval/{name}"] == [(3, pytest.approx(evaluated[f"eval_{name}"], rel=1e-5))], name
    of_the_method = {name for name in found if name.split("/")[-1] in CROW}
    assert of_the_method == {f"{mode}/{name}" for mode in ("train", "eval") for name in CROW}


def test_the_result_stands_beside_the_curves(tmp_path, byte_tokenizer, monkeypatch):
    """Fails if a number is not that of the report, or if one that was not measured is made up."""
    monkeypatch.setattr(holdout, "can_write_prompts", lambda *args: True)
    args = arguments(tmp_path, "strong", num_canaries=1, report_to="tensorboard")
    purification = purify(tiny_llama(), ROWS_OF_REPORTS, args=args, processing_class=byte_tokenizer)
    record = purification.report
    found, texts = {}, {}
    for events in tmp_path.rglob("events.out.tfevents.*"):
        reader = EventAccumulator(str(events))
        reader.Reload()
        found |= {name: reader.Scalars(name)[-1].value for name in reader.Tags()["scalars"]}
        texts |= {name: reader.Tensors(name)[-1].tensor_proto.string_val[0] for name in reader.Tags()["tensors"]}
    ends = {name: value for name, value in found.items() if name.startswith("eval/purified/")}
    assert ends == {
        "eval/purified/answer_kl": pytest.approx(record["retention"]["answer_kl"], rel=1e-5),
        "eval/purified/text_kl": pytest.approx(record["retention"]["text_kl"], rel=1e-5),
        "eval/purified/text_bits_ratio": pytest.approx(record["retention"]["text_bits_ratio"], rel=1e-5),
        "eval/purified/canary_success": record["canaries"][0]["after"]["rate"],
    }
    assert "train/loss" in found
    card = texts["eval/purified/card/text_summary"].decode()
    assert card.strip() and (tmp_path / "README.md").read_text(encoding="utf-8").endswith(card)
    assert "## What was shown" in card and "canar" in card


def test_a_tracker_that_fails_costs_only_its_entries(tmp_path, byte_tokenizer, monkeypatch):
    """Fails if an error of a tracker ends the run or spoils its evidence, or if nobody is told."""
    calls = []

    def on_log(self, args, state, control, logs, **kwargs):
        calls.append(logs)
        raise OSError("the server is gone")

    monkeypatch.setattr(TensorBoardCallback, "on_log", on_log)
    args = arguments(tmp_path, report_to="tensorboard", logging_steps=1)
    purification = purify(tiny_llama(), ROWS_OF_REPORTS, recipe="guide", args=args, processing_class=byte_tokenizer)
    assert (tmp_path / "model.safetensors").exists() and read(tmp_path)["failures"] == []
    assert purification.trainer.failures == ["TensorBoard lacks the result of this run (the server is gone)."]
    assert len(calls) == 1


@pytest.mark.slow
@pytest.mark.parametrize("tracker", ["wandb", "mlflow", "trackio"])
def test_files_go_to_the_run_of_the_training(tmp_path, byte_tokenizer, monkeypatch, tracker):
    """Fails if a tracker lacks a file or has another content, or if the result is in a run of its own."""
    for name, value in {
        "WANDB_MODE": "offline",
        "WANDB_DIR": tmp_path,
        "WANDB_DATA_DIR": tmp_path,
        "MLFLOW_TRACKING_URI": (tmp_path / "mlruns").as_uri(),
        "MLFLOW_ALLOW_FILE_STORE": "true",
        "TRACKIO_DIR": tmp_path / "trackio",
    }.items():
        monkeypatch.setenv(name, str(value))
    package = pytest.importorskip(tracker)
    out = tmp_path / "out"
    args = arguments(out, report_to=tracker, logging_steps=1)
    purification = purify(tiny_llama(), ROWS_OF_REPORTS, recipe="guide", args=args, processing_class=byte_tokenizer)
    assert purification.trainer.failures == []
    if tracker == "wandb":
        summary = dict(package.run.summary)
        package.finish()
        runs, files = tmp_path.glob("wandb/offline-run-*"), tmp_path.glob("artifacts/staging/*")
        assert {"train/loss", "eval/purified/text_kl"} <= summary.keys()
    elif tracker == "mlflow":
        runs, files = tmp_path.glob("mlruns/0/*/meta.yaml"), tmp_path.glob("mlruns/0/*/artifacts/*")
        metrics = {path.name for path in tmp_path.glob("mlruns/0/*/metrics/*")}
        assert {"loss", "eval_purified"} <= metrics
    else:
        runs, files = package.Api().runs("huggingface"), tmp_path.glob("trackio/artifacts/*/blobs/*/*/*")
    assert len(list(runs)) == 1
    sent = [sha256_of(out / name) for name in ("README.md", "report.html", "report.json", "bom.cdx.json")]
    assert sorted(map(sha256_of, files)) == sorted(sent)


def test_the_scores_of_every_model(record):
    scores = final_scores(record)
    for role in ("suspect", "control", "purified"):
        found = record["evaluations"][role]
        assert scores[f"eval_{role}/attack_success"] == found["triggered"]["target"]["rate"]
        assert scores[f"eval_{role}/right_answers"] == found["clean"]["exact_match"]["rate"]


def test_several_evaluation_sets_keep_their_names(tmp_path):
    rows = Dataset.from_list(ragged_rows(8))
    args = crow_args(tmp_path, max_steps=1, report_to="tensorboard", eval_strategy="steps", eval_steps=1)
    trainer = CrowTrainer(tiny_llama(), args, rows, eval_dataset={"short": rows, "long": rows})
    trainer.train()
    found = curves(trainer)
    assert {f"eval/{kind}_{name}" for kind in ("short", "long") for name in CROW | {"loss"}} <= set(found)


def test_invariance_reports_its_terms_under_stable_names(tmp_path):
    trainer = invariance_trainer(tmp_path, tiny_llama(), rows=ROWS, max_steps=3, report_to="tensorboard")
    trainer.train()
    check_steps(trainer, curves(trainer), TRAINER | INVARIANCE)
