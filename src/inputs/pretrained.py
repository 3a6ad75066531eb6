"""Language models as Hugging Face's `transformers` writes and reads them; no network is made here.

gpt.py uses it. A model is a folder with config.json, model.safetensors, tokenizer.json and
tokenizer_config.json. Its settings and tensors have other names there than in gpt.py.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SETTINGS = {  # of gpt.py, and of config.json
    "vocab_size": "vocab_size",
    "d_model": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "d_k": "head_dim",
    "d_ff": "intermediate_size",
    "context": "max_position_embeddings",
    "tied": "tie_word_embeddings",
    "theta": "rope_theta",
    "epsilon": "rms_norm_eps",
}
TENSORS = {  # parts of their names in gpt.py, and in model.safetensors
    "embedding.": "model.embed_tokens.",
    "layers.": "model.layers.",
    ".norm1.": ".input_layernorm.",
    ".attention.W_q.": ".self_attn.q_proj.",
    ".attention.W_k.": ".self_attn.k_proj.",
    ".attention.W_v.": ".self_attn.v_proj.",
    ".attention.W_o.": ".self_attn.o_proj.",
    ".attention.norm_q.": ".self_attn.q_norm.",
    ".attention.norm_k.": ".self_attn.k_norm.",
    ".norm2.": ".post_attention_layernorm.",
    ".feed_forward.W_gate.": ".mlp.gate_proj.",
    ".feed_forward.W_up.": ".mlp.up_proj.",
    ".feed_forward.W_down.": ".mlp.down_proj.",
    "norm.": "model.norm.",
    "to_logits.": "lm_head.",
}


def published_name(name: str) -> str:
    """Return the name that a tensor of gpt.py has in model.safetensors."""
    for ours, theirs in TENSORS.items():
        if name.startswith(ours) or (ours.startswith(".") and ours in name):
            name = name.replace(ours, theirs)
    return name


def make_config(settings: Mapping[str, Any], mark: int) -> bytes:
    """Return config.json for a Llama with these settings, whose documents begin with `mark`."""
    config = {theirs: settings[ours] for ours, theirs in SETTINGS.items()} | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": settings["theta"]},
        "bos_token_id": mark,
        "eos_token_id": mark,
        "dtype": "float32",
    }
    return json.dumps(config, indent=2).encode()


def make_tokenizer_config(mark: str, context: int) -> bytes:
    """Return tokenizer_config.json."""
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": mark,
        "eos_token": mark,
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
    }
    return json.dumps(config, indent=2).encode()


def read_json(path: Path) -> dict[str, Any]:
    """Read an object of a JSON file. Raises OSError or ValueError if there is none."""
    found = json.loads(path.read_bytes())
    if not isinstance(found, dict):
        raise ValueError("it is no JSON object")
    return found


def read_config(path: Path) -> dict[str, Any]:
    """Read config.json of a Llama; return its settings by their names in gpt.py.

    Raises OSError or ValueError if it is missing, broken, or of another kind of network.
    """
    config = read_json(path)
    rotary = config.get("rope_parameters") or config.get("rope_scaling") or {}
    for name, value, expected in (
        ("model_type", config.get("model_type"), "llama"),
        ("hidden_act", config.get("hidden_act", "silu"), "silu"),
        ("attention_bias", config.get("attention_bias", False), False),
        ("mlp_bias", config.get("mlp_bias", False), False),
        ("rope_type", rotary.get("rope_type", rotary.get("type", "default")), "default"),
    ):
        if value != expected:
            raise ValueError(f"its {name} is {value!r}, not {expected!r}")
    config.setdefault("rope_theta", rotary.get("rope_theta", 10_000.0))
    config.setdefault("num_key_value_heads", config.get("num_attention_heads"))
    config.setdefault("tie_word_embeddings", False)
    if "head_dim" not in config:
        config["head_dim"] = config["hidden_size"] // config["num_attention_heads"]
    missing = [theirs for theirs in SETTINGS.values() if theirs not in config]
    if missing:
        raise ValueError(f"it lacks {', '.join(missing)}")
    return {ours: config[theirs] for ours, theirs in SETTINGS.items()}
