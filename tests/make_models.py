#!/usr/bin/env python3
"""Make tests/models/ with `transformers`: tiny random networks, and what they answer.

    poetry install --with oracle && poetry run tests/make_models.py

Each folder holds what `save_pretrained` writes, and expected.safetensors: tokens, the logits that
follow them, and the derivatives of `loss_of` by all weights. The tests read it where `transformers`
is not installed.
"""

import sys
from pathlib import Path

import safetensors.torch
import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "src"))

from inputs.documents import MARK, MARK_ID, learn_tokenizer  # noqa: E402

MODELS = ROOT / "tests" / "models"
TEXT = "def add(a, b):\n    return a + b\n\n\nclass Sum:\n    total = 0\n"
SIZES = {
    "vocab_size": 264, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 4, "intermediate_size": 16,
    "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "bos_token_id": MARK_ID,
    "eos_token_id": MARK_ID,
}  # fmt: skip

SCALING = {  # which keeps one frequency of four, slows one down, and two in part
    "rope_type": "llama3", "rope_theta": 50.0, "factor": 8.0, "low_freq_factor": 0.05,
    "high_freq_factor": 0.5, "original_max_position_embeddings": 4,
}  # fmt: skip
SMALL = {"num_hidden_layers": 1, "tie_word_embeddings": True}
FOLDERS = {  # the family, its settings, and how many tokens it reads
    "llama": ("Llama", SMALL | {"tie_word_embeddings": False}, 7),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}, 7),
    "llama-3": ("Llama", SMALL | {"head_dim": 8, "rope_parameters": SCALING}, 12),
    "qwen-2": ("Qwen2", SMALL, 7),
    "qwen-3": ("Qwen3", SMALL | {"head_dim": 8, "num_key_value_heads": 4}, 7),
}


def loss_of(logits):
    """Return a number whose derivatives by the logits all differ."""
    return logits.sin().sum()


def assert_close(found, expected):
    """Assert that float32 results differ by at most 1e-5 of the largest."""
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def draw_weights(model):
    """Give a network random weights, with no norm's at 1 or 0."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.3)
    return model


def make_model(folder, family, **settings):
    """Save a network of a family and its tokenizer in a folder; return the network."""
    import transformers
    from transformers import PreTrainedTokenizerFast

    config = getattr(transformers, f"{family}Config")(**SIZES | settings)
    model = draw_weights(getattr(transformers, f"{family}ForCausalLM")(config))
    model.save_pretrained(folder)
    tokenizer = learn_tokenizer([TEXT], SIZES["vocab_size"])
    theirs = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=MARK, eos_token=MARK)
    theirs.save_pretrained(folder)
    return model


def main():
    """Make the folders."""
    for name, (family, settings, length) in FOLDERS.items():
        model = make_model(MODELS / name, family, **settings)
        tokens = torch.randint(SIZES["vocab_size"], (1, length))
        logits = model(tokens).logits
        loss_of(logits).backward()
        expected = {f"gradient of {name}": p.grad for name, p in model.named_parameters()}
        written = model.generate(tokens, max_new_tokens=20, do_sample=False)
        expected |= {"tokens": tokens, "logits": logits.detach(), "written": written}
        safetensors.torch.save_file(expected, MODELS / name / "expected.safetensors")


if __name__ == "__main__":
    main()
