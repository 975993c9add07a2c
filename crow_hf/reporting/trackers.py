"""The end of a purification as numbers for trackers, such as TensorBoard, beside the curves of its training."""

from .record import Record


_RETENTION = ("answer_kl", "text_kl", "text_bits_ratio")


def final_scores(record: Record) -> dict[str, float]:
    """
    Return the numbers of a report that a tracker can compare between runs.

    Args:
        record (`dict`):
            The content of `report.json`.

    Returns:
        `dict[str, float]`: By name, such as `"eval_purified/attack_success"`: attack success and right answers of each
        model, retention, and the success of the worst canary. What was not measured is left out. Trainer writes
        `eval_` as `eval/`.
    """
    scores: dict[str, float] = {}
    for role, evaluation in (record["evaluations"] or {}).items():
        found = {
            "attack_success": (evaluation["triggered"] or {}).get("target"),
            "right_answers": evaluation["clean"]["exact_match"],
        }
        scores |= {f"eval_{role}/{name}": share["rate"] for name, share in found.items() if share is not None}
    kept = record["retention"] or {}
    scores |= {f"eval_purified/{name}": kept[name] for name in _RETENTION if kept.get(name) is not None}
    canaries = [canary["after"]["rate"] for canary in record["canaries"] if canary["after"]]
    return scores | ({"eval_purified/canary_success": max(canaries)} if canaries else {})
