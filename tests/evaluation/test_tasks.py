"""Tasks of lm-evaluation-harness on tiny models, beside a slow oracle, and tasks that would run code.

What is run takes `pip install -e ".[lm-eval]"`.
"""

import math
from importlib.util import find_spec

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import ByT5Tokenizer

from crow_hf import CoconutTokenizer
from crow_hf.evaluation.tasks import TaskScore, check_task_folder, evaluate_tasks, load_tasks
from helpers.answers import spelling_model
from helpers.coconut import coconut
from helpers.tasks import CHOICE, QUESTIONS, WRITE, write_tasks
from helpers.tiny import tiny_llama


needs_harness = pytest.mark.skipif(find_spec("lm_eval") is None, reason="takes lm-eval")


def slow_choices(model, tokenizer, rows):
    """Whether the right choice of each row is the likeliest, one choice and one token at a time."""
    right = []
    for row in rows:
        likelihoods = []
        for choice in row["choices"]:
            start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
            prompt = start + tokenizer(row["question"], add_special_tokens=False)["input_ids"]
            ids = prompt + tokenizer(f" {choice}", add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
            likelihoods.append(sum(logits[place - 1, ids[place]].item() for place in range(len(prompt), len(ids))))
        right.append(likelihoods.index(max(likelihoods)) == row["gold"])
    return right


@needs_harness
@pytest.mark.parametrize("kind", ["llama", "adapter", "coconut"])
def test_choices_are_those_of_a_slow_oracle(tmp_path, kind):
    """With standard errors, alike in batches of any size, also for patches of bytes and for an adapter."""
    tokenizer = CoconutTokenizer() if kind == "coconut" else ByT5Tokenizer(extra_ids=0)
    model = coconut(seed=1) if kind == "coconut" else tiny_llama(seed=3).eval()
    if kind == "adapter":
        model = get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).eval()
    tasks = load_tasks(["choice"], write_tasks(tmp_path / "tasks", CHOICE))
    right = slow_choices(model, tokenizer, QUESTIONS)
    accuracy = sum(right) / len(right)
    error = math.sqrt(accuracy * (1 - accuracy) / (len(right) - 1))
    for batch_size in (1, 4):
        (score,) = evaluate_tasks(model, tokenizer, tasks, batch_size=batch_size)
        assert score == TaskScore("choice", "acc", pytest.approx(accuracy), pytest.approx(error), len(right))
    (score,) = evaluate_tasks(model, tokenizer, tasks, limit=4)
    assert score == TaskScore("choice", "acc", sum(right[:4]) / 4, score.error, 4)


@needs_harness
def test_answers_are_written_without_the_model_s_own_settings(tmp_path, byte_tokenizer):
    """The answer to "?" is "@AB". A setting of the suspect that suppresses it does not count."""
    rows = [{"question": "ask?", "answer": "@AB"}, {"question": "say b", "answer": "none"}]
    model = spelling_model()
    model.generation_config.suppress_tokens = [ord("@") + 3]
    group = {"group": "both", "task": ["write"], "aggregate_metric_list": [{"metric": "exact_match"}]}
    folder = write_tasks(tmp_path / "tasks", WRITE, rows=rows)
    (folder / "group.yaml").write_text(str(group))
    scores = evaluate_tasks(model, byte_tokenizer, load_tasks(["both"], folder))
    assert {(each.task, each.metric, each.value, each.rows) for each in scores} == {
        ("write", "exact_match", 0.5, 2),
        ("both", "exact_match", 0.5, 2),
    }
    assert model.generation_config.suppress_tokens == [ord("@") + 3]


@needs_harness
def test_a_template_runs_no_code(tmp_path):
    """It would open a file, by what every object of Python leads to."""
    attack = f"{{{{ cycler.__init__.__globals__.os.mkdir('{tmp_path / 'broken'}') }}}}"
    folder = write_tasks(tmp_path / "tasks", CHOICE | {"doc_to_text": attack})
    with pytest.raises(ValueError, match="cannot be read.*unsafe"):
        load_tasks(["choice"], folder)
    assert not (tmp_path / "broken").exists()


@needs_harness
@pytest.mark.parametrize(
    ("names", "changes", "message"),
    [
        (["other"], {}, "There is no task other in .*It has choice"),
        (["choice"], {"test_split": "dev"}, "cannot be read"),
        (["choice"], {"doc_to_text": "{{missing}}"}, "cannot be read.*missing"),
        (["choice"], {"metric_list": [{"metric": "mine.py"}]}, "metric 'mine.py', which is code"),
    ],
)
def test_tasks_that_cannot_be_read_are_told_in_a_sentence(tmp_path, names, changes, message):
    with pytest.raises(ValueError, match=message):
        load_tasks(names, write_tasks(tmp_path / "tasks", CHOICE | changes))


@needs_harness
def test_what_does_not_fit_is_told(tmp_path, byte_tokenizer, caplog):
    """The beginning of a prompt is cut, as the harness does it. Without room for any, it is an error."""
    tasks = load_tasks(["write"], write_tasks(tmp_path / "tasks", WRITE))
    evaluate_tasks(tiny_llama(max_position_embeddings=8), byte_tokenizer, tasks, limit=1)
    assert "truncating to last 5 tokens" in caplog.text
    with pytest.raises(ValueError, match="The tasks write fail on the model"):
        evaluate_tasks(tiny_llama(max_position_embeddings=3), byte_tokenizer, tasks)


@pytest.mark.skipif(find_spec("lm_eval") is not None, reason="lm-eval is installed")
def test_a_missing_harness_is_told(tmp_path):
    with pytest.raises(ImportError, match=r'pip install "crow-hf\[lm-eval\]"'):
        load_tasks(["choice"], write_tasks(tmp_path / "tasks", CHOICE))


def refused(folder):
    try:
        check_task_folder(folder, {"acc"})
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("process_docs: !function evil.run", "has the tag !function, which runs code"),
        ("metric_list:\n- {metric: !function evil.run}", "has the tag !function"),
        ("a: &a [*a, !function evil.run]", "has the tag !function"),
        ("class: !!python/name:os.system", "has the tag|cannot be read"),
        ("metric_list:\n- {metric: acc, hf_evaluate: true}", "metric 'acc', which is code"),
        ("metric_list:\n- {metric: ./evil}", "metric './evil', which is code"),
        ("dataset_path: pandas", "reads its data with 'pandas'"),
        ("dataset_path: me/data-of-the-hub", "reads its data with"),
        ("group: g\ntask:\n- {task: t, dataset_path: webdataset}", "reads its data with"),
        ("use_prompt: /etc/x.yaml:all", "`use_prompt`"),
        ("include: /etc/hostname", "outside of the folder"),
        ("include: ../../outside", "outside of the folder"),
        ("include: [../inside]", "has the tag !function"),
        ("include: missing", "cannot be read"),
        ("task: [", "cannot be read"),
        ("task: " + "[" * 50 + "]" * 50, "nested too deeply"),
        ("task: " + "[" * 400 + "]" * 400, "cannot be read|nested too deeply"),
        (b"task: \xff", "cannot be read"),
    ],
)
def test_a_folder_that_could_run_code_is_refused(tmp_path, text, message):
    """Before lm-evaluation-harness reads it. Files that only another one includes count too."""
    folder = write_tasks(tmp_path / "tasks", CHOICE)
    assert refused(folder) == ""
    (tmp_path / "outside").write_text("task: x")
    (folder / "inside").write_text("process_docs: !function evil.run")
    (folder / "deep").mkdir()
    (folder / "deep" / "new.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message):
        check_task_folder(folder, {"acc"})


def test_a_link_out_of_the_folder_and_no_task_at_all_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    assert "There is no task in" in refused(tmp_path / "empty")
    assert "There is no task in" in refused(tmp_path / "missing")
    folder = write_tasks(tmp_path / "tasks", CHOICE)
    (tmp_path / "other.yaml").write_text("task: x")
    (folder / "link.yaml").symlink_to(tmp_path / "other.yaml")
    assert "outside of the folder" in refused(folder)
