"""Whether a caption is written in English, which is what facts are read from."""

import re
from typing import Final


def is_english(text: str) -> bool:
    """False if most letters are not Latin, or if at least two words belong to another language, and more than belong to
    English. A word belongs to another language if it is one of the commonest words there, has an accented letter, or
    begins with an elided word ("l'image"); to English, if it is one of its commonest words. So a few words without any
    of these, as in "CT abdomen axial", are taken for English. Abbreviations belong to none: LA is the left atrium.
    """
    latin = len(_LATIN.findall(text))
    others = len(_LETTER.findall(text)) - latin + 2 * len(_SYLLABLE.findall(text))
    if latin < others:
        return False
    words = _WORD.findall(_EPONYM.sub("", text))
    may_abbreviate = not (text.isupper() and any(len(word) > 5 for word in words))
    foreign = sum(
        bool(_ACCENTED.search(word.lower())) or (word.lower() in _FOREIGN and not (may_abbreviate and word.isupper()))
        for word in words
    )
    foreign += len(_ELIDED.findall(text))
    return foreign < 2 or foreign <= sum(word.lower() in _ENGLISH for word in words)


_LETTER: Final = re.compile(r"[^\W\d_]")
_LATIN: Final = re.compile(r"[A-Za-zµ\u00c0-\u024f]")
# Chinese, Japanese and Korean characters say more than a letter: "胸部CT" is not half English.
_SYLLABLE: Final = re.compile(r"[\u3040-\u30ff\u4e00-\u9fff\uac00-\ud7af]")
# Not the "w" of "T1-w", which is a Polish word.
_WORD: Final = re.compile(r"(?<![\w-])[^\W\d_]+")
_EPONYM: Final = re.compile(r"\ble fort\b", re.IGNORECASE)
_ACCENTED: Final = re.compile(r"[\u00df-\u00f6\u00f8-\u024f]")
_ELIDED: Final = re.compile(r"\b[dlDL]['’](?=[^\W\d_]{2})")
_ENGLISH: Final = frozenset(
    """
    the of and with in is are was were a an to at on by for from this that there no not after before into as which has
    had seen its his her our within without between showing shows showed shown show demonstrating demonstrates
    demonstrated reveals revealed revealing view scan image patient left right arrow arrows
    """.split()  # noqa: SIM905
)
# Without words that are English as well ("die", "son", "on") or common in anatomical terms ("os").
_FOREIGN: Final = frozenset(
    """
    le la les du des une et avec au aux dans par qui est ce cette sans pour sur montrant
    el los las del y con una en por que se muestra
    da dos das com uma um na nas ao mostrando
    il gli della di che nel nella e dei
    der den dem und mit ein eine einer im zeigt bei von zur nach ist
    het een van met voor
    z w oraz przez ve ile bir och med som cu din si
    """.split()  # noqa: SIM905
)
