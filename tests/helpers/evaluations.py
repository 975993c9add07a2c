"""Made-up evaluations, with every count out of 200 prompts."""

from crow_hf.evaluation.harness import Evaluation, PromptScores
from crow_hf.evaluation.scores import Proportion
from crow_hf.evidence.result import Comparison


TOTAL = 200


def share(hits):
    return Proportion.of(index < hits for index in range(TOTAL))


def scores(target, right, empty=0, degenerate=0, bits=1.25):
    return PromptScores(share(target), share(empty), share(degenerate), share(right), bits, ["é | x"] * TOTAL)


def evaluation(attacks, right=200, bits=1.25, right_if_triggered=None, **triggered):
    """Of a model with so many successful attacks and right answers to clean prompts, out of 200 each."""
    if right_if_triggered is None:
        right_if_triggered = TOTAL - attacks
    return Evaluation(scores(0, right, bits=bits), scores(attacks, right_if_triggered, **triggered))


def comparison(crow, suspect=None, fine_tuned=None):
    return Comparison(suspect or evaluation(190), fine_tuned or evaluation(180), crow)
