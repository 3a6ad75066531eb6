"""Unlimited phrases in two languages, from Unicode's CLDR: a text for translation.py to learn.

Babel writes times, spans, units, amounts of money and dates in all its languages, so each pair says
the same thing: `vor 3 Tagen` and `3 days ago`. Phrases held out for validation and test are never
trained on.
"""

import datetime
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from random import Random
from zlib import crc32

import babel
from babel import Locale, UnknownLocaleError
from babel.dates import format_date, format_timedelta
from babel.lists import format_list
from babel.numbers import format_currency
from babel.units import format_unit, get_unit_name

from inputs.text import Pair

COUNTS = {"train": 100_000, "val": 1000, "test": 2000}  # pairs
SECONDS = {  # in a unit of time: the most units before Babel takes a larger one
    1: 50, 60: 50, 3600: 20, 86_400: 5, 7 * 86_400: 3, 30 * 86_400: 10, 365 * 86_400: 99,
}  # fmt: skip
UNITS = (
    "length-meter", "length-kilometer", "length-centimeter", "mass-gram", "mass-kilogram",
    "volume-liter", "area-square-meter", "speed-kilometer-per-hour", "temperature-celsius",
    "digital-megabyte", "energy-kilowatt-hour", "power-watt", "frequency-hertz",
)  # fmt: skip
CURRENCIES = ("EUR", "USD", "GBP", "JPY", "CHF", "SEK", "INR", "BRL")
FIRST_DAY = datetime.date(1900, 1, 1)
DAYS = 73_049  # up to the end of 2099
Phrase = Callable[[Locale], str]


def sample_phrase(random: Random, units: Sequence[str]) -> Phrase:
    """Draw a time, a span, an amount of a unit or of money, or a date."""
    choice = random.randrange(5)
    amount = round(10 ** random.uniform(0, 5), random.choice((0, 2)))
    if choice == 0:
        date = FIRST_DAY + datetime.timedelta(days=random.randrange(DAYS))
        return lambda locale: format_date(date, "full", locale)
    if choice == 1:
        currency = random.choice(CURRENCIES)
        return lambda locale: format_currency(amount, currency, locale=locale, format_type="name")
    if choice == 2 and units:
        unit = random.choice(units)
        return lambda locale: format_unit(amount, unit, locale=locale)
    seconds = random.choice([*SECONDS])
    span = random.randint(1, SECONDS[seconds]) * random.choice((seconds, -seconds))
    return lambda locale: format_timedelta(
        datetime.timedelta(seconds=span), add_direction=choice == 3, locale=locale
    )


def sample_pairs(languages: Sequence[str], split: str, seed: int = 0) -> Iterator[Pair]:
    """Draw pairs of one or two phrases for a split, without end.

    A checksum of the source decides which split it belongs to.
    """
    random = Random(f"{seed} {split}")
    source, target = map(open_locale, languages)
    units = [
        u for u in UNITS if get_unit_name(u, locale=source) and get_unit_name(u, locale=target)
    ]
    while True:
        phrases = [sample_phrase(random, units) for _ in range(random.randint(1, 2))]
        pair = [
            format_list([p(locale) for p in phrases], locale=locale) for locale in (source, target)
        ]
        if {0: "test", 1: "val"}.get(crc32(pair[0].encode()) % 20, "train") == split:
            yield pair[0], pair[1]


def open_locale(language: str) -> Locale:
    """Return Babel's locale of a language such as de, pt_BR or pt-BR."""
    return Locale.parse(language, sep="-" if "-" in language else "_")


def phrases_name(languages: Sequence[str]) -> str:
    """Return a name for a folder of phrases, which changes with their number and with Babel."""
    made_by = crc32(f"{COUNTS} {babel.__version__}".encode())
    return f"phrases-{'-'.join(languages)}-{made_by:08x}"


def check_languages(languages: Sequence[str]) -> None:
    """Raise a ValueError that names the option if Babel does not know a language."""
    for option, language in zip(("--from", "--to"), languages, strict=True):
        try:
            open_locale(language)
        except (UnknownLocaleError, ValueError):
            raise ValueError(f"{option}: Babel does not know the language {language!r}") from None


def write_phrases(folder: Path, languages: Sequence[str]) -> None:
    """Write train, val and test in both languages as files of parallel text, unless they exist."""
    if folder.exists():
        return
    part = folder.with_suffix(".part")  # so that the folder is whole or missing
    part.mkdir(parents=True, exist_ok=True)
    for split, count in COUNTS.items():
        sides = zip(*islice(sample_pairs(languages, split), count), strict=True)
        for language, lines in zip(languages, sides, strict=True):
            text = "".join(f"{line}\n" for line in lines)
            (part / f"{split}.{language}").write_text(text, encoding="utf-8", newline="\n")
    part.replace(folder)
