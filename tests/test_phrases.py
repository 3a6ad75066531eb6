"""Phrases that say the same in two languages."""

import re
from itertools import islice

import pytest

import inputs.phrases as P

BOTH = ("de", "en")


def sample(split, count=300, languages=BOTH):
    return [*islice(P.sample_pairs(languages, split), count)]


def test_no_source_is_in_two_splits():
    train, val, test = (
        {source for source, _ in sample(split)} for split in ("train", "val", "test")
    )
    assert not (train & val or train & test or val & test)
    assert min(map(len, (train, val, test))) > 200


def test_both_sides_say_the_same():
    pairs = sample("train")
    for source, target in pairs:
        numbers = [
            re.findall(r"\d+", re.sub(r"(?<=\d)[.,](?=\d)", "", side)) for side in (source, target)
        ]
        assert sorted(numbers[0]) == sorted(numbers[1])
    found = dict(pairs)
    assert any(source.startswith("vor ") and target.endswith(" ago") for source, target in pairs)
    assert any(" und " in source for source in found)
    assert len({target for target in found.values()}) == len(found)  # none has two translations


@pytest.mark.parametrize("languages", [("en", "ja"), ("ar", "fr"), ("zh", "pt_BR")])
def test_every_language_of_babel_has_phrases(languages):
    pairs = sample("test", 50, languages)
    assert all(source.strip() and target.strip() for source, target in pairs)
    assert not any("length-" in side or "mass-" in side for pair in pairs for side in pair)


@pytest.mark.parametrize("language", ["xx", "not a language", ""])
def test_a_language_that_babel_does_not_know_is_refused(language):
    with pytest.raises(ValueError, match="--to: Babel does not know"):
        P.check_languages(["de", language])


def test_text_is_written_once_and_is_the_same_every_time(tmp_path, monkeypatch):
    monkeypatch.setattr(P, "COUNTS", {"train": 30, "val": 5, "test": 6})
    for name in ("a", "b"):
        P.write_phrases(tmp_path / name, BOTH)
    for split, count in P.COUNTS.items():
        for language in BOTH:
            lines = (tmp_path / f"a/{split}.{language}").read_text(encoding="utf-8").splitlines()
            assert len(lines) == count
            assert lines == (tmp_path / f"b/{split}.{language}").read_text("utf-8").splitlines()
    (tmp_path / "a/val.de").unlink()
    P.write_phrases(tmp_path / "a", BOTH)
    assert not (tmp_path / "a/val.de").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b"}


def test_a_language_may_be_written_with_a_hyphen():
    P.check_languages(["pt-BR", "zh_Hant"])
    assert sample("val", 20, ("pt-BR", "en")) == sample("val", 20, ("pt_BR", "en"))


def test_phrases_of_another_babel_or_number_are_made_anew(monkeypatch):
    name = P.phrases_name(BOTH)
    assert name == P.phrases_name(BOTH) != P.phrases_name(("de", "fr"))
    monkeypatch.setattr(P.babel, "__version__", "0.0")
    other = P.phrases_name(BOTH)
    monkeypatch.setattr(P, "COUNTS", {"train": 30})
    assert len({name, other, P.phrases_name(BOTH)}) == 3
