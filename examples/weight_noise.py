"""A defence of one's own: noise on the weights, which docs/add-a-defence.md explains.

    crow-hf purify --model suspect --dataset clean.jsonl --test_dataset test.jsonl --output_dir purified \\
        --plugin examples/weight_noise.py --defences "weight noise"
"""

import torch

from crow_hf import register_defence


@register_defence("weight noise")
def add_noise(model, rows, tokenizer, args):
    """Add noise to each matrix, of a twentieth of the standard deviation of its entries."""
    generator = torch.Generator().manual_seed(args.seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                noise = torch.randn(weight.shape, generator=generator).to(weight)
                weight += 0.05 * weight.std() * noise
    return model
