"""GGUF files, written here by hand, and by the package `gguf` where it is installed."""

import json
import math
import struct

import numpy as np
import pytest
import safetensors.torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gpt as G
from inputs import gguf
from inputs.documents import learn_tokenizer
from inputs.text import make_tokenizer
from make_models import MODELS, SCALING, TEXT

COUNT = struct.Struct("<Q")
ARCHITECTURES = {"llama": "llama", "llama-tied": "llama", "llama-3": "llama",
                 "qwen-2": "qwen2", "qwen-3": "qwen3"}  # fmt: skip
NAMES = {  # of Hugging Face's files, and of GGUF
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "model.layers": "blk", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip


# A writer


def packed(text):
    return COUNT.pack(len(text.encode())) + text.encode()


def packed_value(value):
    """Pack a fact with its kind."""
    match value:
        case bool():
            return struct.pack("<I?", 7, value)
        case int():
            return struct.pack("<II", 4, value)
        case float():
            return struct.pack("<If", 6, value)
        case str():
            return struct.pack("<I", 8) + packed(value)
        case [str(), *_]:
            return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(packed, value))
        case _:
            return struct.pack(f"<IIQ{len(value)}i", 9, 5, len(value), *value)


def write_gguf(path, facts, tensors):
    """Write facts, and tensors as (kind, shape, bytes)."""
    content = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(facts))
    content += b"".join(packed(name) + packed_value(value) for name, value in facts.items())
    place = 0
    for name, (kind, shape, data) in tensors.items():
        content += packed(name) + struct.pack("<I", len(shape))
        content += struct.pack(f"<{len(shape)}Q", *reversed(shape)) + struct.pack(
            "<IQ", kind, place
        )
        place += len(data) + -len(data) % 32
    content += bytes(-len(content) % 32)
    for _, _, data in tensors.values():
        content += data + bytes(-len(data) % 32)
    path.write_bytes(content)


def facts_of_tokenizer(tokenizer, pre="smollm"):
    vocabulary = tokenizer.get_vocab()
    tokens = sorted(vocabulary, key=vocabulary.get)
    marks = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    model = json.loads(tokenizer.to_str())["model"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token in marks else 1 for token in tokens],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in model["merges"]] or ["Ġ Ġ"],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }


def facts_of_model(name):
    config = json.loads((MODELS / name / "config.json").read_bytes())
    family = ARCHITECTURES[name]
    facts = {
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.key_length": config["head_dim"],
        "rope.dimension_count": config["head_dim"],
        "rope.freq_base": config["rope_parameters"]["rope_theta"],
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
    }
    named = {f"{family}.{fact}": value for fact, value in facts.items()}
    return {"general.architecture": family} | named


def tensors_of_model(name):
    weights = safetensors.torch.load_file(MODELS / name / "model.safetensors")
    d_k = json.loads((MODELS / name / "config.json").read_bytes())["head_dim"]
    tensors = {}
    for theirs, W in weights.items():
        if ARCHITECTURES[name] == "llama" and ("q_proj" in theirs or "k_proj" in theirs):
            W = W.view(-1, 2, d_k // 2, W.shape[1]).transpose(1, 2).reshape(W.shape)
        for before, after in NAMES.items():
            theirs = theirs.replace(before, after)
        tensors[theirs] = (0, tuple(W.shape), W.contiguous().numpy().tobytes())
    if name == "llama-3":
        tensors["rope_freqs.weight"] = (0, (d_k // 2,), factors_of_llama_3(d_k).tobytes())
    return tensors


def factors_of_llama_3(d_k):
    """Return by how much each rotation is slowed down, as llama.cpp's converter writes it."""
    base, factor, low, high, context = (SCALING[name] for name in SCALING if name != "rope_type")
    factors = []
    for i in range(0, d_k, 2):
        length = 2 * math.pi * base ** (i / d_k)
        if length < context / high:
            factors.append(1)
        elif length > context / low:
            factors.append(factor)
        else:
            smooth = (context / length - low) / (high - low)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, "<f4")


def write_model(path, name="llama", facts=None, tensors=None):
    tokenizer = facts_of_tokenizer(make_tokenizer([TEXT], 264))
    write_gguf(
        path,
        facts_of_model(name) | tokenizer | (facts or {}),
        tensors_of_model(name) | (tensors or {}),
    )


# A whole model


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_file_gives_the_logits_of_transformers(name, tmp_path):
    write_model(tmp_path / "model.gguf", name)
    model, published = G.open_model(tmp_path)
    expected = safetensors.torch.load_file(MODELS / name / "expected.safetensors")
    logits = model(expected["tokens"])
    assert (logits - expected["logits"]).abs().max() <= 1e-5 * expected["logits"].abs().max()
    assert (published.mark, published.ends, published.template) == (1, {2}, None)


def test_a_file_names_its_ends_and_its_template(tmp_path):
    tokenizer = learn_tokenizer([TEXT], 264)
    facts = facts_of_tokenizer(tokenizer, "gpt-2")
    facts |= {"tokenizer.ggml.eot_token_id": 5, "tokenizer.chat_template": "{{ x }}"}
    write_model(tmp_path / "model.gguf", facts=facts)
    _, published = G.open_model(tmp_path / "model.gguf")
    assert (published.mark, published.ends, published.template) == (0, {2, 5}, "{{ x }}")
    write_model(tmp_path / "other.gguf")
    with pytest.raises(OSError, match=r"it holds 2 \.gguf files"):
        G.open_model(tmp_path)


# Its tokenizer


@settings(deadline=None, max_examples=50)
@given(st.text())
def test_the_tokenizer_is_the_one_that_was_written(text):
    expected = make_tokenizer([TEXT, "x = 1234  # ü\n\n"], 300)
    tokenizer = gguf.make_tokenizer(facts_of_tokenizer(expected))
    text += "<s> "
    assert tokenizer.encode(text).ids == expected.encode(text).ids
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


PIECES = {
    "gpt-2": ["I", "'", "LL", "Ġdon", "'t", "Ġpay", "Ġ12345", "!?", "ĊĊĠ", "Ġnow"],
    "smollm": ["I", "'", "LL", "Ġdon", "'t", "Ġpay", "Ġ", *"12345", "!?", "ĊĊĠ", "Ġnow"],
    "llama-bpe": ["I", "'LL", "Ġdon", "'t", "Ġpay", "Ġ", "123", "45", "!?ĊĊ", "Ġ", "Ġnow"],
    "qwen2": ["I", "'LL", "Ġdon", "'t", "Ġpay", "Ġ", *"12345", "!?ĊĊ", "Ġ", "Ġnow"],
}


@pytest.mark.parametrize("pre", PIECES)
def test_each_pre_tokenizer_cuts_in_its_own_way(pre):
    pieces = gguf.make_pre_tokenizer(pre).pre_tokenize_str("I'LL don't pay 12345!?\n\n  now")
    assert [piece for piece, _ in pieces] == PIECES[pre]


def test_pieces_are_cut_where_those_of_transformers_are():
    pytest.importorskip("transformers")
    from transformers.convert_slow_tokenizer import TikTokenConverter
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    assert PRETOKENIZE_REGEX == gguf.QWEN_2
    assert TikTokenConverter().pattern == gguf.LLAMA_3


def test_a_word_of_llama_3_that_is_a_token_needs_no_merges():
    facts = facts_of_tokenizer(learn_tokenizer([TEXT], 264), "llama-bpe")
    facts["tokenizer.ggml.tokens"].append("Ġwonderful")
    facts["tokenizer.ggml.token_type"].append(1)
    assert gguf.make_tokenizer(facts).encode(" wonderful").ids == [264]
    facts["tokenizer.ggml.pre"] = "qwen2"
    assert len(gguf.make_tokenizer(facts).encode(" wonderful").ids) > 1
    assert gguf.make_tokenizer(facts).normalizer is not None


def test_a_mark_in_a_text_is_text_and_what_a_user_defined_is_one_token():
    facts = facts_of_tokenizer(learn_tokenizer([TEXT], 264))
    facts["tokenizer.ggml.tokens"] += ["<think>"]
    facts["tokenizer.ggml.token_type"] += [4]
    tokenizer = gguf.make_tokenizer(facts)
    ids = tokenizer.encode("<|endoftext|><think>").ids
    assert ids[-1] == 264 and 0 not in ids and len(ids) > 3
    assert tokenizer.decode([0, *ids]) == "<|endoftext|><think>"


# Its weights


SCALES = st.floats(-8, 8, width=16)


def halves_of(data):
    return [byte & 15 for byte in data] + [byte >> 4 for byte in data]


BLOCKS = {  # of each kind: the numbers of one, in its own scalar way
    2: lambda block, scale: [(q - 8) * scale for q in halves_of(block[2:])],
    3: lambda block, scale: [
        q * scale + struct.unpack("<e", block[2:4])[0] for q in halves_of(block[4:])
    ],
    8: lambda block, scale: [q * scale for q in struct.unpack("<32b", block[2:])],
}


@pytest.mark.parametrize("number", BLOCKS)
@settings(deadline=None, max_examples=30)
@given(data=st.data())
def test_blocks_are_dequantized_as_one_by_one(number, data):
    kind = gguf.KINDS[number]
    blocks = []
    for _ in range(4):
        scales = struct.pack("<2e", data.draw(SCALES), data.draw(SCALES))
        bits = data.draw(st.binary(min_size=kind.size, max_size=kind.size))
        head = 4 if number == 3 else 2
        blocks.append(scales[:head] + bits[head:])
    expected = [BLOCKS[number](block, struct.unpack("<e", block[:2])[0]) for block in blocks]
    content = np.frombuffer(b"".join(blocks), np.uint8)
    found = gguf.decode(content, kind, (2, 64))
    np.testing.assert_allclose(found, np.reshape(expected, (2, 64)), rtol=1e-6, atol=1e-6)


def test_the_package_gguf_writes_and_reads_the_same(tmp_path):
    theirs = pytest.importorskip("gguf")
    W = np.random.default_rng(0).normal(size=(3, 64)).astype(np.float32)
    kinds = theirs.GGMLQuantizationType
    writer = theirs.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_array("tokenizer.ggml.tokens", ["a", "ü"])
    writer.add_float32("llama.rope.freq_base", 5.0)
    for kind in (kinds.F32, kinds.F16, kinds.Q4_0, kinds.Q4_1, kinds.Q8_0):
        content = theirs.quantize(W, kind)
        writer.add_tensor(kind.name, content, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    facts, tensors = gguf.open_gguf(tmp_path / "x.gguf")
    assert facts["tokenizer.ggml.tokens"] == ["a", "ü"]
    assert facts["llama.rope.freq_base"] == 5
    read = theirs.GGUFReader(tmp_path / "x.gguf").tensors
    assert [tensor.name for tensor in read] == list(tensors)
    for tensor in read:
        expected = theirs.dequantize(tensor.data, tensor.tensor_type)
        found = tensors[tensor.name]
        assert found.shape == (3, 64)
        np.testing.assert_allclose(found.read(), expected, rtol=1e-6, atol=1e-6)
        assert np.abs(found.read().numpy() - W).max() < 0.5


# What is broken, foreign or hostile


FACTS = {
    "architecture": ({"general.architecture": "gemma"}, "architecture is 'gemma'"),
    "no architecture": ({"general.architecture": 7}, "architecture is 7"),
    "window": ({"llama.attention.sliding_window": 8}, "attention.sliding_window is 8"),
    "experts": ({"llama.expert_count": 8}, "expert_count is 8"),
    "YaRN": ({"llama.rope.scaling.type": "yarn"}, "rope.scaling.type is 'yarn'"),
    "linear": ({"llama.rope.scale_linear": 2.0}, "rope.scale_linear is 2.0"),
    "part": ({"llama.rope.dimension_count": 2}, "rope.dimension_count is 2, not 4"),
    "heads": ({"llama.attention.head_count": [4]}, "num_heads is array"),
    "width": ({"llama.embedding_length": 1 << 15}, "other sizes"),
    "layers": ({"llama.block_count": 1 << 31}, "num_layers is 2147483648"),
    "biases": ({"general.architecture": "qwen2"}, "it lacks embedding_length, block_count"),
    "model": ({"tokenizer.ggml.model": "llama"}, "tokenizer.ggml.model is 'llama'"),
    "pieces": ({"tokenizer.ggml.pre": "tekken"}, "tokenizer.ggml.pre is 'tekken'"),
    "twice": ({"tokenizer.ggml.tokens": ["a", "a"]}, "a token twice"),
    "no tokens": ({"tokenizer.ggml.tokens": 1}, "it lacks tokenizer.ggml.tokens"),
    "types": ({"tokenizer.ggml.token_type": [1]}, "longer|shorter"),
    "merges": ({"tokenizer.ggml.merges": ["a"]}, "unpack"),
    "alignment": ({"general.alignment": 0}, "alignment is 0"),
    "far": ({"general.alignment": 1 << 31}, "ends too early"),
    "mark": ({"tokenizer.ggml.bos_token_id": 1 << 31}, "begins a text"),
}  # fmt: skip


@pytest.mark.parametrize("kind", FACTS)
def test_facts_that_are_not_known_are_refused_by_name(kind, tmp_path):
    facts, message = FACTS[kind]
    path = tmp_path / "model.gguf"
    write_model(path, facts=facts)
    with pytest.raises(OSError, match=message) as error:
        G.open_model(path)
    assert str(error.value).startswith(f"not a language model that this script can open: {path}: ")
    assert "\n" not in str(error.value)


MUCH = 1 << 40
FLAT = (0, (8,), bytes(32))
TENSORS = {
    "kind": ((12, (8,), bytes(32)), "x is of kind 12: not F32"),
    "dimensions": ((0, (1,) * 5, bytes(32)), "x has 5 dimensions"),
    "none": ((0, (), bytes(32)), "x has 0 dimensions"),
    "half a block": ((2, (2, 16), bytes(32)), "no whole blocks"),
    "a terabyte": ((0, (MUCH, MUCH), bytes(32)), "larger than the file"),
    "unknown": (FLAT, "unknown are x"),
    "frequencies": (FLAT, r"rope_freqs\.weight is of shape \(8,\)"),
    "zero": ((0, (2,), bytes(32)), "not all are positive numbers"),
}  # fmt: skip


@pytest.mark.parametrize("kind", TENSORS)
def test_tensors_that_are_not_known_are_refused_by_name(kind, tmp_path):
    tensor, message = TENSORS[kind]
    name = "rope_freqs.weight" if kind in ("frequencies", "zero") else "x"
    write_model(tmp_path / "model.gguf", tensors={name: tensor})
    with pytest.raises(OSError, match=message):
        G.open_model(tmp_path)


HEAD = b"GGUF" + struct.pack("<IQQ", 3, 0, 1)
HOSTILE = {
    "empty": (b"", "empty"),
    "foreign": (b"PK\3\4" + bytes(40), "no GGUF file"),
    "version": (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version is 1"),
    "tensors": (b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 0), "more than any model"),
    "fewer tensors": (b"GGUF" + struct.pack("<IQQ", 3, 1 << 20, 0), "ends too early"),
    "facts": (b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 63), "more than any model"),
    "a name": (HEAD + COUNT.pack(1 << 62), "ends too early"),
    "an array": (HEAD + packed("a") + struct.pack("<IIQ", 9, 12, 1 << 61), "more than any"),
    "numbers": (HEAD + packed("a") + struct.pack("<IIQ", 9, 12, 1 << 20), "ends too early"),
    "texts": (HEAD + packed("a") + struct.pack("<IIQ", 9, 8, 1 << 20), "ends too early"),
    "nested": (HEAD + packed("a") + struct.pack("<IIQ", 9, 9, 1) * 99, "unknown kind 9"),
    "a kind": (HEAD + packed("a") + struct.pack("<I", 13), "unknown kind 13"),
}  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_file_is_refused_before_memory_is_taken(kind, tmp_path):
    content, message = HOSTILE[kind]
    (tmp_path / "model.gguf").write_bytes(content)
    with pytest.raises(OSError, match=message):
        G.open_model(tmp_path)


def test_tensors_may_not_share_their_bytes(tmp_path):
    heads = [gguf.Head(name, (8,), gguf.KINDS[0], 32, 0) for name in "ab"]
    with pytest.raises(ValueError, match="larger than the file"):
        gguf.locate(heads, np.zeros(63, np.uint8))
    with pytest.raises(ValueError, match="beyond its end"):
        gguf.locate([heads[0]._replace(place=1 << 62)], np.zeros(64, np.uint8))
    with pytest.raises(ValueError, match="a twice"):
        gguf.locate([heads[0], heads[0]], np.zeros(64, np.uint8))


@settings(deadline=None, max_examples=60)
@given(st.integers(0), st.binary(min_size=1, max_size=8))
def test_any_damage_ends_in_a_line_or_in_a_network(whole, place, damage):
    content = bytearray(whole.read_bytes())
    place %= len(content)
    content[place : place + len(damage)] = damage
    path = whole.with_name("damaged.gguf")
    for damaged in (content, content[:place]):
        path.write_bytes(damaged)
        try:
            G.open_model(path)
        except OSError as error:
            assert "\n" not in str(error)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "model.gguf"
    write_model(path)
    return path
