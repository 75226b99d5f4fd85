"""Two columns of one field, perhaps of different types: whether values fit, and the form in which they compare."""

import re
from typing import Literal

from sync_pipeline.records import Column

_INTEGER_DIGITS = {"smallint": 5, "integer": 10, "bigint": 19}
_FLOATS = ("real", "double precision")
_TEXTS = ("text", "character varying", "bpchar", "name")
_DATES = ("date", "timestamp without time zone", "timestamp with time zone")
_FAMILIES: tuple[tuple[str, ...], ...] = (
    (*_INTEGER_DIGITS, "numeric", *_FLOATS, "money"),
    _TEXTS,
    _DATES,
    ("time without time zone", "time with time zone"),
    ("json", "jsonb"),
    ("cidr", "inet"),
    ('"bit"', "bit varying"),
    ("macaddr", "macaddr8"),
    ("boolean",),
    ("uuid",),
    ("bytea",),
    ("interval",),
    ("xml",),
)
# From, to: every value of the first is one of the second.
_WIDENING = {
    ("smallint", "real"),
    ("smallint", "double precision"),
    ("integer", "double precision"),
    ("real", "double precision"),
    ("jsonb", "json"),
    ("cidr", "inet"),
}
_MODIFIER = re.compile(r"\((\d+)(?:,(-?\d+))?\)")


def narrowing(source: Column, target: Column) -> Literal["narrower", "other"] | None:
    """Say whether values of `source` fit in `target`: None, or not all (`narrower`), or hardly any (`other`)."""
    here, there = source.type_name, target.type_name
    if here == there:
        if source.domain or target.domain:
            return None
        return None if _length_fits(source, target) else "narrower"
    if there in {"text", "character varying"} and not _MODIFIER.search(target.formatted_type):
        return None
    if here.rsplit(".", maxsplit=1)[-1] == there.rsplit(".", maxsplit=1)[-1]:
        return None  # One type of the users' own, in two schemas.
    family = _family(here)
    if family is None or _family(there) is None:
        return "narrower"
    if there not in family:
        return "other"
    if (here, there) in _WIDENING:
        return None
    if here in _INTEGER_DIGITS and there in _INTEGER_DIGITS:
        return None if _INTEGER_DIGITS[here] < _INTEGER_DIGITS[there] else "narrower"
    if here in _INTEGER_DIGITS and there == "numeric":
        precision, scale = _numeric(target)
        return None if precision - scale >= _INTEGER_DIGITS[here] else "narrower"
    if here in _TEXTS and there in _TEXTS:
        return None if _length_fits(source, target) else "narrower"
    if here in _DATES and there in _DATES:
        return None if _DATES.index(here) < _DATES.index(there) else "narrower"
    return "narrower"


def common_form(mine: Column, other: Column) -> str:
    """Return an SQL template, with `{}` for the column, of the text that is equal where both nodes hold one value.

    Where types are equal it is the value's own text, so that 1.0 and 1.00 differ; where they are not, it forgets what
    one of them cannot hold: trailing zeros, blank padding, a time of midnight, the layout of json.
    """
    if (mine.type_name, mine.formatted_type) == (other.type_name, other.formatted_type):
        return "{}"
    both = {mine.type_name, other.type_name}
    if both == {"numeric"} or ("numeric" in both and both <= set(_FAMILIES[0]) - {"money"}):
        return "pg_catalog.trim_scale({}::text::numeric)"
    if both & set(_FLOATS) and both & set(_INTEGER_DIGITS):
        return "{}::text::double precision"
    if "bpchar" in both and both <= set(_TEXTS):
        return "pg_catalog.rtrim({}::text)"
    if len(both) > 1 and both <= set(_DATES):
        return "{}::" + max(both, key=_DATES.index)
    if both == {"json", "jsonb"}:
        return "{}::text::jsonb"
    if both == {"cidr", "inet"}:
        return "{}::inet"
    return "{}"


def _family(type_name: str) -> tuple[str, ...] | None:
    return next((family for family in _FAMILIES if type_name in family), None)


def _length_fits(source: Column, target: Column) -> bool:
    if target.type_name == "numeric":
        (precision, scale), (room, room_scale) = _numeric(source), _numeric(target)
        return scale <= room_scale and precision - scale <= room - room_scale
    given, limit = _MODIFIER.search(source.formatted_type), _MODIFIER.search(target.formatted_type)
    if limit is None:
        return True
    return given is not None and int(given[1]) <= int(limit[1])


def _numeric(column: Column) -> tuple[float, float]:
    """Return precision and scale; without any, more of both than a value can have."""
    modifier = _MODIFIER.search(column.formatted_type)
    if modifier is None:
        return 1_000_000, 100_000
    return int(modifier[1]), int(modifier[2] or 0)
