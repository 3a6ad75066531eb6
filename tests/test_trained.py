import importlib
import json
import os

import pytest
import safetensors.torch
import torch
from PIL import Image

import attention
import gpt
import transformer
from explorer import trained
from inputs.text import EOS, PAD
from make_models import MODELS


@pytest.mark.parametrize("sentence", ["", "  ", "a " * 11])
def test_a_sentence_must_have_a_few_words(sentence):
    words, problem = trained.split_words(sentence)
    assert words == [] and problem == f"Write 1 to 10 words; these are {len(sentence.split())}."


def test_words_are_cut_and_composed():
    assert trained.split_words("cafe\u0301 " + "x" * 30) == (["café", "x" * 20], "")


def test_a_date_becomes_tokens_with_padding():
    source, problem = trained.encode_date(" 1.\uff12.\n", {"1": 4, "2": 5, ".": 6})
    assert source.tolist() == [[4, 6, 5, EOS] + 4 * [PAD]]
    assert problem == ""


def test_a_date_in_an_unknown_script_is_read_with_a_warning():
    source, problem = trained.encode_date("1⸘‽", {"1": 4})
    assert source[0, :4].tolist() == [4, transformer.UNKNOWN, transformer.UNKNOWN, EOS]
    assert problem == "The network has never seen ‽ ⸘ before."


@pytest.mark.parametrize("text", ["", "   ", "“ ”", "1" * 61])
def test_a_date_must_have_a_length(text):
    source, problem = trained.encode_date(text, {"1": 4})
    assert source is None and problem.startswith("Write a date of 1 to 60 characters")


def test_no_date_of_the_languages_is_longer():
    dates = importlib.import_module("inputs.dates")
    days = range(0, dates.DAYS, 20)
    texts = [text for text, _ in dates.sample_dates(days, dates.Random(0))]
    assert max(map(len, texts)) <= trained.LONGEST_DATE


def test_two_heads_are_trained_and_opened(tmp_path):
    ticks, path = [], tmp_path / "new/pairs.safetensors"
    trained.train_pairs(path, lambda: ticks.append(1), steps=3)
    assert len(ticks) == 3
    model = trained.open_pairs(path)
    expected = safetensors.torch.load_file(path)
    assert all(torch.equal(expected[name], x) for name, x in model.state_dict().items())
    assert not model.training


def test_a_transformer_is_trained_and_opened(tmp_path, monkeypatch):
    monkeypatch.setattr(transformer, "BATCHES", 2)
    monkeypatch.setattr(transformer, "split_days", lambda: ([*range(500)], [1, 2], [3]))
    monkeypatch.setattr(trained, "split_days", transformer.split_days)
    ticks, path = [], tmp_path / "dates.safetensors"
    trained.train_dates(path, lambda: ticks.append(1), epochs=2)
    assert len(ticks) == 4
    model, vocabulary = transformer.open_model(path)
    assert model.embedding.num_embeddings == 4 + len(vocabulary)


OTHER = "not a model saved by this script; train one first: {}: its weights have other sizes"


def test_the_first_network_that_opens_is_taken(tmp_path):
    good, bad, missing = (tmp_path / name for name in ("good", "bad", "missing"))
    trained.save(good, attention.PairFinder(2))
    trained.save(bad, attention.PairFinder(2, d_model=32))  # of another shape
    for paths, opens, problem in (
        ([missing, good], True, ""),
        (
            [bad, good],
            True,
            OTHER.format(bad),
        ),
        (
            [bad, missing],
            False,
            OTHER.format(bad),
        ),
        ([missing], False, f"There is no network in {str(missing)!r} yet."),
    ):
        model, found = trained.open_first(paths, trained.open_pairs)
        assert (model is not None, found.startswith(problem)) == (opens, True)


def test_the_losses_of_all_runs_are_read(tmp_path):
    rows = [{"epoch": 1, "training_loss": 2.5, "validation_loss": 2.0, "seconds": 1.0}]
    for name, content in {
        "translation": json.dumps({"epochs": rows * 2}),
        "transformer": json.dumps({"epochs": [[1.5, 0.7, 60.4], [0.9, 0.96, 28.1]]}),
        "attention": json.dumps({"results": {}}),
        "broken": "{",
        "empty": json.dumps({"epochs": []}),
        "strange": json.dumps([1]),
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.json").write_text(content)
    (tmp_path / "pipe").mkdir()
    os.mkfifo(tmp_path / "pipe/metrics.json")  # which is not waited for
    assert trained.read_losses(tmp_path) == {
        "transformer": {"training_loss": [1.5, 0.9]},
        "translation": {"training_loss": [2.5, 2.5], "validation_loss": [2.0, 2.0]},
    }


def test_a_photo_is_seen_and_classified(tmp_path):
    script = importlib.import_module("fashion-mnist")
    path = tmp_path / "model.safetensors"
    with pytest.raises(OSError, match="train one first"):
        trained.classify(b"", path)
    torch.manual_seed(0)
    model = script.Classifier()
    trained.save(path, model)
    photo = Image.new("RGB", (100, 120), "white")
    photo.paste((90, 20, 20), (30, 20, 70, 100))
    photo.save(tmp_path / "photo.png")
    image, probabilities = trained.classify((tmp_path / "photo.png").read_bytes(), path)
    assert image.shape == (28, 28) and image.max() > 200
    expected = script.predict(model, image.unsqueeze(0)).softmax(dim=1)[0].tolist()
    assert [*probabilities] == [*script.CLASSES] and [*probabilities.values()] == expected
    with pytest.raises(ValueError, match="not a photo of a garment"):
        trained.classify(b"GIF89a", path)
    model.layers[1].weight.data.fill_(1e38)
    trained.save(path, model)
    with pytest.raises(OSError, match="computes no numbers"):
        trained.classify((tmp_path / "photo.png").read_bytes(), path)


def test_a_language_model_is_trained_and_opened(tmp_path, monkeypatch):
    for n in range(40):
        content = "def add(a, b):\n    return a + b\n" * 9
        (tmp_path / f"{n}.py").write_text(content)
    text = gpt.Text(tmp_path, gpt.PYTHON)
    monkeypatch.setattr(trained, "standard_library", lambda: text)
    ticks, path = [], tmp_path / "new/gpt"
    trained.train_gpt(path, lambda: ticks.append(1), steps=3)
    assert len(ticks) == 3
    model, texts = gpt.open_model(path)
    assert model.to_logits.weight.any()  # it begins with zeros
    tokens, _ = trained.encode_text("return a", texts, 9)
    assert texts.tokenizer.decode(tokens.ids[1:]) == "return a"


def test_a_text_becomes_tokens_up_to_a_limit():
    _, texts = gpt.open_model(MODELS / "llama")
    tokens, problem = trained.encode_text("aé\u4e2d", texts, 6)
    assert tokens.text == "aé\u4e2d" and problem == ""
    assert tokens.ids[0] == texts.mark and tokens.ends == [1, 2, 2, 3, 3, 3]
    tokens, problem = trained.encode_text("ab" * 600, texts, 5)
    assert tokens.text == "ababa" and len(tokens.ids) == 6 and tokens.ends == [1, 2, 3, 4, 5]
    assert problem == "These are the first 5 of 1,200 tokens."
    assert trained.encode_text("", texts, 5) == (None, "Write a text of at least one token.")
    assert [trained.longest_text(context) for context in (2, 64, 256, 8192)] == [1, 48, 192, 192]


def test_tokens_have_names_and_spell_a_text():
    _, texts = gpt.open_model(MODELS / "llama")
    tokens, _ = trained.encode_text("a é", texts, 9)
    assert trained.name_token(tokens.ids[1], texts) == "a"
    assert trained.name_token(texts.mark, texts) == "<|endoftext|>"
    assert trained.spell_text(tokens.ids[2:], texts, tokens.ids[:2]) == " é"
    assert trained.name_token(10**6, texts) == "?"
