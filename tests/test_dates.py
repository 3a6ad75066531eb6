import datetime
import unicodedata
from collections import Counter
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inputs import dates

WRITTEN = st.builds(  # a day in one of the forms of one of the languages
    lambda form, day: dates.format_date(day, *form),
    st.sampled_from([(f, lang) for lang in dates.LANGUAGES for f in dates.date_forms(lang)]),
    st.dates(datetime.date(1900, 1, 1), datetime.date(2099, 12, 31)),
)


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
                    text = dates.normalize(dates.format_date(date, form, language))
                    assert meaning.setdefault(text, date) == date, text
                    assert "1968" in text
    assert all(dates.date_forms(language) for language in dates.LANGUAGES)


def test_dates_of_the_calendar_are_written_with_the_year_first_too():
    written = [text for text, _ in dates.sample_dates(dates.split_days()[0][:3000], Random(0))]
    assert any(dates.is_date(text) for text in written)


@given(st.text())
def test_what_is_normalized_stays_as_it_is(text):
    normalized = dates.normalize(text)
    assert dates.normalize(normalized) == normalized


DIFFERENCES = {
    "capitals": str.upper,
    "no capitals": str.lower,
    "accents apart": lambda text: unicodedata.normalize("NFD", text),
    "no accents": lambda text: dates.re.sub(
        "[\u0300-\u0308\u030a-\u0328]", "", unicodedata.normalize("NFD", text)
    ),
    "quotes": "“{}”".format,
    "brackets and commas": " ({}), ".format,
    "a full stop": "{}.".format,
    "a line": "\u200f{}\r\n".format,
    "spaces": lambda text: text.replace(" ", " \u00a0\u3000"),
    "fullwidth": lambda text: text.translate({0x30 + n: 0xFF10 + n for n in range(10)}),
    "Arabic digits": lambda text: text.translate({0x30 + n: 0x660 + n for n in range(10)}),
}


@pytest.mark.parametrize("difference", DIFFERENCES.values(), ids=DIFFERENCES)
@given(text=WRITTEN)
def test_what_says_nothing_about_a_date_makes_no_difference(difference, text):
    assert dates.normalize(difference(text)) == dates.normalize(text)


@pytest.mark.parametrize(
    ("text", "normalized"),
    [
        ("SALI, 3 HAZİRAN 2021", "sali, 3 haziran 2021"),
        ("sal\u0131, 3 Haziran 2021", "sali, 3 haziran 2021"),
        ("Straße", "strasse"),
        ("„2021. márc. 5.”", "2021. marc. 5"),
        ("५ मार्च २०२१", "5 मार्च 2021"),
        ("п'ятниця", "п'ятниця"),
        ("пʼятниця", "п'ятниця"),
        ("2021−03−05", "2021-03-05"),
        ("2021.3.5.", "2021. 3. 5"),
        ("5.3.2021", "5.3.2021"),
        ("...", ""),
    ],
)
def test_the_languages_keep_what_they_need(text, normalized):
    assert dates.normalize(text) == normalized


@given(text=WRITTEN)
def test_a_written_date_fits_itself_and_no_other_day(text):
    numbers = [int(digits) for digits in dates.re.findall(r"\d+", dates.normalize(text))]
    year, others = max(numbers), [n for n in numbers if n <= 31]
    fits = [
        (month, day)
        for month in range(1, 13)
        for day in range(1, 32)
        if not dates.find_problem(text, f"{year}-{month:02}-{day:02}")
    ]
    assert fits and all(set(others) <= set(pair) for pair in fits)
    assert dates.find_problem(text, f"{year + 1}-{fits[0][0]:02}-{fits[0][1]:02}")


TWO_WAYS = "The date can be read in two ways: write YYYY-MM-DD, or the month's name."
OUTSIDE = "{} is outside the years that the network knows, 1900 to 2099."
NO_DATE = "The prediction {!r} is no date."
OTHER = "The prediction {!r} doesn't fit the numbers of the text."


@pytest.mark.parametrize(
    ("text", "answer", "problem"),
    [
        ("5/3/2026", "2026-03-05", TWO_WAYS),
        ("Thu, 05 - 03 - 2026", "2026-03-05", TWO_WAYS),
        ("5/5/2026", "2026-05-05", ""),
        ("5.3.2026", "2026-03-05", ""),
        ("2026/5/3", "2026-05-03", ""),
        ("31/5/2026", "2026-05-31", ""),
        ("5 มีนาคม พ.ศ. 2564", "2021-03-05", OUTSIDE.format(2564)),
        ("๕ มีนาคม ๒๕๖๔", "2021-03-05", OUTSIDE.format(2564)),
        ("14 juillet 1789", "1989-07-14", OUTSIDE.format(1789)),
        ("31 février 2021", "2021-02-31", NO_DATE.format("2021-02-31")),
        ("5 mars 2021", "2021-13-05", NO_DATE.format("2021-13-05")),
        ("5 mars 2021", "2021-3-05", NO_DATE.format("2021-3-05")),
        ("5 mars 2021", "\x1b[2J", r"The prediction '\x1b[2J' is no date."),
        ("5 mars 2021", "2021-W09-5", NO_DATE.format("2021-W09-5")),
        ("29 feb 2024", "2024-02-29", ""),
        ("5 mars 2021", "2021-03-06", OTHER.format("2021-03-06")),
        ("5 mars 21", "2021-03-05", OTHER.format("2021-03-05")),
        ("5 mars 09", "0009-03-05", OTHER.format("0009-03-05")),
        ("5/2021", "2021-03-05", OTHER.format("2021-03-05")),
        ("mars", "2021-03-05", OTHER.format("2021-03-05")),
    ],
)
def test_an_answer_that_cannot_be_right_is_said(text, answer, problem):
    assert dates.find_problem(text, answer) == problem


def test_characters_without_training_are_named():
    assert dates.find_unseen("1⸘‽ é", "1e ") == "The network has never seen ‽ ⸘ before."
    assert dates.find_unseen("É1", "1e ") == ""


@pytest.mark.parametrize(
    ("text", "answer", "status", "printed", "said"),
    [
        ("12 mars 2021", "2021-03-12", 0, "2021-03-12\n", []),
        ("31 mars 2021", "2021-02-31", 1, "", ["is no date"]),
        ("12 ☃a\x1b 2021", "2021-03-12", 1, "2021-03-12\n", [r"never seen \x1b ☃ before"]),
        ("☃ 12 mars 21", "2021-03-12", 1, "", ["never seen ☃ before", "fit the numbers"]),
    ],
)
def test_an_answer_is_printed_with_what_speaks_against_it(
    text, answer, status, printed, said, capsys
):
    assert dates.show_answer(text, answer, "mars 0123456789") == status
    output, errors = capsys.readouterr()
    assert output == printed
    for message, line in zip(said, errors.splitlines(), strict=True):
        assert message in line


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
