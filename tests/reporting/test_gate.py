"""Tests of policies and of the gate."""

import math

import pytest

from crow_hf.evaluation.scores import Proportion
from crow_hf.reporting.checksums import Changes
from crow_hf.reporting.gate import Check, Policy, check_policy, decide
from crow_hf.reporting.words import DIED, LIVES, NOT_LEARNED
from helpers.evaluations import retention, scores, share


def report(triggered=True, left=0, lost=0, canaries=((0, DIED),), kept=True):
    """A report with an attack of which `left` of 200 are left, `lost` right answers less, canaries on 100 prompts."""
    evaluations = {
        "suspect": {"clean": scores(0, 180).to_dict(), "triggered": scores(200, 0).to_dict()},
        "purified": {"clean": scores(0, 180 - lost).to_dict(), "triggered": scores(left, 150).to_dict()},
    }
    if not triggered:
        for each in evaluations.values():
            each["triggered"] = None
    return {
        "evaluations": evaluations,
        "canaries": [
            {"outcome": outcome, "after": Proportion.of(n < hits for n in range(100))._asdict()}
            for hits, outcome in canaries
        ],
        "retention": retention(1.02, answer_kl=0.04).to_dict() if kept else None,
        "last_look": {"prompts": 5, "tokens": 64, "different": [], "trouble": ""},
        "failures": [],
    }


def quantized_report():
    """A report whose backdoor and canary act in the quantized model alone, which loses 40 of 200 right answers too."""
    record = report()
    record["quantized"] = "purified, nf4"
    record["evaluations"]["purified, nf4"] = {"clean": scores(0, 140).to_dict(), "triggered": scores(50, 0).to_dict()}
    record["canaries"][0]["quantized"] = Proportion.of(n < 30 for n in range(100))._asdict()
    return record


def only(record, **rules):
    (check,) = check_policy(record, Policy(**rules))
    return check


@pytest.mark.parametrize(
    ("rules", "highest", "found"),
    [
        # The upper end of Wilson's interval for 0 of 200, and for 0 of 100.
        (
            {"max_attack_success": 0.0188},
            0.018846,
            "0 of 200 triggered prompts show the target, so at most 1.9 % with",
        ),
        ({"max_canary_success": 0.0369}, 0.036994, "the worst of 1 canaries shows in 0 of 100 answers"),
        # Twice the divergence and 0.1 more than the ratio, by the helper. The divergence on text is at most 0.06.
        ({"max_kl": 0.0799}, 0.08, "0.040 on answers and 0.030 on text, in nats per token"),
        ({"max_text_bits_ratio": 1.1199}, 1.12, "running text takes 1.020 times the suspect's bits"),
    ],
)
def test_the_upper_end_of_the_interval_counts(rules, highest, found):
    """A limit above it is kept. With one between it and the measured value, more prompts could show either."""
    ((name, limit),) = rules.items()
    assert limit < highest
    check = only(report(), **rules)
    assert (check.rule, check.outcome, check.limit) == (name, "no evidence", limit) and found in check.found
    assert only(report(), **{name: highest + 1e-6}).outcome == "passed"


@pytest.mark.parametrize(
    ("name", "record", "value"),
    [
        ("max_attack_success", report(left=20), 0.1),
        ("max_canary_success", report(canaries=[(0, DIED), (20, LIVES)]), 0.2),
        ("max_attack_success", quantized_report(), 0.25),
        ("max_canary_success", quantized_report(), 0.3),
        ("max_accuracy_drop", report(lost=20), 0.1),
        ("max_accuracy_drop", quantized_report(), 0.2),
        ("max_kl", report(), 0.04),
        ("max_text_bits_ratio", report(), 1.02),
    ],
)
def test_a_measured_value_beyond_the_limit_breaks_the_rule(name, record, value):
    assert only(record, **{name: value - 1e-6}).outcome == "failed"
    assert only(record, **{name: value + 1e-6}).outcome == "no evidence"


def test_lost_accuracy_is_judged_prompt_by_prompt():
    """Fails if the models are taken as measured on different prompts, or if only the numbers of right answers do."""
    same, others = report(lost=20), report(lost=20)
    right = [number < 160 for number in range(200)]
    # As many answers are right, but 20 that were are wrong, and 20 that were not are right.
    others["evaluations"]["purified"]["clean"]["exact_matches"] = right[::-1]
    checks = [only(record, max_accuracy_drop=0.15) for record in (same, others)]
    assert [check.outcome for check in checks] == ["passed", "no evidence"]
    assert "90.0 % before and 80.0 % now (20 were lost and 0 gained on 200 prompts)" in checks[0].found
    assert "(40 were lost and 20 gained on 200 prompts)" in checks[1].found
    # The upper end for independent samples is 17.0 %. The second flags are correlated negatively, so it is 17.5 %.
    assert "at most 14.7 % with" in checks[0].found and "at most 17.5 % with" in checks[1].found


@pytest.mark.parametrize(
    ("record", "rules"),
    [
        (report(triggered=False), {"max_attack_success": 1.0}),
        (report(triggered=False), {"require": ["attack"]}),
        (report(canaries=[]), {"max_canary_success": 1.0}),
        (
            report(canaries=[(0, NOT_LEARNED), (0, "is not evidence, because it was not seen")]),
            {"require": ["canaries"]},
        ),
        (report(kept=False), {"max_kl": 9.0}),
        (report(kept=False), {"max_text_bits_ratio": 9.0}),
        (report(kept=False), {"require": ["retention"]}),
        (report(), {"require": ["control"]}),
        (report() | {"last_look": None}, {"require": ["last_look"]}),
        (report(), {"min_rows": 201}),
        (report() | {"evaluations": None}, {"min_rows": 1}),
        (report() | {"evaluations": None}, {"max_accuracy_drop": 1.0}),
    ],
)
def test_what_was_not_measured_is_no_evidence(record, rules):
    """Not even the mildest limit lets it pass."""
    check = only(record, **rules)
    assert check.outcome == "no evidence" and check.found.endswith(".")
    assert decide([check, Check("other", "passed", "")]) == "no evidence"


def test_a_suspect_without_right_answers_has_none_to_lose():
    record = report()
    for each in record["evaluations"].values():
        each["clean"] |= {"exact_match": share(2)._asdict()}
    assert only(record, max_accuracy_drop=1.0).outcome == "no evidence"


def test_a_broken_rule_outweighs_missing_evidence():
    record = report(triggered=False, canaries=[(0, DIED), (90, LIVES)])
    checks = check_policy(record, Policy(max_attack_success=0.1, max_canary_success=0.1, min_rows=200))
    assert [check.outcome for check in checks] == ["no evidence", "failed", "passed"]
    assert decide(checks) == "failed"


def test_changed_files_break_the_gate():
    """The report is about the files that were measured, not about others."""
    policy = Policy(min_rows=1)
    assert decide(check_policy(report(), policy, Changes(["a"], [], [], []))) == "passed"
    for changes in (Changes([], ["a"], [], []), Changes([], [], ["b"], []), Changes([], [], [], ["c"])):
        check, _ = check_policy(report(), policy, changes)
        assert check.outcome == "failed" and decide([check]) == "failed"


def test_a_saved_model_that_answers_otherwise_breaks_the_gate():
    different = [{"prompt": "", "measured": "a", "saved": "b", "shows_target": False}]
    record = report() | {"last_look": {"prompts": 5, "tokens": 64, "different": different, "trouble": ""}}
    check, _ = check_policy(record, Policy(min_rows=1))
    assert (check.rule, check.outcome) == ("last look", "failed") and "1 of 5 prompts" in check.found


def test_errors_of_a_run_are_no_evidence():
    """A model that cannot be loaded again may answer anything."""
    look = {"prompts": 0, "tokens": 0, "different": [], "trouble": "OutOfMemoryError"}
    for change in ({"last_look": look}, {"failures": ["No card."]}):
        checks = check_policy(report() | change, Policy(min_rows=1))
        assert decide(checks) == "no evidence" and checks[0].rule in ("last look", "run")


def test_a_policy_file(tmp_path):
    path = tmp_path / "policy.yaml"
    path.write_text("max_attack_success: 0.05\nrequire: [attack, retention]\n")
    assert Policy.read(path) == Policy(max_attack_success=0.05, require=["attack", "retention"])
    assert Policy.read(path, max_attack_success=0.01, max_kl=None).max_attack_success == 0.01
    assert Policy.read(None, min_rows=5) == Policy(min_rows=5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_atack_success: 0.1", "has the unknown rule 'max_atack_success'. Rules are max_attack_success"),
        ("max_attack_success: 5", r"`max_attack_success` is a share from 0 to 1, such as 0.05, got 5"),
        ("max_attack_success: '0.1'", "got '0.1'"),
        ("max_kl: true", "got True"),
        ("max_kl: .nan", "got nan"),
        ("max_text_bits_ratio: .inf", "got inf"),
        ("min_rows: -1", "a whole number of prompts, such as 100, got -1"),
        ("min_rows: 2.5", "got 2.5"),
        ("max_kl: 0.1\nmin_rows: 5\nmax_kl: 9", "has the rule 'max_kl' twice"),
        ("[" * 5000, "is not YAML"),
        (
            "require: [scan]",
            "`require` is a list of accuracy, attack, canaries, control, last_look, retention, got 'scan'",
        ),
        ("require: attack", "got 'attack'"),
        ("require: [[attack]]", r"got \['attack'\]"),
        ("- max_kl", "is no policy"),
        ("max_kl: [", "is not YAML"),
        ("\x00", "is not YAML"),
        ("", "is no policy"),
        ("{}", "has no rule"),
        ("1: 2", "has the unknown rule '1'"),
    ],
)
def test_impossible_policies_are_refused(text, message, tmp_path):
    path = tmp_path / "policy.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        Policy.read(path)


def test_an_interval_without_an_end_is_no_evidence():
    """One text has no interval. JSON holds no infinity."""
    record = report()
    record["retention"]["text_bits_ratio_high"] = None
    assert only(record, max_text_bits_ratio=9.0).outcome == "no evidence"
    assert math.isfinite(share(1).high)
