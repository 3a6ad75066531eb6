"""Dates as people write them in 26 languages, beside ISO 8601: `12 de octubre de 1968`, 1968-10-12.

Babel generates them from the patterns of Unicode's CLDR: as many as you like, with no download.
The network of transformer.py learns to read them.
"""

import datetime
from collections.abc import Sequence
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
TEST_DAYS = 5000  # which training never sees, in any language
VALIDATION_DAYS = 1000  # nor these


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


def share_exact(pairs: Sequence[Pair], found: Sequence[str]) -> float:
    """Return the share of dates that were predicted exactly."""
    return sum(iso == each for (_, iso), each in zip(pairs, found, strict=True)) / len(pairs)


def show_test(pairs: Sequence[Pair], found: Sequence[str]) -> None:
    """Print how many dates were predicted exactly, and examples, mistakes first."""
    print(f"\nTest: {share_exact(pairs, found):.2%} of {len(pairs):,} dates exactly\n")
    rows = sorted(zip(pairs, found, strict=True), key=lambda row: row[0][1] == row[1])
    for (text, iso), guess in rows[:12]:
        print(f"{guess}  {'' if guess == iso else f'not {iso}':14}  {text}")
