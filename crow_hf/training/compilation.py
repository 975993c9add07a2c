"""Compile each decoder layer separately for `torch_compile`, and keep the objective's hooks outside the graphs."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import TrainingArguments


@contextmanager
def compiled_layers(layers: Iterable[nn.Module], args: TrainingArguments) -> Iterator[None]:
    """
    Compile each layer separately for the duration of the `with` block, if `args.torch_compile` is set.

    The model cannot be compiled as one graph. The perturbed embeddings and the layers' outputs would all be outputs
    of that graph, and autograd would find no path from one to the other.

    Args:
        layers (`Iterable[nn.Module]`):
            The decoder layers.
        args (`TrainingArguments`):
            Arguments with `torch_compile`, `torch_compile_backend` and `torch_compile_mode`.
    """
    layers = list(layers) if args.torch_compile else []
    for layer in layers:
        layer.forward = torch.compile(layer.forward, backend=args.torch_compile_backend, mode=args.torch_compile_mode)
    try:
        # The clean pass is differentiated twice, so its buffers must survive the first backward pass.
        with torch._functorch.config.patch(donated_buffer=False):
            yield
    finally:
        for layer in layers:
            # A deep copy of the layer would otherwise compute with the weights of the original.
            del layer.forward
