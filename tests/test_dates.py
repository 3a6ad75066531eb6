import datetime
import unicodedata
from collections import Counter
from random import Random

from inputs import dates


def test_no_day_is_in_two_splits():
    train, validation, test = dates.split_days()
    assert (len(validation), len(test)) == (dates.VALIDATION_DAYS, dates.TEST_DAYS)
    assert sorted(train + validation + test) == list(range(dates.DAYS))
    assert dates.FIRST_DAY + datetime.timedelta(days=dates.DAYS) == datetime.date(2100, 1, 1)
    assert dates.split_days() == (train, validation, test)


def test_every_language_is_written_in_its_own_forms():
    pairs = dates.sample_dates(dates.split_days()[0][:3000], Random(0))
    written = {
        dates.format_date(datetime.date.fromisoformat(iso), form, language): language
        for _, iso in pairs[:300]
        for language in dates.LANGUAGES
        for form in dates.date_forms(language)
    }
    found = Counter(written[text] for text, _ in pairs[:300])
    assert len(found) >= 24
    assert len(set(dates.LANGUAGES)) == len(dates.LANGUAGES) == 26
    text = "".join(text for text, _ in pairs)
    scripts = Counter(unicodedata.name(c).split()[0] for c in text if c.isalpha())
    assert len([script for script, count in scripts.items() if count > 200]) >= 9
    assert {"LATIN", "CYRILLIC", "GREEK", "ARABIC", "CJK"} <= set(scripts)


def test_no_text_can_be_read_as_two_dates():
    meaning = {}
    for month in range(1, 13):
        for day in range(1, 29):
            date = datetime.date(1968, month, day)
            for language in dates.LANGUAGES:
                for form in dates.date_forms(language):
                    text = dates.format_date(date, form, language)
                    assert meaning.setdefault(text, date) == date, text
                    assert "1968" in text
    assert all(dates.date_forms(language) for language in dates.LANGUAGES)


def test_accuracy_is_the_share_of_exact_dates():
    assert dates.share_exact([("a", "1"), ("b", "2"), ("c", "3"), ("d", "4")], list("1235")) == 0.75


def test_mistakes_are_shown_first(capsys):
    dates.show_test(
        [(f"text {i}", str(i)) for i in range(20)], ["7" if i == 3 else str(i) for i in range(20)]
    )
    total, examples = capsys.readouterr().out.strip().split("\n\n")
    assert total == "Test: 95.00% of 20 dates exactly"
    first, *others = examples.splitlines()
    assert first.split() == ["7", "not", "3", "text", "3"]
    assert len(others) == 11 and not any("not" in line for line in others)
