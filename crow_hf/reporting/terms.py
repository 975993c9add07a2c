"""The logged terms of the objectives, with the names and line styles that pictures give them."""

LOSSES = {
    "loss_lm": ("language model loss", 0),
    "distillation": ("plain prompts", 0),
    "decoy": ("prompts with decoys", 1),
    "adversarial": ("prompts with adversarial decoys", 2),
}
CONSISTENCIES = {"consistency_clean": ("clean", 0), "consistency_perturbed": ("perturbed", 1)}
