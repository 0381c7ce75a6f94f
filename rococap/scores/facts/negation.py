"""Which findings a caption denies, and which it names without denying them.

After NegEx (Chapman et al., "A simple algorithm for identifying negated findings and diseases in discharge summaries",
Journal of Biomedical Informatics 34:301-310, 2001) and its terms of 2013 (Chapman et al., "Extending the NegEx lexicon
for multiple languages", MEDINFO 2013): a trigger denies the findings in its scope, pseudo-triggers deny nothing. The
scope here is that of a caption, which packs more into a sentence than a report: it ends at a preposition, a verb or a
conjunction such as "but", and at a comma unless the list goes on to an "or".
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
        (denied if one.end <= reach else affirmed).add(one.name)
    return frozenset(denied), frozenset(affirmed)


def _scopes(folded: str) -> Iterator[tuple[int, int]]:
    """The parts of a text that are denied, as (start, end)."""
    for trigger in _TRIGGER.finditer(folded):
        match trigger.lastgroup:
            case "before":
                yield trigger.end(), _forward(folded, trigger.end())
            case "after":
                yield _backward(folded, trigger.start()), trigger.start()


def _forward(folded: str, start: int) -> int:
    """Where the scope of a trigger that stands before its findings ends."""
    ahead = folded[start : start + _REACH]
    end = stop.start() if (stop := _STOP.search(ahead)) else len(ahead)
    comma = ahead.find(",", 0, end)
    if comma >= 0 and not _GOES_ON.search(ahead, comma, end):
        end = comma
    return start + end


def _backward(folded: str, end: int) -> int:
    """Where the scope of a trigger that stands after its findings begins: at the subject of its clause."""
    first = max(0, end - _REACH)
    behind = folded[first:end]
    stops = [stop.end() for stop in _CLAUSE.finditer(behind)]
    return first + (stops[-1] if stops else 0)


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
_NOTHING: Final = (
    r"no (?:(?:significant|interval|further|appreciable) )*"
    r"(?:change|increase|decrease|difference|progression|doubt|mention)",
    r"(?:not|cannot|can not|could not|does not|do not|did not) (?:be )?(?:(?:entirely|completely|definitely) )?"
    r"(?:exclude|excluded|rule out|ruled out)",
    r"not (?:only|necessarily|certain|shown|pictured|included|to scale)",
    r"no \d+",
    r"without (?:any )?(?:treatment|change)",
    r"without (?:\w+ )?(?:contrast|gadolinium)(?: (?:medium|media|agent|material|enhancement))?",
    r"non?[ -]contrast",
)
"""Pseudo-triggers, which deny nothing."""
_BEFORE: Final = (
    rf"(?:no|without|lack of|absence of|negative for|neither|nor) (?:any )?{_EVIDENCE}",
    r"(?:complete |total )?(?:lack|absence) of",
    r"(?:complete|total|full) regression of",
    r"(?:(?<!high )(?<!high-)resolution|disappearance|cessation) of",
    r"(?:rules?|ruled|ruling) out",
    r"(?:excludes|excluded|excluding|denies|denied)",
    r"(?:did|does|do) not "
    r"(?:show|reveal|demonstrate|detect|identify|disclose|display|have|depict|suggest|indicate|cause)",
    r"not (?:have|having|show\w*|reveal\w*|demonstrat\w*|associated with)",
    r"(?:failed|fails) to (?:show|reveal|demonstrate|detect|identify|disclose)",
    r"no longer(?: any)?",
    r"negative for",
    r"free (?:of|from)",
    r"without(?: any)?",
    r"no|absent|neither|nor|never",
)
"""Triggers that stand before what they deny."""
_AFTER: Final = (
    rf"{_BE} (?:not|no longer|never) (?:be )?(?:(?:clearly|definitely) )?{_SEEN}",
    rf"(?:cannot|can not|could not) be (?:clearly )?{_SEEN}",
    rf"not (?:clearly )?{_SEEN}",
    rf"{_BE} (?:ruled out|excluded|absent|negative|unlikely)",
    r"(?:had|has|have|was|were|is|are) "
    r"(?:(?:completely|fully|entirely) (?:resolved|disappeared)|disappeared completely)",
    r"(?:completely|fully) (?:resolved|disappeared)",
)
"""Triggers that stand after what they deny."""
_TRIGGER: Final = re.compile(
    rf"\b(?:{'|'.join(_NOTHING)}|(?P<before>{'|'.join(_BEFORE)})|(?P<after>{'|'.join(_AFTER)}))\b", re.IGNORECASE
)
_PREPOSITIONS: Final = (
    r"in|within|at|to|from|on|over|after|before|during|since|due|by|for|with|into|between|around|near|under|above|below|"
    r"along|through|throughout|across|surrounding|outside|inside|following|upon|of"
)
_VERBS: Final = (
    r"is|are|was|were|be|been|has|have|had|shows?|showing|showed|shown|demonstrat\w+|reveal\w+|seen|noted|observed|"
    r"identified|detected|visuali[sz]ed|suggest\w*|indicat\w+|consistent|compatible|measur\w+|causing|caused|confirm\w+|"
    r"can|could|may|but|however|although|though|except|yet|while|whereas|which|who|that|because|therefore|apart|then|"
    r"despite|accompanied|resulting|only|arrows?|arrowheads?"
)
# "Evidence of" and the like belong to the trigger; any other "of" leads from the finding to where it is.
_STOP: Final = re.compile(rf"[.;:!?()\[\]]|\b(?:{_PREPOSITIONS}|{_VERBS}|no|without)\b", re.IGNORECASE)
_GOES_ON: Final = re.compile(r",? (?:or|nor) ", re.IGNORECASE)
_CLAUSE: Final = re.compile(
    rf"[.;:!?()\[\],]|\b(?:{_VERBS}|and|in|within|at|on|with|of|from|there)\b",
    re.IGNORECASE,
)
