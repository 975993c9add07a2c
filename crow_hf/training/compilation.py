"""`torch_compile`: each layer by itself, with the hooks of the objective outside."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ..methods.crow.config import CrowConfig


@contextmanager
def compiled_layers(layers: Iterable[nn.Module], args: CrowConfig) -> Iterator[None]:
    """
    Compile each layer by itself, within the block alone, if `args.torch_compile` says so.

    In a graph of the whole model, what is perturbed would be a result beside the layers' outputs, and autograd finds no way from
    these to it.
    """
    layers = list(layers) if args.torch_compile else []
    for layer in layers:
        layer.forward = torch.compile(layer.forward, backend=args.torch_compile_backend, mode=args.torch_compile_mode)
    try:
        # The clean pass is differentiated twice, so its buffers must outlive the first time.
        with torch._functorch.config.patch(donated_buffer=False):
            yield
    finally:
        for layer in layers:
            # A copy of the layer would compute with the weights of this one.
            del layer.forward
