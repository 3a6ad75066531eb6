"""Beam search: the likeliest translation, not the likeliest next token.

translation.py uses it. It keeps several unfinished translations of each sentence (section 6.1 of
"Attention Is All You Need"), and the best finished one by equation 14 of Wu et al. 2016.
"""

import math
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from attention import padding_mask
from decoding.cache import cached
from inputs.text import BOS, EOS, MAX_LENGTH, PAD


def autocast(device: torch.device) -> torch.autocast:
    """Compute products in bfloat16 where the GPU can; older ones only emulate it, slowly."""
    enabled = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


@torch.inference_mode()
def beam_search(
    model: Any, source: Tensor, beam: int, alpha: float = 1.2, use_cache: bool = True
) -> list[list[int]]:
    """Search for the likeliest target of each source (B, S); return their tokens without EOS.

    Keeps the `beam` likeliest unfinished targets of each source, and the best finished one by
    log P / ((5 + length) / 6)^alpha, equation 14 of Wu et al. 2016 (arXiv 1609.08144). A target has
    at most twice as many tokens as its source, plus 20; if none is finished, the likeliest counts.
    """
    B, device = len(source), source.device
    limit = (2 * (source != PAD).sum(dim=1) + 20).clamp(max=MAX_LENGTH)  # (B,)
    longest = int(limit.max())
    penalty = ((5 + torch.arange(longest + 1, device=device)) / 6) ** alpha  # of each length
    memory = model.eval().encode(source).repeat_interleave(beam, dim=0)  # (B * beam, S, d_model)
    memory_mask = padding_mask(source, PAD).repeat_interleave(beam, dim=0)
    likeliest = torch.arange(B, device=device) * beam  # row of each source's likeliest target
    target = torch.full((B * beam, 1), BOS, device=device)
    score = torch.full((B, beam), -math.inf, device=device)  # log P of the unfinished
    score[:, 0] = 0.0  # all begin alike, so only one may count
    best = torch.full((B,), -math.inf, device=device)  # score of the finished
    found = torch.full((B, longest), PAD, device=device)
    names = ("self_attention.W_k", "self_attention.W_v")
    own = [layer.get_submodule(name) for layer in model.decoder for name in names]
    with ExitStack() as stack:
        kept = stack.enter_context(cached(model)) if use_cache else {}
        for length in range(1, longest + 1):
            start = length - 1 if use_cache else 0
            logits = model.decode(target[:, start:], memory, memory_mask, start)[:, -1]
            log_probabilities = logits.float().log_softmax(dim=-1).view(B, beam, -1)
            total = score.unsqueeze(-1) + log_probabilities  # (B, beam, V)

            ended, which = (total[..., EOS] / penalty[length]).max(dim=1)
            better = (ended > best) & (length <= limit)
            best = torch.where(better, ended, best)
            found[better, : length - 1] = target[(likeliest + which)[better], 1:]

            total[..., [PAD, BOS, EOS]] = -math.inf  # the others go on
            score, top = total.flatten(1).topk(beam)
            rows = (likeliest.unsqueeze(1) + top // total.shape[-1]).flatten()
            target = torch.cat((target[rows], (top % total.shape[-1]).view(-1, 1)), dim=1)
            cut = (length == limit) & best.isinf()
            found[cut, :length] = target[likeliest[cut], 1:]
            # No continuation can be better: log P only falls, and penalty[limit] is the largest.
            if ((best >= score[:, 0] / penalty[limit]) | (length >= limit)).all():
                break
            for W in own if use_cache and beam > 1 else ():
                kept[W] = kept[W][rows]  # those of the memory are the same for a whole beam
            memory = memory[:, :0] if use_cache else memory  # its keys and values are kept
    return [[i for i in ids if i != PAD] for ids in found.tolist()]


def translate(
    model: Any, tokenizer: Tokenizer, lines: Sequence[str], beam: int
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
