"""A folder of tasks for lm-evaluation-harness, with their data."""

import json

import yaml


MEAN = {"aggregation": "mean", "higher_is_better": True}
QUESTIONS = [
    {"question": f"What is {letter}?", "choices": ["a letter", "none", "b"], "gold": number % 3, "answer": letter}
    for number, letter in enumerate("abcdef")
]
CHOICE = {
    "task": "choice",
    "dataset_path": "json",
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "gold",
    "metric_list": [{"metric": "acc"} | MEAN],
}
WRITE = CHOICE | {
    "task": "write",
    "output_type": "generate_until",
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 3},
    "doc_to_target": "{{answer}}",
    "metric_list": [{"metric": "exact_match"} | MEAN],
}
del WRITE["doc_to_choice"]


def write_tasks(folder, *tasks, rows=QUESTIONS):
    """Write tasks and the rows of all of them. Returns the folder."""
    folder.mkdir(exist_ok=True)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"data_files": {"test": str(folder / "rows.jsonl")}}
    for number, task in enumerate(tasks):
        (folder / f"{number}.yaml").write_text(yaml.safe_dump({"dataset_kwargs": data} | task))
    return folder
