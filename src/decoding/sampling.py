"""Sampling: continue prompts, drawing each next token from what the network expects.

gpt.py, chat.py and the explorer use it. Several prompts of different lengths are continued at once,
each as if it were alone: it has its own positions, its own random numbers, and its own end.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Protocol, Self, cast

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn

from decoding.cache import Cache


class LanguageModel(Protocol):
    """What sampling needs of a network, such as that of gpt.py.

    With a cache, it also has to be an nn.Module, and its attention to have W_k and W_v.
    """

    def eval(self) -> Self:
        """Switch to evaluation mode."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """Return the weights; one tells the device."""

    def hidden(self, tokens: Tensor, positions: Tensor, mask: Tensor | None) -> Tensor:
        """Return what the network knows (B, T, d_model) after each of the tokens (B, T).

        The positions, (S,) or (B, S), and the mask (B, 1, S) are those of all tokens so far.
        """

    def to_logits(self, x: Tensor) -> Tensor:
        """Return the logits (..., V) of the next token."""


@dataclass(frozen=True)
class Sampling:
    """How to draw a token."""

    temperature: float = 1.0  # divides the logits; 0 takes the likeliest token
    top_k: int = 0  # draw from so many of the likeliest tokens; 0 from all
    top_p: float = 1.0  # draw from the smallest set of likeliest tokens that is so likely


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Set all logits (..., V) but the k largest to -inf."""
    kept = logits.topk(min(k, logits.shape[-1]))
    return torch.full_like(logits, -math.inf).scatter(-1, kept.indices, kept.values)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Keep the smallest set of tokens whose probabilities sum to at least p (Holtzman et al. 2020).

    The others' logits (..., V) become -inf. The likeliest token is always kept.
    """
    probability, order = logits.softmax(dim=-1).sort(dim=-1, descending=True)
    likelier = F.pad(probability.cumsum(dim=-1)[..., :-1], (1, 0))  # the sum before each token
    dropped = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, likelier >= p)
    return logits.masked_fill(dropped, -math.inf)


def draw_token(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """Draw a token by its logits (V,)."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    logits = (logits - logits.max()) / sampling.temperature  # 0 at most, so nothing overflows
    if sampling.top_k > 0:
        logits = keep_top_k(logits, sampling.top_k)
    if sampling.top_p < 1:
        logits = keep_top_p(logits, sampling.top_p)
    return int(torch.multinomial(logits.softmax(dim=-1), 1, generator=generator))


def next_logits(model: LanguageModel, tokens: Tensor, real: Tensor, start: int = 0) -> Tensor:
    """Return the logits (B, V) of the token after each row of tokens (B, S).

    Padding, where `real` is False, stands on the left. Tokens before `start` are in a cache.
    """
    if real.all():
        x = model.hidden(tokens[:, start:], torch.arange(tokens.shape[1], device=real.device), None)
    else:
        positions = (real.cumsum(dim=1) - 1).clamp(min=0)
        x = model.hidden(tokens[:, start:], positions, real.unsqueeze(1))
    return model.to_logits(x[:, -1])


@torch.inference_mode()
def next_tokens(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    seeds: Sequence[int],
    context: int,
    end: int,
    cached: bool = True,
    cache: Cache | None = None,
) -> Iterator[list[int | None]]:
    """Yield the next token of each prompt, then the one after it, and so on.

    A prompt has ended, and None stands for it, once its token is `end`, or it has become as long as
    the context. Each has a seed. An open `cache` may hold the rows of the prompts' first tokens.
    """
    model.eval()
    device = next(model.parameters()).device
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    lengths = [len(prompt) for prompt in prompts]
    padding = [max(lengths) - length for length in lengths]
    rows = [F.pad(torch.tensor(ids), (n, 0)) for ids, n in zip(prompts, padding, strict=True)]
    tokens = torch.stack(rows).to(device)  # (B, S)
    real = torch.arange(max(lengths)) >= torch.tensor(padding).unsqueeze(1)
    real = real.to(device)
    ended = [length >= context for length in lengths]
    own = cached and cache is None
    with Cache(cast(nn.Module, model)) if own else nullcontext(cache) as cache:
        while not all(ended):
            start = cache.length if cache else 0
            logits = next_logits(model, tokens, real, start).cpu().double()
            new = [end] * len(prompts)  # what follows an ended row is of no consequence
            for row, generator in enumerate(generators):
                if not ended[row]:
                    new[row] = draw_token(logits[row], sampling, generator)
                    ended[row] = new[row] == end
            if not all(ended):
                yield [None if token == end else token for token in new]
            lengths = [length + 1 for length in lengths]
            ended = [done or n >= context for done, n in zip(ended, lengths, strict=True)]
            tokens = torch.cat((tokens, torch.tensor(new, device=device).unsqueeze(1)), dim=1)
            real = F.pad(real, (0, 1), value=True)


def decode_stream(
    tokenizer: Tokenizer, tokens: Iterable[int], before: Sequence[int] = ()
) -> Iterator[str]:
    """Yield the text of tokens as soon as its characters are whole.

    Some tokenizers leave out a space at the start of a text. So the tokens before are decoded
    along: first those of `before`, then those of the last piece.
    """
    context = list(before)
    waiting: list[int] = []

    def new_text() -> str:
        return tokenizer.decode(context + waiting).removeprefix(tokenizer.decode(context))

    for token in tokens:
        waiting.append(token)
        text = new_text()
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # which stands for half a character
            yield text
            context = waiting
            waiting = []
    yield new_text()


def until(pieces: Iterable[str], stop: str) -> Iterator[str]:
    """Yield the text up to where `stop` begins, holding back what may be its beginning."""
    text = ""
    for piece in pieces:
        text += piece
        before, found, _ = text.partition(stop)
        if found:
            yield before
            return
        held = max(n for n in range(len(stop)) if text.endswith(stop[:n]))
        yield text[: len(text) - held]
        text = text[len(text) - held :]
    yield text
