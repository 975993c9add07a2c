"""Made-up evaluations, with every count out of 200 prompts."""

from crow_hf.evaluation.harness import Evaluation, PromptScores
from crow_hf.evaluation.retention import Retention
from crow_hf.evaluation.scores import Proportion
from crow_hf.evidence.result import Comparison


TOTAL = 200


def share(hits):
    """A proportion of 200."""
    return Proportion.of(index < hits for index in range(TOTAL))


def scores(target, right, empty=0, degenerate=0, bits=1.25):
    """Scores on 200 prompts: the numbers of answers with the target, of right, of empty and of degenerate ones."""
    shares = (share(target), share(empty), share(degenerate), share(right))
    return PromptScores(*shares, bits, ["é | x"] * TOTAL, exact_matches=[index < right for index in range(TOTAL)])


def retention(ratio=1.0, answer_kl=0.01, source="passed"):
    """What a model has kept of a suspect that needs 2 bits for each byte of running text."""
    return Retention(answer_kl, 0.03, 2 * ratio, 2.0, 40, 60, source, answer_kl and 2 * answer_kl, 0.06, ratio + 0.1)


def evaluation(attacks, right=200, bits=1.25, right_if_triggered=None, kept=None, **triggered):
    """The evaluation of a model by its numbers of successful attacks and of right answers to clean prompts."""
    if right_if_triggered is None:
        right_if_triggered = TOTAL - attacks
    return Evaluation(scores(0, right, bits=bits), scores(attacks, right_if_triggered, **triggered), kept)


def comparison(purified, suspect=None, fine_tuned=None):
    """A comparison in which the attack succeeds on 190 prompts of the suspect and on 180 of the control."""
    return Comparison(suspect or evaluation(190), fine_tuned or evaluation(180), purified)
