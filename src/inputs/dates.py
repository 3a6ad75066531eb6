"""Dates as people write them in 26 languages, beside ISO 8601: `12 de octubre de 1968`, 1968-10-12.

Babel generates them from the patterns of Unicode's CLDR: as many as you like, with no download.
The network of transformer.py learns to read them. What it is given passes through `normalize`, in
training and later, and `find_problem` says what can't be right.
"""

import datetime
import re
import sys
import unicodedata
from collections.abc import Container, Sequence
from contextlib import suppress
from random import Random

from babel import Locale
from babel.dates import format_date

from inputs.text import Pair

LANGUAGES = (
    "ar", "bg", "cs", "da", "de", "el", "en", "es", "fi", "fr", "he", "hi", "hu",
    "it", "ja", "ka", "ko", "nl", "pl", "pt", "ru", "sv", "th", "tr", "uk", "zh",
)  # fmt: skip
FIRST_DAY = datetime.date(1900, 1, 1)
DAYS = 73_049  # up to the end of 2099
YEARS = range(1900, 2100)
TEST_DAYS = 5000  # which training never sees, in any language
VALIDATION_DAYS = 1000  # nor these
ALIKE = {  # what is written in several ways, and the one that is kept; after NFKD
    re.compile("[\u0300-\u036f]"): "",  # accents, which many leave out
    re.compile("[\u00ad\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff]"): "",  # hints to a printer
    re.compile("[\u00ab\u00bb\u02bc\u05f3\u2018-\u201f\u2039\u203a\u300c-\u300f]"): "'",  # quotes
    re.compile("[\u2010-\u2015\u2212]"): "-",
    re.compile("\u0131"): "i",  # Turkish, without a dot
    re.compile("\u060c"): ",",  # Arabic
    re.compile(r"\b(\d{4})\.(\d{1,2})\.(?=\d)"): r"\1. \2. ",  # 2021.3.5, as in Korean
}
EDGES = " .,;:'\"`()[]{}<>\u3002"
TWO_WAYS = re.compile(r"(?<!\d)(\d{1,2}) ?[-/ ] ?(\d{1,2}) ?[-/ ] ?\d{4}(?!\d)")


def normalize(text: str) -> str:
    """Return a text without the differences that say nothing about its date.

    Gone are capitals, accents (often left out, too), other scripts' and fullwidth digits, kinds of
    spaces, and what stands around a date: spaces, quotes, brackets, a full stop.
    """
    text = unicodedata.normalize("NFKD", text).casefold()
    text = unicodedata.normalize("NFKD", text)
    for pattern, kept in ALIKE.items():
        text = pattern.sub(kept, text)
    text = unicodedata.normalize("NFKC", text)
    text = "".join(str(unicodedata.decimal(c, c)) for c in text)
    return " ".join(text.split()).strip(EDGES)


def date_forms(language: str) -> list[str]:
    """Return the patterns of Unicode's CLDR, short to full, that have only one reading.

    A date with slashes or hyphens, like 1/2/1968, has two readings unless it begins with the year,
    as 1968-02-01 does in Swedish; and a year of two digits is that of more than one century.
    """
    patterns = Locale(language).date_formats
    forms = [str(patterns[name].pattern) for name in ("short", "medium", "long", "full")]
    clear = [form for form in forms if form.startswith("y") or not set("/-") & set(form)]
    return [form for form in clear if "yy" not in form]


def sample_dates(days: Sequence[int], random: Random) -> list[Pair]:
    """Write each day, counted from FIRST_DAY, in a random language and form, and in ISO 8601."""
    forms = {language: date_forms(language) for language in LANGUAGES}
    pairs = []
    for day in days:
        date = FIRST_DAY + datetime.timedelta(days=day)
        language = random.choice(LANGUAGES)
        text = format_date(date, random.choice(forms[language]), language)
        pairs.append((text, date.isoformat()))
    return pairs


def split_days() -> tuple[list[int], list[int], list[int]]:
    """Return the days for training, validation and test; no day is in two of them."""
    days = Random(0).sample(range(DAYS), DAYS)
    held_out = TEST_DAYS + VALIDATION_DAYS
    return days[held_out:], days[TEST_DAYS:held_out], days[:TEST_DAYS]


def find_unseen(text: str, seen: Container[str]) -> str:
    """Name the characters of a text that training had none of; return "" if there are none."""
    unseen = sorted({c for c in normalize(text) if c not in seen})
    names = " ".join(repr(c)[1:-1] for c in unseen)  # \x1b, say, can't steer the terminal
    return names and f"The network has never seen {names} before."


def is_date(text: str) -> bool:
    """Return whether a text is a day of the calendar, as YYYY-MM-DD."""
    with suppress(ValueError):
        return datetime.date.fromisoformat(text).isoformat() == text
    return False


def find_problem(text: str, answer: str) -> str:
    """Say why `answer` can't be the date of a text; return "" if nothing speaks against it.

    Numbers are checked, and the names of months and weekdays are not.
    """
    text = normalize(text)
    for first, second in TWO_WAYS.findall(text):
        if int(first) != int(second) and int(first) <= 12 and int(second) <= 12:
            return "The date can be read in two ways: write YYYY-MM-DD, or the month's name."
    numbers = [int(digits) for digits in re.findall(r"\d+", text)]
    for number in numbers:
        if 100 <= number <= 9999 and number not in YEARS:
            years = f"{YEARS[0]} to {YEARS[-1]}"
            return f"{number} is outside the years that the network knows, {years}."
    if not is_date(answer):
        return f"The prediction {answer!r} is no date."
    year, month, day = map(int, answer.split("-"))
    month_is_named = any(map(str.isalpha, text)) and len(numbers) == 2
    expected = [day, year] if month_is_named else [day, month, year]
    if sorted(numbers) != sorted(expected) or year not in YEARS:
        return f"The prediction {answer!r} doesn't fit the numbers of the text."
    return ""


def show_answer(text: str, answer: str, seen: Container[str]) -> int:
    """Print an answer, and on stderr what speaks against it; return the exit status.

    The status is 0 only if nothing speaks against it. What can't be right is not printed. A date
    with characters that training had none of is a guess: it is printed, and the status is 1.
    """
    problem = find_problem(text, answer)
    unseen = find_unseen(text, seen)
    if not problem:
        print(answer)
    for line in filter(None, (unseen, problem)):
        print(line, file=sys.stderr)
    return 1 if problem or unseen else 0


def share_exact(pairs: Sequence[Pair], found: Sequence[str]) -> float:
    """Return the share of dates that were predicted exactly."""
    return sum(iso == each for (_, iso), each in zip(pairs, found, strict=True)) / len(pairs)


def show_test(pairs: Sequence[Pair], found: Sequence[str]) -> None:
    """Print how many dates were predicted exactly, and examples, mistakes first."""
    print(f"\nTest: {share_exact(pairs, found):.2%} of {len(pairs):,} dates exactly\n")
    rows = sorted(zip(pairs, found, strict=True), key=lambda row: row[0][1] == row[1])
    for (text, iso), guess in rows[:12]:
        print(f"{guess}  {'' if guess == iso else f'not {iso}':14}  {text}")
