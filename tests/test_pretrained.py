"""Folders of the families that gpt.py opens, beside what `transformers` makes of them."""

import json
import math
import shutil

import pytest
import safetensors.torch
import torch
from tokenizers.processors import TemplateProcessing

import gpt as G
from inputs.documents import MARK, MARK_ID, learn_tokenizer
from inputs.pretrained import published_name, read_config
from make_models import FOLDERS, MODELS, SCALING, SIZES, TEXT, assert_close, draw_weights, loss_of


@pytest.mark.parametrize("name", FOLDERS)
def test_each_family_gives_the_logits_gradients_and_text_of_transformers(name):
    model, _ = G.open_model(MODELS / name)
    expected = safetensors.torch.load_file(MODELS / name / "expected.safetensors")
    logits = model(expected["tokens"])
    assert_close(logits, expected["logits"])
    loss_of(logits).backward()
    for name, parameter in model.named_parameters():
        assert_close(parameter.grad, expected[f"gradient of {published_name(name)}"])
    assert len(expected) == 3 + len(list(model.parameters()))
    length = expected["tokens"].shape[1]
    written = model(expected["written"])[0, length - 1 : -1].argmax(dim=-1)
    assert written.tolist() == expected["written"][0, length:].tolist()


FAMILIES = {
    "Llama": ("Llama", {}),
    "Llama 3": ("Llama", {"rope_parameters": SCALING}),
    "Mistral": ("Mistral", {"sliding_window": None}),
    "Qwen 2": ("Qwen2", {}),
    "Qwen 3": ("Qwen3", {}),
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
@pytest.mark.parametrize("name", FAMILIES)
def test_logits_and_gradients_are_those_of_transformers(name, num_kv_heads, tied, tmp_path):
    transformers = pytest.importorskip("transformers")
    family, changes = FAMILIES[name]
    changes = changes | {"num_key_value_heads": num_kv_heads, "tie_word_embeddings": tied}
    config = getattr(transformers, f"{family}Config")(**SIZES | {"head_dim": 8} | changes)
    theirs = draw_weights(getattr(transformers, f"{family}ForCausalLM")(config))
    theirs.save_pretrained(tmp_path)
    shutil.copy(MODELS / "llama" / "tokenizer.json", tmp_path)
    ours, _ = G.open_model(tmp_path)
    tokens = torch.randint(SIZES["vocab_size"], (3, 60))  # far beyond the context of SCALING
    logits, expected = ours(tokens), theirs(tokens).logits
    assert_close(logits, expected)
    loss_of(logits).backward()
    loss_of(expected).backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    assert len(gradients) == len(list(ours.parameters()))
    for name, parameter in ours.named_parameters():
        assert_close(parameter.grad, gradients[published_name(name)])


# Other ways to save the same


@pytest.fixture
def folder(tmp_path):
    """A copy of a small folder, to be changed."""
    return shutil.copytree(MODELS / "llama-tied", tmp_path / "model")


def change(path, **changes):
    found = json.loads(path.read_bytes()) if path.exists() else {}
    path.write_text(json.dumps(found | changes))


def change_weights(folder, edit):
    path = folder / "model.safetensors"
    weights = safetensors.torch.load_file(path)
    edit(weights)
    safetensors.torch.save_file(weights, path)


def logits_of(path):
    model, _ = G.open_model(path)
    return model(torch.arange(12).view(2, 6))


def test_weights_may_lie_in_several_files(folder):
    expected = logits_of(folder)
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {name: f"part-{n % 2}.safetensors" for n, name in enumerate(weights)}
    for file in set(weight_map.values()):
        part = {name: weights[name] for name in weights if weight_map[name] == file}
        safetensors.torch.save_file(part, folder / file)
    change(folder / "model.safetensors.index.json", weight_map=weight_map)
    assert torch.equal(logits_of(folder), expected)
    shutil.copy(folder / "part-0.safetensors", folder / "part-1.safetensors")
    with pytest.raises(OSError, match=r"part-1\.safetensors: it repeats tensors"):
        G.open_model(folder)
    change(folder / "model.safetensors.index.json", weight_map={"x": "../part-0.safetensors"})
    with pytest.raises(OSError, match="files in other folders"):
        G.open_model(folder)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_may_have_16_bits(folder, dtype):
    rounded = {}

    def halve(weights):
        for name, tensor in weights.items():
            weights[name] = tensor.to(dtype)
            rounded[name] = weights[name].float()

    change_weights(folder, halve)
    model, _ = G.open_model(folder)
    found = G.published_weights(model)
    assert found.keys() == rounded.keys()
    assert all(torch.equal(found[name], rounded[name]) for name in rounded)


def test_a_tied_output_and_frequencies_may_be_saved_too(folder):
    expected = logits_of(folder)

    def repeat(weights):
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
        weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(2)

    change_weights(folder, repeat)
    assert torch.equal(logits_of(folder), expected)
    change_weights(folder, lambda weights: weights["lm_head.weight"][1].add_(1))
    with pytest.raises(OSError, match=r"lm_head\.weight is another matrix"):
        G.open_model(folder)


@pytest.mark.parametrize("name", ["type", "rope_type"])
def test_rotations_have_had_several_places(name):
    config = json.loads((MODELS / "llama-3" / "config.json").read_bytes())
    expected = read_config(config)
    assert expected["theta"] == 50
    assert expected["scaling"] == (8.0, 0.05, 0.5, 4)
    scaling = config.pop("rope_parameters")
    config["rope_theta"] = scaling.pop("rope_theta")
    kind = scaling.pop("rope_type")
    assert read_config(config | {"rope_scaling": scaling | {name: kind}}) == expected
    plain = read_config(config | {"rope_scaling": None})
    assert plain == {name: x for name, x in expected.items() if name != "scaling"}


def test_what_a_config_leaves_out_is_what_transformers_assumes():
    config = json.loads((MODELS / "qwen-3" / "config.json").read_bytes())
    for name in ("head_dim", "tie_word_embeddings", "rope_parameters", "layer_types"):
        del config[name]
    found = read_config(config)
    assert (found["d_k"], found["tied"], found["theta"]) == (128, False, 10_000)
    del config["num_key_value_heads"]
    found = read_config(config | {"model_type": "llama"})
    assert (found["d_k"], found["num_kv_heads"]) == (2, 4)
    with pytest.raises(ValueError, match="sliding_window is 4096"):
        read_config({name: x for name, x in config.items() if name != "sliding_window"} | MISTRAL)


MISTRAL = {"model_type": "mistral"}
REFUSED = {
    "window": (MISTRAL | {"sliding_window": 8}, "sliding_window is 8"),
    "window of Qwen": (
        {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 8},
        "sliding_window is 8",
    ),
    "some layers": ({"layer_types": ["sliding_attention"]}, "sliding_window"),
    "experts": ({"num_local_experts": 8}, "num_local_experts is 8"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    "biases": ({"model_type": "qwen3", "attention_bias": True}, "attention_bias is True"),
    "more biases": ({"mlp_bias": True}, "mlp_bias is True"),
    "mixtral": ({"model_type": "mixtral"}, "model_type is 'mixtral'"),
    "YaRN": ({"rope_scaling": {"type": "yarn"}, "rope_parameters": None}, "rope_type is 'yarn'"),
    "half scaled": ({"rope_parameters": {"rope_type": "llama3"}}, "scaling lacks factor, low"),
    "a word": ({"rope_parameters": SCALING | {"factor": "8"}}, "not all are positive numbers"),
    "crossed": (
        {"rope_parameters": SCALING | {"low_freq_factor": 1}, "rope_theta": 50.0},
        "low_freq_factor 1 is not below",
    ),
    "part": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    "an endless base": ({"rope_theta": float("inf"), "rope_parameters": None}, "theta is inf"),
    "a huge base": ({"rope_theta": 10**400, "rope_parameters": None}, "config.json: it is broken"),
    "two scalings": (
        {"rope_scaling": {"type": "yarn", "factor": 4.0}},
        r"rope_parameters are \{.*\}, and its rope_scaling \{'type': 'yarn', 'factor': 4.0\}",
    ),
    "two bases": ({"rope_theta": 5.0}, r"rope_theta is 5.0, and also 10000.0"),
    "no biases": ({"model_type": "qwen2"}, r"it lacks layers\.0\.attention\.W_k\.bias, .*, …"),
    "no norms": ({"model_type": "qwen3"}, r"it lacks layers\.0\.attention\.norm_k\.weight, "),
    "no output": ({"tie_word_embeddings": False}, r"it lacks to_logits\.weight"),
    "fewer layers": ({"num_hidden_layers": 1}, r"unknown are layers\.1\."),
    "no mark": ({"bos_token_id": 999}, "another token that begins a text"),
    "no end": ({"eos_token_id": "0"}, "eos_token_id is"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_not_known_is_refused_by_name(kind, folder):
    changes, message = REFUSED[kind]
    change(folder / "config.json", **changes)
    if kind == "no mark":
        rename_mark(folder)
    with pytest.raises(OSError, match=message) as error:
        G.open_model(folder)
    assert str(error.value).startswith(f"not a language model that this script can open: {folder}")


def rename_mark(folder, name="<|begin_of_text|>"):
    path = folder / "tokenizer.json"
    path.write_text(path.read_text(encoding="utf-8").replace(MARK, name), encoding="utf-8")


def test_integers_are_no_weights(folder):
    def edit(weights):
        weights["model.norm.weight"] = torch.ones(8, dtype=torch.int32)

    change_weights(folder, edit)
    with pytest.raises(OSError, match=r"model\.norm\.weight is I32, not one of F32, F16, BF16"):
        G.open_model(folder)


def test_infinite_weights_are_refused(folder):
    change_weights(folder, lambda weights: weights["model.norm.weight"][1].fill_(-math.inf))
    with pytest.raises(OSError, match="not finite"):
        G.open_model(folder)


# Marks, ends, and the template


def test_a_mark_is_named_by_the_vocabulary_or_the_configs(folder):
    change(folder / "config.json", bos_token_id=7)
    assert G.open_model(folder)[1].mark == MARK_ID
    rename_mark(folder)
    assert G.open_model(folder)[1].mark == 7
    change(folder / "config.json", bos_token_id=None)
    for token in ("<|begin_of_text|>", {"content": "<|begin_of_text|>", "lstrip": False}):
        change(folder / "tokenizer_config.json", bos_token=token)
        assert G.open_model(folder)[1].mark == 0


def test_ends_are_of_both_configs(folder):
    assert G.open_model(folder)[1].ends == {0}
    change(folder / "config.json", eos_token_id=[5, 6])
    change(folder / "generation_config.json", eos_token_id=7)
    assert G.open_model(folder)[1].ends == {5, 6, 7}
    (folder / "generation_config.json").unlink()
    change(folder / "config.json", eos_token_id=None)
    assert G.open_model(folder)[1].ends == frozenset()


def test_a_template_has_had_several_places(folder):
    assert G.open_model(folder)[1].template is None
    several = [{"name": "tool_use", "template": "a"}, {"name": "default", "template": "b"}]
    for template, expected in (("c", "c"), (several, "b"), ([], None)):
        change(folder / "tokenizer_config.json", chat_template=template)
        assert G.open_model(folder)[1].template == expected
    (folder / "chat_template.jinja").write_text("ü", encoding="utf-8")
    assert G.open_model(folder)[1].template == "ü"


def test_a_tokenizer_adds_nothing_and_cuts_nothing(folder):
    tokenizer = learn_tokenizer([TEXT], 264)
    expected = tokenizer.encode(TEXT).ids
    tokenizer.post_processor = TemplateProcessing(f"{MARK} $A {MARK}", None, [(MARK, 0)])
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=99)
    (folder / "tokenizer.json").write_text(tokenizer.to_str())
    assert G.open_model(folder)[1].tokenizer.encode(TEXT).ids == expected


def test_a_network_may_have_more_tokens_than_its_tokenizer(folder):
    tokenizer = learn_tokenizer([TEXT], 260)
    (folder / "tokenizer.json").write_text(tokenizer.to_str())
    assert G.open_model(folder)[1].tokenizer.get_vocab_size() == 260


def test_an_end_of_its_own_ends_what_is_written(folder, capsys):
    model, published = G.open_model(folder)
    written = next_text(folder, capsys)
    ids = published.tokenizer.encode("def").ids
    first = int(model(torch.tensor([[published.mark, *ids]]))[0, -1].argmax())
    change(folder / "generation_config.json", eos_token_id=[first, 1])
    assert next_text(folder, capsys) == "def\n" != written


def next_text(folder, capsys):
    assert G.main(["--model", str(folder), "--write", "def", "--temperature", "0"]) == 0
    return capsys.readouterr().out


def test_a_tokenizer_that_cuts_otherwise_or_at_random_is_not_taken(folder):
    path = folder / "tokenizer.json"
    content = json.loads(path.read_bytes())
    content["model"]["dropout"] = 0.5
    path.write_text(json.dumps(content))
    assert G.open_model(folder)[1].tokenizer.model.dropout is None
    content["model"] = {"type": "Unigram", "vocab": [["a", 0.0]]}
    path.write_text(json.dumps(content))
    with pytest.raises(OSError, match="its model is 'Unigram', not 'BPE'"):
        G.open_model(folder)


def test_too_little_memory_is_not_the_fault_of_the_file(folder, monkeypatch):
    def full(path):
        raise MemoryError

    monkeypatch.setattr("inputs.pretrained.read_json", full)
    with pytest.raises(MemoryError):
        G.open_model(folder)


def test_a_model_is_not_trained(capsys):
    with pytest.raises(SystemExit):
        G.main(["--model", "somewhere"])
    assert "argument --model: needs --write, --chat" in capsys.readouterr().err
