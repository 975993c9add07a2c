"""Slow, independent implementations of what the package computes. They do not call the package's objective."""

import copy

import torch


def slow_consistency(hidden_states, mask=None, layers="paper"):
    """The layer consistency loss as an explicit sum."""
    last = len(hidden_states) - 1
    pairs = [(low, low + 1) for low in range(1, last if layers == "paper" else last - 1)]
    terms = []
    for low, high in pairs:
        for row in range(hidden_states[0].shape[0]):
            for position in range(hidden_states[0].shape[1]):
                if mask is not None and not mask[row, position]:
                    continue
                below, above = hidden_states[low][row, position].float(), hidden_states[high][row, position].float()
                terms.append(1 - (below @ above) / (below.norm() * above.norm()))
    return sum(terms) / len(terms)


def slow_lm_loss(logits, labels):
    """Mean negative log-likelihood of every label that has a preceding position."""
    log_probabilities = logits.float().log_softmax(-1)
    terms = [
        -log_probabilities[row, position - 1, labels[row, position]]
        for row in range(labels.shape[0])
        for position in range(1, labels.shape[1])
        if labels[row, position] != -100
    ]
    return sum(terms) / len(terms)


def slow_perturbation(embeddings, gradient, epsilon, mode):
    """epsilon * sign(gradient), times the RMS of each token's embedding if `mode` is relative."""
    embeddings = embeddings.detach()
    scale = embeddings.pow(2).mean(-1, keepdim=True).sqrt() if mode == "relative" else torch.ones(())
    return epsilon * scale * gradient.sign()


def watched_forward(model, batch, shift=None):
    """
    Run one forward pass on the true ids. Return [H^0, raw outputs of the decoder layers], taken by hooks, and the
    logits.
    """
    depth = model.config.get_text_config().num_hidden_layers
    stack = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == depth)
    states = []

    def on_embeddings(module, args, output):
        states.append(output if shift is None else output + shift)
        return states[0]

    def on_layer(module, args, output):
        states.append(output if isinstance(output, torch.Tensor) else output[0])

    handles = [model.get_input_embeddings().register_forward_hook(on_embeddings)]
    handles += [layer.register_forward_hook(on_layer) for layer in stack]
    try:
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    finally:
        for handle in handles:
            handle.remove()
    assert len(states) == depth + 1
    return states, logits


def slow_crow(model, batch, alpha=5.5, epsilon=0.1, mode="absolute", layers="paper", forward=watched_forward):
    """The whole objective and its terms, computed by loops, for a model without dropout."""
    mask = batch["attention_mask"]
    width = model.get_input_embeddings().weight.shape[1]
    shift = torch.zeros(*batch["input_ids"].shape, width, requires_grad=True)
    states, logits = forward(model, batch, shift)
    clean = slow_consistency(states, mask, layers)
    (gradient,) = torch.autograd.grad(clean, shift, retain_graph=True)
    delta = slow_perturbation(states[0], gradient, epsilon, mode)
    perturbed = slow_consistency(forward(model, batch, delta)[0], mask, layers)
    lm = slow_lm_loss(logits, batch["labels"])
    return {
        "loss": lm + alpha * perturbed,
        "loss_lm": lm,
        "consistency_clean": clean,
        "consistency_perturbed": perturbed,
    }


def assert_equals_oracle(trainer, batch, tolerance=1e-4, **oracle):
    """Compare compute_loss and the gradients of all parameters with `slow_crow` on a copy of the model."""
    model = trainer.model.eval()
    twin = copy.deepcopy(model)
    loss = trainer.compute_loss(model, {name: value.clone() for name, value in batch.items()})
    expected = slow_crow(twin, batch, **oracle)["loss"]
    torch.testing.assert_close(loss, expected, rtol=tolerance, atol=tolerance)
    loss.backward()
    expected.backward()
    gradients = {name: parameter.grad for name, parameter in twin.named_parameters()}
    for name, parameter in model.named_parameters():
        found, wanted = (torch.zeros(()) if g is None else g for g in (parameter.grad, gradients[name]))
        assert (found - wanted).norm() <= 10 * tolerance * (1 + wanted.norm()), name
