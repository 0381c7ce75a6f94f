"""Measurements in a caption: numbers with units, in one unit for each dimension."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Measurement:
    """A value in the base unit of its dimension; `half` is half a unit in its last digit."""

    dimension: str
    value: float
    half: float
    text: str

    def equals(self, other: "Measurement") -> bool:
        """Whether both may be roundings of one value: they differ by at most half the last digit of the coarser one."""
        within = max(self.half, other.half) * (1 + _TOLERANCE)
        return self.dimension == other.dimension and abs(self.value - other.value) <= within

    def __str__(self) -> str:
        return self.text


def find(folded: str) -> Iterator[Measurement]:
    """Every number with a unit; several for dimensions ("3 x 4 cm") and ranges ("5-6 mm")."""
    for match in _MEASUREMENT.finditer(folded):
        dimension, factor = _UNITS[match["unit"]] if match["unit"] in _UNITS else _UNITS[_spelled(match["unit"])]
        unit = match["unit"]
        if match["power"]:
            factor, unit = factor * 10.0 ** -int(match["power"]), f"×10^-{match['power']} {unit}"
        numbers = match["numbers"] or match["number"]
        for number in (_SIGNED if dimension == _ATTENUATION else _NUMBER).findall(numbers):
            value, digits = _parsed(number)
            yield Measurement(dimension, value * factor, 0.5 * 10**-digits * factor, f"{number} {unit}")
    for match in _SUV.finditer(folded):
        value, digits = _parsed(match["number"])
        yield Measurement("uptake", value, 0.5 * 10**-digits, f"SUV {match['number']}")


def _spelled(unit: str) -> str:
    """A unit that is written in any case or in the plural, as it is in the table."""
    lower = " ".join(unit.lower().split())
    return next(known for known in (lower, lower.removesuffix("s"), lower.removesuffix("es")) if known in _UNITS)


def _parsed(number: str) -> tuple[float, int]:
    """The value, and the number of digits after the decimal point."""
    if (words := " ".join(number.lower().replace("-", " ").split())) in _WORDS:
        return float(_WORDS[words]), 0
    number = _MINUS.sub("-", number)
    if re.fullmatch(r"-?\d{1,3}(?:,\d{3})+(?:\.\d+)?", number):
        number = number.replace(",", "")
    number = number.replace(",", ".").replace("·", ".")
    return float(number), len(number.partition(".")[2])


_TOLERANCE: Final = 1e-6
_ATTENUATION: Final = "attenuation in HU"

_EXACT: Final = {
    # Abbreviations, matched as written.
    "mm": ("length in mm", 1.0),
    "cm": ("length in mm", 10.0),
    "µm": ("length in mm", 1e-3),
    "μm": ("length in mm", 1e-3),
    "nm": ("length in mm", 1e-6),
    "cms": ("length in mm", 10.0),
    "MM": ("length in mm", 1.0),
    "CM": ("length in mm", 10.0),
    "mm2": ("area in mm²", 1.0),
    "mm²": ("area in mm²", 1.0),
    "cm2": ("area in mm²", 100.0),
    "cm²": ("area in mm²", 100.0),
    "mm3": ("volume in ml", 1e-3),
    "mm³": ("volume in ml", 1e-3),
    "cm3": ("volume in ml", 1.0),
    "cm³": ("volume in ml", 1.0),
    "mm^2": ("area in mm²", 1.0),
    "cm^2": ("area in mm²", 100.0),
    "mm^3": ("volume in ml", 1e-3),
    "cm^3": ("volume in ml", 1.0),
    "ml": ("volume in ml", 1.0),
    "mL": ("volume in ml", 1.0),
    "cc": ("volume in ml", 1.0),
    "HU": (_ATTENUATION, 1.0),
    "Gy": ("dose in Gy", 1.0),
    "cGy": ("dose in Gy", 1e-2),
    "mGy": ("dose in Gy", 1e-3),
    "mSv": ("effective dose in mSv", 1.0),
    "MBq": ("activity in MBq", 1.0),
    "mCi": ("activity in MBq", 37.0),
    "Hz": ("frequency in Hz", 1.0),
    "kHz": ("frequency in Hz", 1e3),
    "MHz": ("frequency in Hz", 1e6),
    "T": ("field in tesla", 1.0),
    "mmHg": ("pressure in mmHg", 1.0),
    "mm Hg": ("pressure in mmHg", 1.0),
    "cmH2O": ("pressure in mmHg", 0.73556),
    "cm H2O": ("pressure in mmHg", 0.73556),
    "m/s": ("velocity in m/s", 1.0),
    "m/sec": ("velocity in m/s", 1.0),
    "cm/s": ("velocity in m/s", 1e-2),
    "cm/sec": ("velocity in m/s", 1e-2),
    "mm2/s": ("diffusivity in mm²/s", 1.0),
    "mm²/s": ("diffusivity in mm²/s", 1.0),
    "s/mm2": ("b-value in s/mm²", 1.0),
    "s/mm²": ("b-value in s/mm²", 1.0),
    "kV": ("voltage in kV", 1.0),
    "kVp": ("voltage in kV", 1.0),
    "mA": ("current in mA", 1.0),
    "mAs": ("charge in mAs", 1.0),
    "mAsec": ("charge in mAs", 1.0),
    "ms": ("time in s", 1e-3),
    "msec": ("time in s", 1e-3),
    "kg": ("mass in kg", 1.0),
    "mg": ("mass in kg", 1e-6),
    "h": ("time in s", 3_600.0),
    "yo": ("time in months", 12.0),
    "y/o": ("time in months", 12.0),
    "bpm": ("rate in 1/min", 1.0),
    "Fr": ("catheter in French", 1.0),
    "%": ("share in %", 1.0),
    "°": ("angle in °", 1.0),
    "º": ("angle in °", 1.0),
}
_WORDED: Final = {
    # Words, matched in any case and in the plural.
    "millimeter": ("length in mm", 1.0),
    "millimetre": ("length in mm", 1.0),
    "centimeter": ("length in mm", 10.0),
    "centimetre": ("length in mm", 10.0),
    "micrometer": ("length in mm", 1e-3),
    "micrometre": ("length in mm", 1e-3),
    "micron": ("length in mm", 1e-3),
    "inch": ("length in mm", 25.4),
    "milliliter": ("volume in ml", 1.0),
    "millilitre": ("volume in ml", 1.0),
    "liter": ("volume in ml", 1e3),
    "litre": ("volume in ml", 1e3),
    "hounsfield unit": (_ATTENUATION, 1.0),
    "degree": ("angle in °", 1.0),
    "percent": ("share in %", 1.0),
    "per cent": ("share in %", 1.0),
    "tesla": ("field in tesla", 1.0),
    "gray": ("dose in Gy", 1.0),
    "french": ("catheter in French", 1.0),
    "second": ("time in s", 1.0),
    "sec": ("time in s", 1.0),
    "min": ("time in s", 60.0),
    "minute": ("time in s", 60.0),
    "hr": ("time in s", 3_600.0),
    "hour": ("time in s", 3_600.0),
    "day": ("time in s", 86_400.0),
    "week": ("time in s", 604_800.0),
    "wk": ("time in s", 604_800.0),
    # Months have no fixed number of days.
    "month": ("time in months", 1.0),
    "year": ("time in months", 12.0),
    "mo": ("time in months", 1.0),
    "yr": ("time in months", 12.0),
}
_UNITS: Final = _EXACT | _WORDED
_ONES: Final = "one two three four five six seven eight nine".split()  # noqa: SIM905
_TEENS: Final = "ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen".split()  # noqa: SIM905
_TENS: Final = "twenty thirty forty fifty sixty seventy eighty ninety".split()  # noqa: SIM905
_WORDS: Final = {
    **{word: n for n, word in enumerate([*_ONES, *_TEENS], 1)},
    **{word: 10 * n for n, word in enumerate(_TENS, 2)},
    **{f"{ten} {one}": 10 * n + m for n, ten in enumerate(_TENS, 2) for m, one in enumerate(_ONES, 1)},
}
_WORD: Final = rf"(?:{'|'.join(_TENS)})(?:[- ](?:{'|'.join(_ONES)}))?|{'|'.join([*_TEENS, *_ONES])}"
_PLAIN: Final = r"\d+(?:[.,·]\d+)*"
_DIGITS: Final = rf"(?<![\w.,/+])[-−–]?{_PLAIN}"
_NUMBER: Final = re.compile(rf"(?<!\d){_PLAIN}|{_WORD}", re.IGNORECASE)
# Hounsfield units are the ones that may be negative. The dash in "30-50" is no sign.
_SIGNED: Final = re.compile(rf"(?<!\d)(?:(?<![\d ])[-−–]|(?<=to )[-−–]|(?<=and )[-−–])?{_PLAIN}|{_WORD}", re.IGNORECASE)
_MINUS: Final = re.compile("[−–]")


def _longest_first(units: dict[str, tuple[str, float]]) -> str:
    return "|".join(map(re.escape, sorted(units, key=len, reverse=True)))


_UNIT: Final = rf"(?:{_longest_first(_EXACT)})(?![\w/²³^])|(?i:(?:{_longest_first(_WORDED)})(?:e?s)?)(?!\w)"
_BY: Final = r"\s?(?:[x×X✕*]|by|BY)\s?"
_RANGE: Final = r"\s?(?:[-–—−]|to|and|or|±)\s?"
# Of diffusivities only: "3 x 10-5 mm" is a length and a range.
_POWER: Final = r"\s?[x×X✕*]\s?10\s?\^?[-−–]\s?(?P<power>\d)(?=\s?[mc]m[2²]/s)"
_MEASUREMENT: Final = re.compile(
    rf"(?:(?P<number>{_DIGITS}){_POWER}"
    rf"|(?P<numbers>(?:{_DIGITS}|\b(?i:{_WORD})\b)(?:(?:{_BY}|{_RANGE}[-−–]?){_PLAIN}){{0,3}}))"
    rf"[ \-‐‑–]?[ ]?(?P<unit>{_UNIT})"
)
_SUV: Final = re.compile(r"\bSUV[ -]?(?:max|mean|peak)?[^\d.;]{0,12}(?P<number>\d+(?:[.,]\d+)?)", re.IGNORECASE)
