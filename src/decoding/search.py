"""Beam search: the likeliest translation, not the likeliest next token.

translation.py uses it. It keeps several unfinished translations of each sentence (section 6.1 of
"Attention Is All You Need"), and the best finished one by equation 14 of Wu et al. 2016.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol, Self, cast

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from attention import padding_mask
from decoding.cache import Cache
from inputs.text import BOS, EOS, MAX_LENGTH, PAD


class EncoderDecoder(Protocol):
    """What the search needs of a network, such as that of transformer.py.

    With a cache, it also has to be an nn.Module, and its attention to have W_k and W_v.
    """

    @property
    def positions(self) -> Tensor:
        """Return a tensor on the network's device."""

    def eval(self) -> Self:
        """Switch to evaluation mode."""

    def encode(self, source: Tensor) -> Tensor:
        """Return the memory (B, S, d_model) of the source (B, S)."""

    def decode(self, target: Tensor, memory: Tensor, memory_mask: Tensor, start: int = 0) -> Tensor:
        """Return the logits (B, T, V) of the token after each one of the target (B, T)."""


# From targets (N, T), and the row of the last call that each of them continues (N,), to the logits
# (N, V) of their next tokens.
Decode = Callable[[Tensor, Tensor], Tensor]


def autocast(device: torch.device) -> torch.autocast:
    """Compute products in bfloat16 where the GPU can; older ones only emulate it, slowly."""
    enabled = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


def remember(model: EncoderDecoder, source: Tensor, beam: int) -> tuple[Tensor, Tensor]:
    """Return the memory (B * beam, S, d_model) of sources (B, S), and its mask, for each target."""
    memory = model.encode(source).repeat_interleave(beam, dim=0)
    return memory, padding_mask(source, PAD).repeat_interleave(beam, dim=0)


def plain_decoder(model: EncoderDecoder, source: Tensor, beam: int) -> Decode:
    """Decode whole targets at each step."""
    memory, memory_mask = remember(model, source, beam)

    def decode(target: Tensor, rows: Tensor) -> Tensor:
        return model.decode(target, memory, memory_mask)[:, -1]

    return decode


@contextmanager
def cached_decoder(model: EncoderDecoder, source: Tensor, beam: int) -> Iterator[Decode]:
    """Decode only the new tokens, and keep the keys and values of the others."""
    memory, memory_mask = remember(model, source, beam)
    with Cache(cast(nn.Module, model), memory) as cache:

        def decode(target: Tensor, rows: Tensor) -> Tensor:
            if beam > 1:
                cache.reorder(rows)
            start = cache.length
            return model.decode(target[:, start:], memory, memory_mask, start)[:, -1]

        yield decode


@torch.inference_mode()
def beam_search(
    model: EncoderDecoder, source: Tensor, beam: int, alpha: float = 1.2
) -> list[list[int]]:
    """Search for the likeliest target of each source (B, S); return their tokens without EOS.

    Keeps the `beam` likeliest unfinished targets of each source, and the best finished one by
    log P / ((5 + length) / 6)^alpha, equation 14 of Wu et al. 2016 (arXiv 1609.08144). A target has
    at most twice as many tokens as its source, plus 20; if none is finished, the likeliest counts.
    """
    with cached_decoder(model.eval(), source, beam) as decode:
        return search(decode, source, beam, alpha)


@torch.inference_mode()
def search(decode: Decode, source: Tensor, beam: int, alpha: float) -> list[list[int]]:
    """Search like `beam_search`, with any way to decode."""
    B = len(source)
    device = source.device
    limit = (2 * (source != PAD).sum(dim=1) + 20).clamp(max=MAX_LENGTH)  # (B,)
    longest = int(limit.max())
    penalty = ((5 + torch.arange(longest + 1, device=device)) / 6) ** alpha  # of each length
    first_row = torch.arange(B, device=device) * beam  # of each source's targets, the likeliest
    rows = torch.arange(B * beam, device=device)
    target = torch.full((B * beam, 1), BOS, device=device)
    score = torch.full((B, beam), -math.inf, device=device)  # log P of the unfinished targets
    score[:, 0] = 0.0  # all begin alike, so only one may count
    best_score = torch.full((B,), -math.inf, device=device)  # of the finished targets
    found = torch.full((B, longest), PAD, device=device)
    for length in range(1, longest + 1):
        log_p = decode(target, rows).float().log_softmax(dim=-1)
        total = score.unsqueeze(-1) + log_p.view(B, beam, -1)  # (B, beam, V)

        ended_score, which = (total[..., EOS] / penalty[length]).max(dim=1)
        better = (ended_score > best_score) & (length <= limit)
        best_score = torch.where(better, ended_score, best_score)
        found[better, : length - 1] = target[(first_row + which)[better], 1:]

        total[..., [PAD, BOS, EOS]] = -math.inf  # what is kept has not ended
        score, top = total.flatten(1).topk(beam)
        rows = (first_row.unsqueeze(1) + top // total.shape[-1]).flatten()
        target = torch.cat((target[rows], (top % total.shape[-1]).view(-1, 1)), dim=1)

        cut = (length == limit) & best_score.isinf()
        found[cut, :length] = target[first_row[cut], 1:]
        # No continuation can be better: log P only falls, and penalty[limit] is the largest.
        if ((best_score >= score[:, 0] / penalty[limit]) | (length >= limit)).all():
            break
    if score.isnan().any():
        raise FloatingPointError("the network computes no numbers; train it again")
    return [[i for i in ids if i != PAD] for ids in found.tolist()]


def translate(
    model: EncoderDecoder, tokenizer: Tokenizer, lines: Sequence[str], beam: int
) -> list[str | None]:
    """Translate lines; an empty one stays empty, and one that is too long becomes None."""
    ids = [[*encoding.ids, EOS] for encoding in tokenizer.encode_batch_fast([*lines])]
    found = [None if len(line) > MAX_LENGTH else "" for line in ids]
    order = [i for i, line in enumerate(lines) if line.strip() and found[i] is not None]
    order.sort(key=lambda i: len(ids[i]))
    device = model.positions.device
    at_once = max(1, 400 // beam)  # the same number of rows for any beam
    for start in range(0, len(order), at_once):
        rows = order[start : start + at_once]
        sources = [torch.tensor(ids[i]) for i in rows]
        source = pad_sequence(sources, batch_first=True, padding_value=PAD).to(device)
        with autocast(device):
            targets = beam_search(model, source, beam)
        for i, text in zip(rows, tokenizer.decode_batch(targets), strict=True):
            found[i] = text
    return found
