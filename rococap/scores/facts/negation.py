"""Which findings a caption denies, and which it names without denying them.

After NegEx (Chapman et al., "A simple algorithm for identifying negated findings and diseases in discharge summaries",
Journal of Biomedical Informatics 34:301-310, 2001) and its terms of 2013 (Chapman et al., "Extending the NegEx lexicon
for multiple languages", MEDINFO 2013): a trigger denies the findings in its scope, pseudo-triggers deny nothing. The
scope here is that of a caption, which packs more into a sentence than a report: it ends at a preposition, a verb or a
conjunction such as "but", and at a comma unless this follows an adjective ("no large, solid mass") or the list goes on
to an "or". Before "is not seen" it is the head of the subject: "enhancement" in "enhancement of the mass".
"""

import re
from collections.abc import Iterable, Iterator
from typing import Final

from rococap.scores.lexicon import Found


def split(folded: str, findings: Iterable[Found]) -> tuple[frozenset[str], frozenset[str]]:
    """The names of the findings that the text denies, and of those that it names otherwise; `findings` in their order.

    A finding that a text both denies and affirms, of two places or times, counts as both.
    """
    scopes = sorted(_scopes(folded))
    denied: set[str] = set()
    affirmed: set[str] = set()
    at = reach = 0
    for one in findings:
        while at < len(scopes) and scopes[at][0] <= one.start:
            reach = max(reach, scopes[at][1])
            at += 1
        # One that begins in the scope is denied, even if it ends with a word that would end a scope: "air under".
        (denied if one.start < reach else affirmed).add(one.name)
    return frozenset(denied), frozenset(affirmed)


def apart(folded: str) -> str:
    """The text with "non-displaced" for "nondisplaced" and "undisplaced": what is denied is a word of its own.

    "Non-calcified" and "non-enhancing" are left out. They tell a part from others: neither is said of the whole.
    """
    return _JOINED.sub("non-", _PART.sub("other", folded))


def _scopes(folded: str) -> Iterator[tuple[int, int]]:
    """The parts of a text that are denied, as (start, end)."""
    for trigger in _TRIGGER.finditer(folded):
        match trigger.lastgroup:
            case "before":
                yield trigger.end(), _forward(folded, trigger.end())
            case "after":
                yield _backward(folded, trigger.start())
            case "word" if next_word := _NEXT.match(folded, trigger.end()):
                yield next_word.span()
            case "free" if last_word := _LAST.search(folded, max(0, trigger.start() - _REACH), trigger.start()):
                yield last_word.span()


def _forward(folded: str, start: int) -> int:
    """Where the scope of a trigger that stands before its findings ends."""
    ahead = folded[start : start + _REACH]
    end = stop.start() if (stop := _STOP.search(ahead)) else len(ahead)
    for comma in _COMMA.finditer(ahead, 0, end):
        if not (_ADJECTIVE.search(ahead, 0, comma.start()) or _GOES_ON.search(ahead, comma.start(), end)):
            return start + comma.start()
    return start + end


def _backward(folded: str, end: int) -> tuple[int, int]:
    """The scope of a trigger that stands after its findings: the subject of its clause, up to a preposition, or what
    follows the last one if the clause begins with one.
    """
    first = max(0, end - _REACH)
    behind = folded[first:end]
    start = max((stop.end() for stop in _CLAUSE.finditer(behind) if stop["ends"]), default=0)
    leads = list(_LEADS.finditer(behind, start))
    if leads and behind[start : leads[0].start()].strip():
        return first + start, first + leads[0].start()
    return first + (leads[-1].end() if leads else start), end


_REACH: Final = 90
"""How many characters a scope may have."""

_EVIDENCE: Final = (
    r"(?:(?:clear|definite|obvious|significant|further|other|angiographic|radiological|radiographic|radiologic|clinical|"
    r"imaging|sonographic|mammographic|any|new|apparent|convincing|visible|ct|mri|echocardiographic|histological) )*"
    r"(?:evidence|signs?|indications?|suggestion|suspicion|features?|findings?|presence|appearance|demonstration|traces?)"
    r" (?:of|for|suggest\w* of|suggesting|indicating|to suggest)\b"
)
_SEEN: Final = (
    r"(?:seen|detected|identified|visuali[sz]ed|visible|present|found|observed|noted|evident|demonstrated|appreciated|"
    r"recogni[sz]ed|apparent|depicted|discernible|documented|revealed)"
)
_BE: Final = r"(?:is|are|was|were|has been|have been|had been|can be|could be|be)"
_OF_CONTRAST: Final = r"(?:enhancement|extravasation|leak|leakage|pooling|reflux|uptake)\b"
_NOT: Final = r"(?: not|n['’]t)"
_NOTHING: Final = (
    r"with (?:and|or) without",
    r"to rule out|for ruling out",
    r"no (?:(?:significant|interval|further|appreciable) )*"
    r"(?:change|increase|decrease|difference|progression|doubt|mention)",
    r"(?:not|cannot|can not|could not|does not|do not|did not) (?:be )?(?:(?:entirely|completely|definitely) )?"
    r"(?:exclude|excluded|rule out|ruled out)",
    r"not (?:only|necessarily|certain|shown|pictured|included|to scale)",
    r"no \d+(?![\d.,]*(?: ?[x×] ?|[ ‐-]{0,2}[cm]m\b))",
    r"without (?:any )?(?:treatment|change)",
    r"without (?:\w+ )?(?:contrast|gadolinium)"
    rf"(?: (?:medium|media|agent|material|enhancement(?! of\b)))?(?! {_OF_CONTRAST})",
    rf"no contrast(?! {_OF_CONTRAST})|non[ -]contrast",
)
"""Pseudo-triggers, which deny nothing."""
_BEFORE: Final = (
    rf"(?:no|without|lack of|absence of|negative for|neither|nor) (?:any )?{_EVIDENCE}",
    r"(?:complete |total )?(?:lack|absence) of",
    r"(?:complete|total|full) regression of",
    r"(?:(?<!high )(?<!high-)resolution|disappearance|cessation) of",
    r"(?:rules?|ruled|ruling) out",
    r"(?:excludes|excluded|excluding|denies|denied)",
    rf"(?:did|does|do){_NOT} "
    r"(?:show|reveal|demonstrate|detect|identify|disclose|display|have|depict|suggest|indicate|cause)",
    r"not (?:have|having|show\w*|reveal\w*|demonstrat\w*|associated with)",
    r"(?:failed|fails) to (?:show|reveal|demonstrate|detect|identify|disclose)",
    rf"(?:is|are|was|were){_NOT} (?:any|an?|evidence of)",
    r"no longer(?: any)?",
    r"negative for",
    r"free (?:of|from)",
    r"without(?: any)?",
    r"no|absent|neither|nor|never",
)
"""Triggers that stand before what they deny."""
_AFTER: Final = (
    rf"{_BE}(?: not|n['’]t| no longer| never) (?:be )?(?:(?:clearly|definitely) )?{_SEEN}",
    rf"(?:cannot|can not|could not) be (?:clearly )?{_SEEN}",
    rf"not (?:clearly )?{_SEEN}",
    rf"{_BE} (?:ruled out|excluded|absent|negative|unlikely)",
    r"(?:had|has|have|was|were|is|are) "
    r"(?:(?:completely|fully|entirely) (?:resolved|disappeared)|disappeared completely)",
    r"(?:had|has|have) (?:(?:now|since|spontaneously) )?(?:resolved|disappeared|vanished)",
    r"(?:completely|fully) (?:resolved|disappeared)",
    # Not "largely disappeared", "time-resolved" or "which resolved the stenosis".
    r"(?<!ly )(?<!almost )(?:disappeared|vanished)",
    r"(?<!ly )(?<!-)resolved(?=[.,;]|$| (?:after|at|by|following|on|spontaneously|within)\b)",
)
"""Triggers that stand after what they deny."""
_STATE: Final = r"(?:calcif|collaps|compress|dilat|displac|enhanc|enlarg|fractur|obstruct|occlu|stenos|thicken|widen)"
_WORD: Final = rf"non[- ](?!contrast)(?=[^\W\d_])|(?:is|are|was|were|does|do|did){_NOT} (?={_STATE})"
"""What denies the next word only: a non-displaced fracture is a fracture, and so is one that is not displaced."""
_FREE: Final = r"-free"
"""What denies the word before it: tumor-free margins."""
_JOINED: Final = re.compile(
    r"\b(?:non(?=dilat|displac|enlarg|obstruct|ruptur)|un(?=displac|obstruct|ruptur))", re.IGNORECASE
)
_PART: Final = re.compile(r"\bnon[- ]?(?:calcif|enhanc)\w*", re.IGNORECASE)
_NEXT: Final = re.compile(r"\w+")
_LAST: Final = re.compile(r"\w+\Z")
_TRIGGER: Final = re.compile(
    rf"\b(?:(?P<word>{_WORD})|(?:{'|'.join(_NOTHING)}|(?P<before>{'|'.join(_BEFORE)})|(?P<after>{'|'.join(_AFTER)})"
    rf"|(?<=\w)(?P<free>{_FREE}))\b)",
    re.IGNORECASE,
)
# "Evidence of" belongs to the finding; any other "of" leads from the finding to where it is.
_OF: Final = r"(?<!evidence )(?<!sign )(?<!signs )(?<!formation )(?<!area )(?<!areas )of"
_PREPOSITIONS: Final = (
    r"in|within|at|to|from|on|over|after|before|during|since|due|by|for|with|into|between|around|near|under|above|below|"
    rf"along|through|throughout|across|surrounding|outside|inside|following|upon|{_OF}"
)
_VERBS: Final = (
    r"is|are|was|were|be|been|has|have|had|shows?|showing|showed|shown|demonstrat\w+|reveal\w+|seen|noted|observed|"
    r"identified|detected|visuali[sz]ed|suggest\w*|indicat\w+|consistent|compatible|measur\w+|causing|caused|confirm\w+|"
    r"can|could|may|but|however|although|though|except|yet|while|whereas|which|who|that|because|therefore|apart|then|"
    r"despite|accompanied|resulting|only|arrows?|arrowheads?"
)
_STOP: Final = re.compile(
    rf"(?<!\d)\.|\.(?!\d)|[;:!?()\[\]]|\b(?:{_PREPOSITIONS}|{_VERBS}|no|without)\b", re.IGNORECASE
)
_GOES_ON: Final = re.compile(r",? (?:or|nor) ", re.IGNORECASE)
_COMMA: Final = re.compile(r",(?!\d)")
_ADJECTIVE: Final = re.compile(
    r"\b(?:large|huge|small|tiny|big|soft|thick|thin|dense|solid|round|oval|long|new|clear|mild|moderate|diffuse|"
    r"discrete|high|low|(?!signal$)\w+(?:ed|al|ous|ic|ile|ive|(?<!m)ent|ant|ar|ary|oid|like))$",
    re.IGNORECASE,
)
_CLAUSE: Final = re.compile(rf"\([^()]*\)|(?P<ends>[.;:!?()\[\],]|\b(?:{_VERBS}|and|with|there)\b)", re.IGNORECASE)
"""Where a clause begins; what stands in brackets within it begins none."""
_LEADS: Final = re.compile(rf"\b(?:in|within|at|on|from|{_OF})\b", re.IGNORECASE)
