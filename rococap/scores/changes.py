"""Changes a caption in one respect, to see which scores notice.

Text in, text out, and None where a change does not apply. The same text always gives the same change. The words that
are looked for are written here and not taken from the lexicons of the fact scores: with the same words, a probe could
not show what these overlook. A change is left out where it might leave the meaning as it was, such as a swap of sides
in a text that names both.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from random import Random
from typing import Final

from rococap.results.formats import fold

Change = Callable[[str, Random], str | None]
SEED: Final = 20_411


def changes(originals: Sequence[str]) -> dict[str, Change]:
    """The changes by name; `other_picture` draws from the `originals`."""
    return {
        "side_swap": side_swap,
        "negation_flip": negation_flip,
        "modality_swap": modality_swap,
        "region_swap": region_swap,
        "measurement_change": measurement_change,
        "other_picture": partial(other_picture, originals=originals),
        "shuffle_words": shuffle_words,
        "cut_half": cut_half,
        "rephrase": rephrase,
    }


def apply(name: str, change: Change, text: str) -> str | None:
    """The changed text in one line, or None if the change does not apply or leaves the text as it is."""
    text = fold(text)
    changed = change(text, Random(f"{SEED} {name} {text}"))
    return None if changed is None or changed == text else changed


def _words(*words: str) -> str:
    return rf"\b(?:{'|'.join(words)})\b"


def _in_case_of(model: str, word: str) -> str:
    """The word, beginning with a capital if the model does."""
    return word[0].upper() + word[1:] if model[0].isupper() else word


# --- Facts -----------------------------------------------------------------------------------------------------

_SIDE: Final = re.compile(
    r"\b(?:was |were |been |be )?(left|right)(?=(?:wards?|[- ]sided)?\b)"
    r"(?![- ](?:handed|angle[ds]?|after|before|behind|untreated|alone|in place|panels?|images?|pictures?|figures?)\b)",
    re.IGNORECASE,
)
_ABBREVIATION: Final = re.compile(r"\b[LR][A-Za-z]{0,4}\b\W{1,3}(?:left|right)\b")
_OTHER_SIDE: Final = {"left": "right", "right": "left"}


def side_swap(text: str, random: Random) -> str | None:
    """Right for left and left for right, in a text that names only one of them and explains no abbreviation by it."""
    found = [match for match in _SIDE.finditer(text) if match[0] == match[1]]
    if len({match[1].lower() for match in found}) != 1 or _ABBREVIATION.search(text):
        return None
    at = {match.start() for match in found}
    return _SIDE.sub(
        lambda match: _in_case_of(match[1], _OTHER_SIDE[match[1].lower()]) if match.start() in at else match[0], text
    )


_SHOWS: Final = (
    r"(?:show(?:s|ed|ing)?|demonstrat(?:es?|ed|ing)|reveal(?:s|ed|ing)?|disclos(?:es?|ed|ing)|depict(?:s|ed|ing)?)"
)
_SEEN: Final = r"(?:seen|noted|observed|visible|visuali[sz]ed|present|identified|detected|evident|found)"
_NOT_SO: Final = (
    (rf"\b({_SHOWS}) no (?:evidence|signs?|indication) of\b", r"\1 evidence of"),
    (rf"\b({_SHOWS}) no(?! longer)\b", r"\1 evidence of"),
    (r"\b(there) (is|was) no(?: evidence| signs?)?(?: of)?\b(?! longer)", r"\1 \2 evidence of"),
    (r"\b(there) (are|were) no\b(?! longer)", r"\1 \2"),
    (r"\b(with)(?:out| no)(?: any)?(?: (?:clear|definite))? (?:evidence|signs?|indication) of\b", r"\1 evidence of"),
    (r"\b(with) no\b(?! longer)", r"\1"),
    (
        r"\b(?<!with and )(with)out(?: any)? "
        r"(?!(?:\w+ )?(?:contrast|intravenous|iv|oral|gadolinium|injection|preparation|and|the|use))",
        r"\1 ",
    ),
    (r"\bno (?:evidence|signs?|indication) of\b", "evidence of"),
    (r"\b(?:absence|lack) of\b", "presence of"),
    (rf"\b(is|was|are|were) not ((?:clearly )?{_SEEN})\b", r"\1 \2"),
    (rf"\b(can)not (be {_SEEN})\b", r"\1 \2"),
    (r"\bnegative for\b", "positive for"),
    (r"(?<!nearly )(?<!almost )\bno (?!longer|more|less|doubt)(?=[a-z])", "evidence of "),
)
_IS_SEEN: Final = re.compile(rf"\b{_SEEN}$", re.IGNORECASE)
_NO_CUE: Final = re.compile(
    _words("no", "not", "cannot", "nor", "none", "without", "absen(?:t|ce)", "lack", "negative", "normal(?:ly)?"),
    re.IGNORECASE,
)
_NOT_ENGLISH: Final = re.compile(_words("com", "con", "del", "des", "el", "em", "les", "que", "und"), re.IGNORECASE)
_FINDING: Final = re.compile(
    # the nouns of disease by their endings, where these are regular, and the common ones that are not; what is enlarged
    # or displaced; what differs in density, signal or echo
    r"\b(?:(?!(?:ana|uro|dia)lys|diagnos|prognos|anastomos|s?troma|stoma|coma)"
    r"\w*(?:omas?|omata|itis|os[ie]s|iasis|a?emia|megaly|ectas(?:[ie]s|ia)|plasi[ac]|troph(?:y|ic)|path(?:y|ies)|lys[ie]s|"
    r"rrhages?|malacia|edema|penia|celes?|kinesi[as]|liths?|genesis|emphysema)|"
    r"(?:pneumo|ha?emo|hydro|pyo|chylo)(?:thora(?:x|ces)|peri(?:toneum|cardium)|mediastinum)|"
    r"\w*(?:mass(?:es)?|lesions?|tumou?rs?|cysts?|nodules?|cancers?|polyps?|fractures?|effusions?|abscess(?:es)?|stones?|"
    r"aneurysms?|calcifications?|hernias?|herniations?|thromb(?:us|i|osed))|neoplasms?|malignanc(?:y|ies)|foc(?:us|i)|"
    r"(?:fluid|gas|air|bleeding|clots?|embol(?:us|i|ism)|infarct(?:ion)?s?|strictures?|narrowing|occlusions?|occluded|"
    r"obstructions?|blockages?|dilat(?:at)?ions?|dilated|distended|distension|bulging|opacit(?:y|ies)|opacification|"
    r"consolidations?|infiltrat(?:es?|ions?|ive)|shadows?|collapsed?|cavit(?:y|ies|ation)|ossifications?|calcul(?:us|i)|"
    r"swelling|thickening|thickened|enlargement|enlarged|widening|enhancement|uptake|leak(?:s|age)?|extravasations?|"
    r"flow|vascularity|hydrocephalus|fistulas?|fistulae|communications?|shunts?|"
    r"reflux|regurgitation|ruptures?|perforations?|tears?|lacerations?|disruptions?|transections?|dissections?|"
    r"dislocations?|subluxations?|displacement|displaced|deviation|migration|malalignment|prolapse|protrusions?|"
    r"erosions?|destructi(?:on|ve)|necrosis|resorption|bone loss|bony injury|radiolucenc(?:y|ies)|lucenc(?:y|ies)|"
    r"callus|fusion|union|invasion|involvement|extension|metastas[ie]s|metastatic|recurren(?:ces?|t)|compression|"
    r"indentations?|infections?|inflammat(?:ion|ory)|stranding|diverticul(?:um|a)|plaques?|collaterals?|varices|defects?|"
    r"malformations?|abnormalit(?:y|ies)|anomal(?:y|ies)|deformit(?:y|ies)|atresia|achalasia|intussusceptions?|"
    r"volvulus|(?:loose|foreign) bod(?:y|ies)|vegetations?|collections?|ascites|pneumonia|tamponade|spasm|ulcers?|"
    r"lymph nodes?|impacted|ectopic|(?:high|increased|abnormal) (?:signal|density)|"
    r"(?:hyper|hypo|an)-?(?:intens|dens|echo)\w+))\b",
    re.IGNORECASE,
)
_PHRASE_ENDS: Final = re.compile(
    r"[;:()]|\.(?!\d)|(?<!\d)\.|\b(?<!area )(?<!areas )(?<!formation )(?:in|on|at|of|with|within|without|to|from|by|"
    r"for|into|after|before|during|but|which|that|who|where|is|are|was|were|has|have|had|arising|surrounding|"
    rf"involving|extending|causing|measuring|{_SHOWS})\b",
    re.IGNORECASE,
)
_IN_BRACKETS: Final = re.compile(r"\([^()]*\)")
_CLAUSE: Final = re.compile(
    r"(?:[.;:,]|\b(?:that|which|where|and)\b)\s*(?:(?:in|on|at)\b)?|^(?:in|on|at)\b", re.IGNORECASE
)
_SO: Final = (
    (r"\bpositive for\b", "negative for"),
    (r"\bpresence of\b", "absence of"),
    (r"\b(there) (is|was|are|were) (?!also|only|still)(?:an? |some |multiple |several )?", r"\1 \2 no "),
    (
        rf"\b({_SHOWS}) (?!(?:an? )?(?:the|that|this|these|those|how|which|what|where|its?|his|her|their|both|all|only|"
        r"each|two|three|four|five|six|as|in|on|at|after|before|and|or|by|to|same|location|position|typical|images?|"
        r"views?|sections?)\b)"
        r"(?:(?:an?|some|multiple|several|many|numerous) )?+(?=\w)",
        r"\1 no ",
    ),
    (rf"\b(is|was|are|were) (?:also )?((?:clearly )?{_SEEN})\b", r"\1 not \2"),
)


def negation_flip(text: str, random: Random) -> str | None:
    """The first statement that a finding is absent says that it is there or, in a text without one, the reverse."""
    if _NOT_ENGLISH.search(text):
        return None
    for pattern, instead in _NOT_SO if _NO_CUE.search(text) else _SO:
        for match in re.finditer(pattern, text, re.IGNORECASE):
            if _FINDING.search(_stated(text, match)):
                changed = _in_case_of(match[0], match.expand(instead))
                return text[: match.start()] + changed + text[match.end() :]
    return None


def _stated(text: str, match: re.Match[str]) -> str:
    """The phrase that the match says to be there or not: what follows it or, of "is seen", the head of its subject."""
    phrase = text[match.end() :]
    if _IS_SEEN.search(match[0]):
        phrase = _CLAUSE.split(_IN_BRACKETS.sub("", text[: match.start()]))[-1]
    return _PHRASE_ENDS.split(phrase, maxsplit=1)[0]


_MODALITIES: Final[tuple[tuple[str, str, str], ...]] = (
    # the modality, the words that name it, and the words that replace them
    ("CT", r"\b(?:computed|computeri[sz]ed) tomography\b", "magnetic resonance imaging"),
    ("CT", r"\b(?:computed|computeri[sz]ed) axial tomography\b", "axial magnetic resonance imaging"),
    ("CT", r"\b(?:computed|computeri[sz]ed) tomographic\b", "magnetic resonance"),
    ("CT", r"\b(?:computed|computeri[sz]ed) tomogram\b", "magnetic resonance image"),
    ("CT", r"\b(?-i:CECT)\b", "contrast-enhanced MRI"),
    ("CT", r"\b(?-i:NECT|NCCT)\b", "non-contrast MRI"),
    ("CT", r"\b(?-i:(?:MD|HR|CB)?CTs?)\b", "MRI"),
    ("MRI", r"\bmagnetic resonance imaging\b", "computed tomography"),
    ("MRI", r"\bmagnetic resonance\b(?! imaging)", "computed tomography"),
    ("MRI", r"\b(?-i:MRIs?|MR)\b", "CT"),
    ("X-ray", r"\bradiographs\b|\bx-? ?rays\b|\broentgenograms\b", "CT images"),
    ("X-ray", r"\bradiograph(?:y|ic)?\b|\bx-? ?ray\b|\broentgenogram\b", "CT"),
    ("ultrasound", r"\b(?:ultra)?sonogra(?:phy|phic|m)\b|\bultrasound\b", "MRI"),
    ("ultrasound", r"\b(?:ultra)?sonograms\b", "MRI images"),
)
_ONE_MODALITY_ONLY: Final = re.compile(
    # another modality, or what only one modality has, which would contradict the other
    r"\b(?:PET|SPECT|scinti\w+|fluoroscop\w+|mammogra\w+|echocardiogra\w+|\w*angiogra\w+|\w*venogra\w+|\w*urogra\w+|CTA|"
    r"MRA|MRCP|MRV|DSA|OPG|tomosynthesis|Doppler|trans\w+al|endoscopic|hypo-?echoic|hyper-?echoic|an-?echoic|echo\w*|"
    r"T[12]\w*|FLAIR|STIR|DWI|ADC|diffusion|spin-echo|gadolinium|TE|TR|HU|Hounsfield|plain|panoramic|bitewing|periapical|film)\b",
    re.IGNORECASE,
)


def modality_swap(text: str, random: Random) -> str | None:
    """MRI for CT and CT for MRI, CT for X-ray and MRI for ultrasound, in a text that names only one of the four."""
    named = {modality for modality, words, _ in _MODALITIES if re.search(words, text, re.IGNORECASE)}
    if len(named) != 1 or _ONE_MODALITY_ONLY.search(text):
        return None
    replaced = [(words, instead) for modality, words, instead in _MODALITIES if modality in named]
    return _replaced_at_once(text, replaced)


def _replaced_at_once(text: str, replaced: Sequence[tuple[str, str]]) -> str:
    """The text with each pattern replaced, and what replaces one never replaced by the next."""
    every = re.compile("|".join(f"({words})" for words, _ in replaced), re.IGNORECASE)
    return every.sub(lambda match: _in_case_of(match[0], replaced[(match.lastindex or 1) - 1][1]), text)


_REGIONS: Final[Mapping[str, Mapping[str, str]]] = {
    "chest": {
        "chest": "abdomen",
        "thorax": "abdomen",
        "thoracic": "abdominal",
        "lung": "liver",
        "lungs": "kidneys",
        "pulmonary": "hepatic",
        "heart": "spleen",
        "cardiac": "splenic",
    },
    "abdomen": {
        "abdomen": "chest",
        "abdominal": "thoracic",
        "liver": "lung",
        "hepatic": "pulmonary",
        "kidney": "lung",
        "kidneys": "lungs",
        "renal": "pulmonary",
        "spleen": "heart",
        "splenic": "cardiac",
    },
    "head": {"brain": "pelvis", "skull": "pelvis", "cerebral": "pelvic", "cranial": "pelvic"},
    "pelvis": {"pelvis": "skull", "pelvic": "cranial"},
    "lower limb": {
        "knee": "shoulder",
        "knees": "shoulders",
        "hip": "elbow",
        "hips": "elbows",
        "ankle": "wrist",
        "foot": "hand",
        "feet": "hands",
        "femur": "humerus",
        "thigh": "forearm",
    },
    "upper limb": {
        "shoulder": "knee",
        "shoulders": "knees",
        "elbow": "hip",
        "elbows": "hips",
        "wrist": "ankle",
        "hand": "foot",
        "hands": "feet",
        "humerus": "femur",
        "forearm": "thigh",
    },
    "breast": {"breast": "thyroid", "breasts": "thyroid lobes"},
    "neck": {"thyroid": "breast"},
}
_ANOTHER_SENSE: Final = re.compile(
    r"\b(?:renal pelvis|(?:on the|the) other hand|first-?hand|spine|vertebra\w*)\b", re.IGNORECASE
)


def region_swap(text: str, random: Random) -> str | None:
    """The parts of one body region, in a text that names no other, replaced by those of another region."""
    words = set(re.findall(r"[a-z]+", text.lower()))
    named = [parts for parts in _REGIONS.values() if words & parts.keys()]
    if len(named) != 1 or _ANOTHER_SENSE.search(text):
        return None
    return _replaced_at_once(text, [(rf"\b{part}\b", instead) for part, instead in named[0].items()])


_DIGITS: Final = re.compile(r"\d+(?:[.,]\d+)?")
_MEASURED: Final = re.compile(
    rf"(?<![\w.,]){_DIGITS.pattern}(?:\s*(?:[x×*–-]|by|to)\s*{_DIGITS.pattern})*"
    r"[\s-]*(?:mm|cm|[µμ]m|ml|cc|HU|mmHg|cm/s|m/s|millimet(?:er|re)s?|centimet(?:er|re)s?|degrees)(?:[23²³]|\b)",
    re.IGNORECASE,
)


def measurement_change(text: str, random: Random) -> str | None:
    """Every number with a unit, two to four times as large; each with as many decimals as before."""
    factor = random.choice((2, 3, 4))
    return _MEASURED.sub(lambda measured: _DIGITS.sub(lambda digits: _times(digits[0], factor), measured[0]), text)


def _times(digits: str, factor: int) -> str:
    _, point, decimals = digits.partition("," if "," in digits else ".")
    product = f"{float(digits.replace(',', '.')) * factor:.{len(decimals)}f}"
    return product.replace(".", point) if point else product


# --- The whole text --------------------------------------------------------------------------------------------


def other_picture(text: str, random: Random, originals: Sequence[str]) -> str | None:
    """The caption of another picture; None if 100 draws give the same."""
    for _ in range(100):
        other = fold(random.choice(originals))
        if other and other != text:
            return other
    return None


def shuffle_words(text: str, random: Random) -> str | None:
    """The same words in a random order; None for a text of fewer than four."""
    words = text.split()
    if len(words) < 4:
        return None
    return " ".join(random.sample(words, len(words)))


def cut_half(text: str, random: Random) -> str | None:
    """The first half of the words; None for a text of fewer than four."""
    words = text.split()
    return " ".join(words[: len(words) // 2]) if len(words) >= 4 else None


_TEMPLATE: Final = re.compile(
    rf"(?P<picture>\w[^.;:]{{1,150}}?),? {_SHOWS} (?!that\b|how\b|wh\w+\b|by\b|in\b)"
    rf"(?P<finding>(?:(?!\b{_SHOWS}\b|\([A-Z]\))[^;:])+?)(?P<rest>\.?|(?<=[a-z)])\. [A-Z].*)",
)
_CAPITAL: Final = re.compile(r"A(?= )|[A-Z](?=[a-z]+\b)")


def rephrase(text: str, random: Random) -> str | None:
    """`X showing Y` as `Y, as seen on x`, which means the same, in the first sentence."""
    match = _TEMPLATE.fullmatch(text)
    if not match:
        return None
    picture, finding = match["picture"], match["finding"]
    if _CAPITAL.match(picture):
        picture = picture[0].lower() + picture[1:]
    return f"{finding[0].upper()}{finding[1:]}, as seen on {picture}{match['rest']}"
