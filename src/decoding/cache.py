"""A cache for the keys and values of a network that writes token by token.

Without it, each step computes the keys and values of all earlier tokens again. transformer.py,
search.py and sampling.py write within a `Cache`, and pass only the new tokens.
"""

from typing import Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


def is_projection(name: str) -> bool:
    """Return whether a module of this name makes the keys or values of an attention.

    What is done to keys after that, such as rotating them, has to be done to those of all tokens.
    """
    return name.rpartition(".")[2] in ("W_k", "W_v")


class Cache:
    """Lets W_k and W_v of each attention return the rows of all tokens so far, (B, S, size).

    They are then called with new tokens only. Those of the memory, which stays the same, are
    computed once; it has to be passed to the network as the very tensor that is given here.
    """

    def __init__(self, model: nn.Module, memory: Tensor | None = None) -> None:
        self.memory = memory
        self.length = 0  # tokens so far
        self.projections = [W for name, W in model.named_modules() if is_projection(name)]
        self.rows: dict[nn.Module, Tensor] = {}  # of the tokens, (B, length, size)
        self.memory_rows: dict[nn.Module, Tensor] = {}
        self.hooks: list[RemovableHandle] = []

    def __enter__(self) -> Self:
        """Begin to keep rows."""
        for W in self.projections:
            self.hooks.append(W.register_forward_pre_hook(self.skip))
            self.hooks.append(W.register_forward_hook(self.extend))
        return self

    def __exit__(self, *_: object) -> None:
        """Leave the network as it was."""
        for hook in self.hooks:
            hook.remove()

    def skip(self, W: nn.Module, inputs: tuple[Tensor]) -> Tensor | None:
        """Project nothing of a memory whose rows are there already."""
        (x,) = inputs
        return x[:, :0] if W in self.memory_rows else None

    def extend(self, W: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        """Keep the rows (B, T, size) of T new tokens; return those of all tokens so far."""
        if W in self.memory_rows:
            return self.memory_rows[W]
        if inputs[0] is self.memory:
            self.memory_rows[W] = output
            return output
        if W in self.rows:
            output = torch.cat((self.rows[W], output), dim=1)
        self.rows[W] = output
        self.length = output.shape[1]
        return output  # the result of a forward hook replaces the output

    def keep(self, length: int) -> None:
        """Forget the rows of all tokens but the first `length`; there is no memory.

        After an interrupted step, rows of some projections are missing: then it keeps fewer.
        """
        lengths = [self.rows[W].shape[1] if W in self.rows else 0 for W in self.projections]
        self.length = min([length, *lengths])
        self.rows = {W: rows[:, : self.length] for W, rows in self.rows.items()}

    def reorder(self, rows: Tensor) -> None:
        """Let row i (of B) continue what row rows[i] has been; the memory stays where it is."""
        self.rows = {W: kept[rows] for W, kept in self.rows.items()}
