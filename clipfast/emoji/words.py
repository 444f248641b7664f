"""What may be said of an emoji beyond its name: keywords, and what kind of thing it is.

Both come from Unicode CLDR by way of emojibase-data (words.tsv, MIT). Its groups follow a keyboard's pages; the phrases
here put its subgroups so that they are true: a clock is an object, not a place, and a tulip no animal.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

KINDS = {
    "a face or a feeling": r"face-.*|cat-face|monkey-face|heart|emotion",
    "a person or a part of the body": r"hand.*|body-parts|person(-(?!symbol).*)?|family",
    "an animal": r"animal-.*",
    "food or a plant": r"food-.*|plant-.*|drink",
    "a vehicle or a place": r"place-.*|transport-(ground|water|air)|sky-weather",
    "a sport, a game or a celebration": r"event|award-medal|sport|game|arts-crafts",
    "an object": r"dishware|hotel|time|clothing|sound|music|musical-instrument|phone|computer|light-video|book-paper|"
    r"money|mail|writing|office|lock|tool|science|medical|household|other-object",
    "a symbol": r"transport-sign|warning|arrow|religion|zodiac|av-symbol|gender|math|punctuation|currency|"
    r"other-symbol|keycap|alphanum|geometric|person-symbol",
    "a flag": r".*flag",
}


@cache
def words_of(code: str) -> tuple[str, tuple[str, ...]]:
    """Kind and keywords of an emoji by its code points, as "1F998"; an unknown one is a symbol without keywords.

    The kind is a key of KINDS.
    """
    return _table().get(code.replace("-FE0F", ""), ("a symbol", ()))


@cache
def _table() -> dict[str, tuple[str, tuple[str, ...]]]:
    rows = {}
    for line in Path(__file__).with_name("words.tsv").read_text(encoding="utf-8").splitlines()[1:]:
        code, subgroup, keywords = line.split("\t")
        kind = next(kind for kind, pattern in KINDS.items() if re.fullmatch(pattern, subgroup))
        rows[code] = kind, tuple(filter(None, keywords.split("|")))
    return rows
