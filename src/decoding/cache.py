"""A cache for the keys and values of a decoder that writes token by token.

Without it, each step recomputes the keys and values of all earlier tokens. transformer.py and
search.py write within `with cached(model):`, and pass the decoder only the new tokens.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from attention import MultiHeadAttention


@contextmanager
def cached(model: nn.Module) -> Iterator[dict[nn.Module, Tensor]]:
    """Let the decoder keep its keys and values, so that each step computes only the new ones.

    W_k and W_v of each attention then return the rows (B, S, d_model) of all tokens so far; each
    call passes only the new ones. Yields these rows for each W.
    """
    rows: dict[nn.Module, Tensor] = {}

    def append(W: nn.Module, inputs: object, output: Tensor) -> Tensor:
        if W not in rows:
            rows[W] = output
        elif output.shape[1]:  # the memory is given only once
            rows[W] = torch.cat((rows[W], output), dim=1)
        return rows[W]  # the result of a forward hook replaces the output

    decoder = model.get_submodule("decoder")
    heads = [module for module in decoder.modules() if isinstance(module, MultiHeadAttention)]
    hooks = [W.register_forward_hook(append) for each in heads for W in (each.W_k, each.W_v)]
    try:
        yield rows
    finally:
        for hook in hooks:
            hook.remove()
