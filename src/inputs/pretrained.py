"""Published language models: folders as Hugging Face's `transformers` has them, and GGUF files.

gpt.py makes the network; the explorer uses `Texts`, too. A folder has config.json,
model.safetensors, tokenizer.json and tokenizer_config.json. Settings and tensors have other names
there than in gpt.py, and still others in a GGUF file.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import safetensors
import torch
from tokenizers import Tokenizer
from torch import Tensor

from inputs.documents import MARK, MARK_ID
from inputs.gguf import Stored, make_tokenizer, open_gguf
from inputs.text import open_tokenizer

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")  # config.json calls SmolLM2 a llama
FLOATS = ("F32", "F16", "BF16")
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
GGUF_SETTINGS = {  # of gpt.py, and of a GGUF file, after the name of the architecture
    "d_model": "embedding_length",
    "num_layers": "block_count",
    "num_heads": "attention.head_count",
    "num_kv_heads": "attention.head_count_kv",
    "d_k": "attention.key_length",
    "d_ff": "feed_forward_length",
    "context": "context_length",
    "theta": "rope.freq_base",
    "epsilon": "attention.layer_norm_rms_epsilon",
}
GGUF_TENSORS = {
    "embedding.": "token_embd.",
    "layers.": "blk.",
    ".norm1.": ".attn_norm.",
    ".attention.W_q.": ".attn_q.",
    ".attention.W_k.": ".attn_k.",
    ".attention.W_v.": ".attn_v.",
    ".attention.W_o.": ".attn_output.",
    ".attention.norm_q.": ".attn_q_norm.",
    ".attention.norm_k.": ".attn_k_norm.",
    ".norm2.": ".ffn_norm.",
    ".feed_forward.W_gate.": ".ffn_gate.",
    ".feed_forward.W_up.": ".ffn_up.",
    ".feed_forward.W_down.": ".ffn_down.",
    "norm.": "output_norm.",
    "to_logits.": "output.",
}
GGUF_MARKS = {  # what chat templates call marks, and where a GGUF file has their numbers
    "bos_token": "tokenizer.ggml.bos_token_id",
    "eos_token": "tokenizer.ggml.eos_token_id",
    "unk_token": "tokenizer.ggml.unknown_token_id",
}
SCALING = (  # of config.json, in the order of gpt.py's Scaling
    "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Texts:
    """How texts become the tokens of a network, and where they begin and end."""

    tokenizer: Tokenizer
    mark: int  # stands before each document
    ends: frozenset[int]  # tokens, each of which ends a text
    template: str | None  # how a talk becomes a text, for jinja2
    names: dict[str, str]  # of marks in the template, such as bos_token, with the marks


@dataclass(frozen=True, kw_only=True)
class Published(Texts):
    """A model as its files describe it. Its weights are not read yet."""

    settings: dict[str, Any]  # by the names of gpt.py's Sizes
    tensors: dict[str, Stored]  # by the names of gpt.py
    crc32: str | None = None  # of the tensors, where gpt.py has saved them


def rename(name: str, names: Iterable[tuple[str, str]]) -> str:
    """Return the name of a tensor with its parts replaced, each before by the one after."""
    for before, after in names:
        if name.startswith(before) or (before.startswith(".") and before in name):
            name = name.replace(before, after)
    return name


def published_name(name: str) -> str:
    """Return the name that a tensor of gpt.py has in model.safetensors."""
    return rename(name, TENSORS.items())


def named_as_ours(tensors: Mapping[str, Stored], names: Mapping[str, str]) -> dict[str, Stored]:
    """Return tensors by their names in gpt.py; one that has none there keeps its own."""
    pairs = [(theirs, ours) for ours, theirs in names.items()]
    found = {rename(name, pairs): stored for name, stored in tensors.items()}
    if len(found) < len(tensors):
        raise ValueError("two of its tensors have the same meaning")
    return found


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Turn every error into a ValueError that names the file, which can fail in many ways."""
    try:
        yield
    except MemoryError:  # says nothing of the file
        raise
    except Exception as error:
        known = isinstance(error, OSError | ValueError)
        reason = str(error) if known else "it is broken, or from another program"
        if isinstance(error, FileNotFoundError):
            reason = "there is no such file"
        raise ValueError(f"{path.name}: {reason}") from error


def own_texts(tokenizer: Tokenizer) -> Texts:
    """Return what belongs to a tokenizer that was learned here."""
    return Texts(
        tokenizer=tokenizer,
        mark=MARK_ID,
        ends=frozenset({MARK_ID}),
        template=None,
        names={"bos_token": MARK, "eos_token": MARK},
    )


def find_family(settings: Mapping[str, Any]) -> tuple[str, str]:
    """Return the model_type of a network, and its class in `transformers`."""
    if settings["qkv_bias"]:
        return "qwen2", "Qwen2ForCausalLM"
    if settings["qk_norm"]:
        return "qwen3", "Qwen3ForCausalLM"
    return "llama", "LlamaForCausalLM"


def make_rotation(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return rope_parameters. Raises OSError if they can't say how frequencies are scaled."""
    if settings["factors"] is not None:
        raise OSError("its frequencies are scaled one by one, by GGUF: config.json can't say that")
    found = {"rope_type": "default", "rope_theta": settings["theta"]}
    if settings["scaling"] is not None:
        found["rope_type"] = "llama3"
        found |= zip(SCALING, settings["scaling"], strict=True)
    return found


def make_config(settings: Mapping[str, Any], texts: Texts) -> bytes:
    """Return config.json of a network with these settings, by the names of gpt.py's Sizes."""
    family, architecture = find_family(settings)
    ends = sorted(texts.ends | {texts.mark})
    config = {theirs: settings[ours] for ours, theirs in SETTINGS.items()} | {
        "architectures": [architecture],
        "model_type": family,
        "hidden_act": "silu",
        "attention_bias": settings["qkv_bias"],
        "mlp_bias": False,
        "rope_parameters": make_rotation(settings),
        "bos_token_id": texts.mark,
        "eos_token_id": ends[0] if len(ends) == 1 else ends,
        "dtype": "float32",
    }
    return json.dumps(config, indent=2).encode()


def make_tokenizer_config(texts: Texts, context: int) -> bytes:
    """Return tokenizer_config.json."""
    config = texts.names | {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
    }
    if texts.template is not None:
        config["chat_template"] = texts.template
    return json.dumps(config, indent=2).encode()


def read_json(path: Path) -> dict[str, Any]:
    """Read an object of a JSON file. Raises OSError or ValueError if there is none."""
    found = json.loads(path.read_bytes())
    if not isinstance(found, dict):
        raise ValueError("it is no JSON object")
    return found


def read_optional_json(path: Path) -> dict[str, Any]:
    """Read an object of a JSON file; return an empty one if there is no such file."""
    with naming(path):
        return read_json(path) if path.exists() else {}


def read_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings in config.json by their names in gpt.py.

    Raises ValueError if some are missing, or it is of another kind of network.
    """
    family = config.get("model_type")
    if family not in FAMILIES:
        raise ValueError(f"its model_type is {family!r}, not one of {', '.join(FAMILIES)}")
    require(config, {"hidden_act": "silu", "mlp_bias": False})
    if family != "qwen2":  # which has biases of q, k and v, whatever its file says
        require(config, {"attention_bias": False})
    refuse_windows(config, family)
    found = find_settings(config, SETTINGS) | read_rotation(config)
    found["tied"] = bool(found.get("tied"))
    if family == "llama":
        found.setdefault("num_kv_heads", found.get("num_heads"))
    if family == "qwen3":
        found.setdefault("d_k", 128)
    return complete(found, SETTINGS, family)


def require(found: Mapping[str, Any], expected: Mapping[str, Any], prefix: str = "") -> None:
    """Raise ValueError if a value is there, and is not the expected one."""
    for name, value in expected.items():
        other = found.get(prefix + name, value)
        if other != value:
            raise ValueError(f"its {name} is {other!r}, not {value!r}")


def find_settings(
    found: Mapping[str, Any], names: Mapping[str, str], prefix: str = ""
) -> dict[str, Any]:
    """Return the settings that are there, by their names in gpt.py."""
    settings = {ours: found.get(prefix + theirs) for ours, theirs in names.items()}
    return {name: value for name, value in settings.items() if value is not None}


def complete(settings: dict[str, Any], names: Mapping[str, str], family: str) -> dict[str, Any]:
    """Return settings with those that follow from others. Raises ValueError if some are missing."""
    missing = [names[name] for name in names if name not in settings and name != "d_k"]
    if missing:
        raise ValueError(f"it lacks {', '.join(missing)}")
    if "d_k" not in settings:
        settings["d_k"] = settings["d_model"] // settings["num_heads"]
    return settings | {"qkv_bias": family == "qwen2", "qk_norm": family == "qwen3"}


def refuse_windows(config: Mapping[str, Any], family: str) -> None:
    """Raise ValueError if attention is cut to a window, or the feed-forward network to experts."""
    window = config.get("sliding_window", 4096 if family == "mistral" else None)
    if family.startswith("qwen") and not config.get("use_sliding_window"):
        window = None
    if window is not None or "sliding_attention" in (config.get("layer_types") or ()):
        raise ValueError(f"its sliding_window is {window!r}, which this script doesn't have")
    for name in ("num_experts", "num_local_experts"):
        if config.get(name):
            raise ValueError(f"its {name} is {config[name]!r}: this script has no experts")


def read_rotation(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return theta, and scaling where there is one; both have had several places in config.json."""
    places = [config[name] for name in ("rope_parameters", "rope_scaling") if config.get(name)]
    if len(places) == 2 and places[0] != places[1]:
        raise ValueError(f"its rope_parameters are {places[0]}, and its rope_scaling {places[1]}")
    rotary = places[0] if places else {}
    theta = float(config.get("rope_theta", rotary.get("rope_theta", 10_000.0)))
    if rotary.get("rope_theta", theta) != theta:
        raise ValueError(f"its rope_theta is {theta!r}, and also {rotary['rope_theta']!r}")
    kind = rotary.get("rope_type", rotary.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise ValueError(f"its rope_type is {kind!r}, not 'default' or 'llama3'")
    share = rotary.get("partial_rotary_factor", config.get("partial_rotary_factor", 1))
    if share != 1:
        raise ValueError(f"its partial_rotary_factor is {share!r}, not 1")
    if kind == "default":
        return {"theta": theta}
    missing = [name for name in SCALING if name not in rotary]
    if missing:
        raise ValueError(f"its scaling lacks {', '.join(missing)}")
    scaling = positive(rotary[name] for name in SCALING)
    _, low, high, _ = scaling
    if low >= high:
        raise ValueError(f"its low_freq_factor {low} is not below its high_freq_factor {high}")
    return {"theta": theta, "scaling": scaling}


def positive(values: Iterable[Any]) -> tuple[float, ...]:
    """Return numbers by which something is scaled."""
    found = tuple(values)
    if not all(isinstance(each, int | float) and 0 < each < 1e9 for each in found):
        raise ValueError(f"its rotations are scaled by {found}: not all are positive numbers")
    return found


def open_shard(path: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """Open a .safetensors file: its tensors, and what it says about them."""
    if path.exists() and not path.is_file():
        raise ValueError("not a plain file")
    file = safetensors.safe_open(path, "pt")
    tensors = {}
    for name in file.keys():  # noqa: SIM118 - it is no mapping
        part = file.get_slice(name)
        if part.get_dtype() not in FLOATS:
            raise ValueError(f"{name} is {part.get_dtype()}, not one of {', '.join(FLOATS)}")
        tensors[name] = Stored(tuple(part.get_shape()), partial(read_tensor, file, name))
    return tensors, file.metadata() or {}


def read_tensor(file: Any, name: str) -> Tensor:
    """Return a copy of a tensor in float32: the file may change later."""
    return file.get_tensor(name).to(torch.float32, copy=True)


def open_weights(folder: Path) -> tuple[dict[str, Stored], str | None]:
    """Open model.safetensors, or the files that model.safetensors.index.json names.

    Return the tensors by the names that they have there, and their checksum, if there is one.
    """
    path = folder / "model.safetensors"
    index = folder / "model.safetensors.index.json"
    if path.exists() or not index.exists():
        with naming(path):
            tensors, about = open_shard(path)
        return tensors, about.get("crc32")
    with naming(index):
        names = sorted({str(name) for name in read_json(index)["weight_map"].values()})
        if any(Path(name).name != name for name in names):
            raise ValueError("it names files in other folders")
    tensors = {}
    for name in names:
        with naming(folder / name):
            found, _ = open_shard(folder / name)
            if tensors.keys() & found.keys():
                raise ValueError("it repeats tensors of another file")
            tensors |= found
    return tensors, None


def drop_copy(tensors: dict[str, Stored]) -> None:
    """Drop the output's weights, which have to be those of the embedding: the two are tied."""
    output = tensors.pop("to_logits.weight", None)
    if output is None or "embedding.weight" not in tensors:
        return
    embedding = tensors["embedding.weight"]
    if output.shape != embedding.shape or not torch.equal(output.read(), embedding.read()):
        raise ValueError("tie_word_embeddings is true, but lm_head.weight is another matrix")


def open_folder(folder: Path) -> Published:
    """Open a folder in Hugging Face's format."""
    with naming(folder / "config.json"):
        config = read_json(folder / "config.json")
        settings = read_config(config)
    stored, crc32 = open_weights(folder)
    tensors = named_as_ours(stored, TENSORS)
    for name in [name for name in tensors if name.endswith("rotary_emb.inv_freq")]:
        del tensors[name]  # follows from theta
    if settings["tied"]:
        drop_copy(tensors)
    with naming(folder / "tokenizer.json"):
        tokenizer = open_plain_tokenizer(folder / "tokenizer.json")
    about = read_optional_json(folder / "tokenizer_config.json")
    generation = read_optional_json(folder / "generation_config.json")
    names = read_names(about)
    return Published(
        settings=settings,
        tensors=tensors,
        tokenizer=tokenizer,
        mark=find_mark(tokenizer, config.get("bos_token_id"), names.get("bos_token")),
        ends=find_ends(config.get("eos_token_id"), generation.get("eos_token_id")),
        template=read_template(folder / "chat_template.jinja", about.get("chat_template")),
        names=names,
        crc32=crc32,
    )


def open_plain_tokenizer(path: Path) -> Tokenizer:
    """Open a tokenizer, but let it add nothing to a text, and cut nothing off."""
    content = path.read_text(encoding="utf-8")
    kind = json.loads(content)["model"].get("type", "BPE")
    if kind != "BPE":
        raise ValueError(f"its model is {kind!r}, not 'BPE'")
    tokenizer = open_tokenizer(content)
    tokenizer.model.dropout = None  # which would cut a text at random
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if tokenizer.num_special_tokens_to_add(False):
        tokenizer.post_processor = None
    return tokenizer


def find_mark(tokenizer: Tokenizer, number: Any, token: Any = None) -> int:
    """Return the token that stands before each document: <|endoftext|>, or else the one named.

    Qwen's and SmolLM2's files name none, or the one that begins a turn of a talk.
    """
    found = tokenizer.token_to_id(MARK)
    if found is None:
        found = number
    if found is None and isinstance(token, str):
        found = tokenizer.token_to_id(token)
    if type(found) is not int or found < 0 or tokenizer.id_to_token(found) is None:
        raise ValueError(f"it has neither {MARK} nor another token that begins a text")
    return found


def find_ends(*named: Any) -> frozenset[int]:
    """Return the tokens that end a text; each argument is one, a list of some, or None."""
    lists = [each if isinstance(each, list) else [each] for each in named if each is not None]
    ends = [end for each in lists for end in each]
    if not all(type(end) is int for end in ends):
        raise ValueError(f"its eos_token_id is {ends!r}")
    return frozenset(ends)


def read_names(about: Mapping[str, Any]) -> dict[str, str]:
    """Return the marks that tokenizer_config.json names; some come with their properties."""
    marks = {name: about.get(name) for name in GGUF_MARKS}
    found = {name: x.get("content") if isinstance(x, dict) else x for name, x in marks.items()}
    return {name: mark for name, mark in found.items() if isinstance(mark, str)}


def read_template(path: Path, template: Any) -> str | None:
    """Return the chat template: that of chat_template.jinja, or else the given one."""
    if path.exists():
        with naming(path):
            return path.read_text(encoding="utf-8")
    if isinstance(template, list):  # of several, by their names
        template = next((each["template"] for each in template if each["name"] == "default"), None)
    return template if isinstance(template, str) else None


def read_facts(facts: Mapping[str, Any], tensors: Mapping[str, Stored]) -> dict[str, Any]:
    """Return the settings in a GGUF file by their names in gpt.py.

    Raises ValueError if some are missing, or it is of another kind of network.
    """
    family = facts.get("general.architecture")
    if family not in ("llama", "qwen2", "qwen3"):
        raise ValueError(f"its architecture is {family!r}, not llama, qwen2 or qwen3")
    require(
        facts,
        {
            "attention.sliding_window": 0,
            "expert_count": 0,
            "rope.scaling.type": "none",
            "rope.scaling.factor": 1,
            "rope.scale_linear": 1,
        },
        f"{family}.",
    )
    if "token_embd.weight" not in tensors:
        raise ValueError("it lacks token_embd.weight")
    found = {"theta": 10_000.0} | find_settings(facts, GGUF_SETTINGS, f"{family}.")
    found.setdefault("num_kv_heads", found.get("num_heads"))
    found["vocab_size"] = tensors["token_embd.weight"].shape[0]
    found["tied"] = "output.weight" not in tensors
    found = complete(found, GGUF_SETTINGS, family)
    require(facts, {"rope.dimension_count": found["d_k"]}, f"{family}.")
    return found


def put_halves(stored: Stored, d_k: int) -> Stored:
    """Return W_q or W_k with the partners that are turned together half a head apart.

    llama.cpp makes them neighbors where the architecture is llama.
    """

    def read() -> Tensor:
        W = stored.read()
        return W.view(-1, d_k // 2, 2, *W.shape[1:]).transpose(1, 2).reshape(W.shape)

    return Stored(stored.shape, read)


def open_file(path: Path) -> Published:
    """Open a GGUF file."""
    with naming(path):
        facts, stored = open_gguf(path)
        settings = read_facts(facts, stored)
        factors = stored.pop("rope_freqs.weight", None)
        if factors is not None:
            if factors.shape != (settings["d_k"] // 2,):
                raise ValueError(f"its rope_freqs.weight is of shape {factors.shape}")
            settings["factors"] = positive(factors.read().tolist())
        tensors = named_as_ours(stored, GGUF_TENSORS)
        if facts["general.architecture"] == "llama":
            for name, each in tensors.items():
                if name.endswith((".W_q.weight", ".W_k.weight")):
                    tensors[name] = put_halves(each, settings["d_k"])
        tokenizer = make_tokenizer(facts)
        template = facts.get("tokenizer.chat_template")
        numbers = {name: facts.get(key) for name, key in GGUF_MARKS.items()}
        marks = {name: tokenizer.id_to_token(i) for name, i in numbers.items() if type(i) is int}
        return Published(
            settings=settings,
            tensors=tensors,
            tokenizer=tokenizer,
            mark=find_mark(tokenizer, facts.get("tokenizer.ggml.bos_token_id")),
            ends=find_ends(
                *(facts.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot"))
            ),
            template=template if isinstance(template, str) else None,
            names={name: mark for name, mark in marks.items() if mark is not None},
        )


def open_published(path: Path) -> Published:
    """Open a folder in Hugging Face's format, a folder with one .gguf file, or such a file.

    Raises ValueError if something is missing or broken, or of another kind of network.
    """
    if path.is_file():
        return open_file(path)
    files = sorted(path.glob("*.gguf"))
    if not files or any(path.glob("model.safetensors*")):
        return open_folder(path)
    if len(files) > 1:
        raise ValueError(f"it holds {len(files)} .gguf files; name one of them")
    return open_file(files[0])
