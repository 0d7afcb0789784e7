# SPDX-License-Identifier: Apache-2.0

"""Which option an answer chooses: our own rules, deterministic, and nothing is guessed.

:data:`STEPS` are tried in their order. The first that finds anything decides; one that finds two different
options ends with "not understood":

1. ``alone``: the answer is a letter or exactly the text of an option: ``B``, ``(b)``, ``Option B.``;
2. ``leading``: it begins with a letter set apart: ``B. Liver``, ``B: the liver``, ``B because ...``; then
   ``whole``: it has the words of an option and no others;
3. ``declared``: it declares a letter or a text (:data:`DECLARATIONS`): ``the answer is (B)``, ``答案是B``;
4. ``bare``: a sentence has a letter and only words that say that it is the answer: ``Most likely B.``; then
   ``last_line``: its last line is a letter or an option's text;
5. ``named``: it names a letter in brackets or after "option";
6. ``first_sentence``: its first sentence is the text of an option;
7. ``yes_no``: where the options are yes and no, by the rules of ``yes_no``;
8. ``mentioned``: it is short (:data:`SHORT` words), or its last sentence concludes, and it names the text of
   one option as whole words, the longest first: "MR angiography" is not MR, "12" is not 2.

What is denied, supposed, compared, asked or reported (:mod:`.mentions`) is no choice; a refusal leaves only
what is declared. A letter before the text of another option ("A. Lung" where A is liver) contradicts itself
and is not understood. A list of all options chooses none of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

from gmai_xtuner.evaluate.questions import IMAGE_MARK, Question, Score, Scorer
from gmai_xtuner.evaluate.scoring.mentions import (
    AFTER,
    NO,
    YES,
    Mention,
    affirmed,
    cancelled_by,
    is_asserted,
    mentions,
    yes_or_no,
)
from gmai_xtuner.evaluate.scoring.mentions import RULES as MENTION_RULES
from gmai_xtuner.evaluate.scoring.text import (
    TABLES,
    Words,
    agreed,
    patterns,
    plain,
    same_quantity,
    stems,
)

SHORT = 40
"""Words of an answer up to which the mere mention of an option counts as choosing it."""

RULES = patterns("choice")
DECLARATIONS = patterns("declarations")
CUES = {name: cue.pattern.removeprefix("(?i)") for name, cue in DECLARATIONS.items()}
"""Name -> what declares the answer that follows at once."""
_FILLER = RULES["filler"].pattern
_DECLARED = {name: re.compile(rf"(?i)(?:{cue})\s*{_FILLER}") for name, cue in CUES.items()}
_CUE_WORDS: Mapping[str, Sequence[str]] = TABLES["cue_words"]
_CHOOSES_ZH = "选"
_FOR_LETTERS_ALONE = {"choice: on its line", "answer B", "choose"}
"""Keys of ``declarations`` in rules.yaml behind which a letter is read, and no text; behind `_CHOOSES_ZH` the
text of an option is read, and not one that is only mentioned."""
_OF_LETTERS = "it_is_letter correct_letter correct_chinese not_a_but_b preferred ticked"
_LETTER_PATTERNS = [RULES[name] for name in _OF_LETTERS.split()]

Found = set[str]


@dataclass
class Reading:
    """An answer, cleaned, and what it may choose: ``options``, by their ``letters`` and ``texts``.

    The text of an option that is an image is empty: its letter alone names it.
    """

    text: str
    options: Mapping[str, str]
    letters: bool = True
    texts: bool = True

    @cached_property
    def names(self) -> dict[str, tuple[Words, ...]]:
        """Letter -> the words of its option."""
        return {one: (stems(text),) for one, text in self.options.items() if self.texts}

    @cached_property
    def refused(self) -> re.Match[str] | None:
        """Where the answer refuses, unless within the name of an option."""
        found = MENTION_RULES["refusal"].search(self.text)
        if found is None or (self.texts and self.words_of(self.text)):
            return None
        inside = (one.start <= found.start() < one.end for one in mentions(self.text, self.names))
        return None if any(inside) else found

    @cached_property
    def cues(self) -> list[tuple[str, int, int]]:
        """Name, start and end of each declaration."""
        lower = self.text.lower()
        return [
            (name, *match.span())
            for name, cue in _DECLARED.items()
            if name not in _CUE_WORDS or any(word in lower for word in _CUE_WORDS[name])
            for match in cue.finditer(self.text)
        ]

    def words_of(self, text: str) -> Found:
        """Return the letters of the options whose words a text is; case decides between equal ones."""
        if not self.texts or not text.strip():
            return set()
        if (exact := self.verbatim(text)) or RULES["asked"].fullmatch(text):
            return exact
        said = stems(text)
        found = {letter for letter, (name,) in self.names.items() if said and name == said}
        if not found:  # "B and A" for "A and B"
            parts = _joined(said)
            found = {one for one, (name,) in self.names.items() if parts and _joined(name) == parts}
        if not found:
            joined = "".join(said)
            found = {
                one for one, (name,) in self.names.items() if joined and "".join(name) == joined
            }
        if not found:  # "type 1 diabetes mellitus"
            turned = {said[start:] + said[:start] for start in range(1, len(said))}
            found = {one for one, (name,) in self.names.items() if name in turned}
        if not found and len(said) < 6:
            found = {one for one, option in self.options.items() if same_quantity(text, option)}
        return _one_of_equals(found, self.options)

    def verbatim(self, text: str) -> Found:
        """Return the letters of the options that a text is, but for spaces, a last full stop, and case."""
        for same in (str.strip, str.casefold):
            said = same(_plainly(text))
            found = {one for one, name in self.options.items() if same(_plainly(name)) == said}
            if said and found:
                return _one_of_equals(found, self.options)
        return set()

    def mentioned(self, text: str) -> Found:
        """Return the letters of the options whose text is named, and not denied."""
        return _one_of_equals(affirmed(text, mentions(text, self.names)), self.options)

    def known(self, letter: str) -> str | None:
        return letter.upper() if letter.upper() in self.options else None


Step = Callable[[Reading], Found | None]


def _joined(said: Words) -> frozenset[str]:
    parts = " ".join(said).removeprefix("both ").replace(" plus ", " and ").split(" and ")
    return frozenset(parts) if len(parts) > 1 else frozenset()


@lru_cache(maxsize=1 << 12)
def _plainly(text: str) -> str:
    return plain(text).strip().rstrip(".。").strip()


def choose(
    question: Question, answer: str, *, letters: bool = True, texts: bool = True
) -> str | None:
    """Return the letter of the option that an answer chooses; None where it is not understood.

    ``letters`` and ``texts`` say whether the options' letters, and their texts, are read.
    """
    given = question.lettered()
    options = {one: "" if IMAGE_MARK in option else option for one, option in given.items()}

    def chosen(text: str) -> str | None:
        if letters and len(text) == 1 and text.upper() in given and text not in given.values():
            return text.upper()
        return read(text, options, letters=letters, texts=texts)

    return agreed(answer, chosen)


def read(
    text: str, options: Mapping[str, str], *, letters: bool = True, texts: bool = True
) -> str | None:
    """Return the letter of the option that a cleaned text chooses; arguments as of :func:`choose`."""
    text = (RULES["pardon"].sub("", text) if "if i" in text.lower() else text).strip()
    found = _by_steps(Reading(text, options, letters, texts))
    if corrections := [*RULES["corrected"].finditer(text)]:
        corrected = Reading(text[corrections[-1].end() :], options, letters, texts)
        last = _by_steps(corrected)
        if found is None or last == found:
            return last
        if last is None:
            return None if _takes_back(corrected, found) else found
        return last if _by_steps(corrected, (_alone, _leading, _declared)) == last else None
    return found


def _takes_back(corrected: Reading, chosen: str) -> bool:
    """Tell whether what follows "wait" names another letter, or denies the chosen one."""
    for match in RULES["letter_said"].finditer(corrected.text):
        is_denied = RULES["negated_before"].search(corrected.text[: match.start()])
        if match[1] in corrected.options and (match[1] != chosen or is_denied):
            return corrected.letters
    return False


def _by_steps(reading: Reading, steps: Sequence[Step] | None = None) -> str | None:
    if not reading.text.strip():
        return None
    for step in steps or STEPS:
        found = step(reading)
        if found is not None and (found or step is _leading):
            return next(iter(found)) if len(found) == 1 else None
    refused = reading.refused
    despite = refused and MENTION_RULES["despite"].search(reading.text, refused.end())
    if refused and MENTION_RULES["concedes"].search(reading.text[: refused.start()]):
        despite = re.compile(",").search(reading.text, refused.end())  # "While I can't ..., it is"
    if despite:
        rest = reading.text[despite.end() :].strip(" ,")
        after = Reading(rest, reading.options, reading.letters, reading.texts)
        if not MENTION_RULES["refusal"].search(rest):
            found = _declared(after)
            if not found and RULES["asserts"].search(rest):
                found = _mentioned(after)
            return next(iter(found)) if found and len(found) == 1 else None
    return None


def _alone(reading: Reading) -> Found | None:
    alone = RULES["alone"].fullmatch(reading.text) if reading.letters else None
    if letter := reading.known(alone[1]) if alone else None:
        return {letter}
    return reading.verbatim(reading.text) if reading.texts else None


def _whole(reading: Reading) -> Found | None:
    return reading.words_of(reading.text)


def _leading(reading: Reading) -> Found | None:
    """Read a letter at the beginning; an empty set where it contradicts what follows."""
    if not reading.letters:
        return None
    text = reading.text
    match = RULES["leading"].match(text)
    said, _, rest = text.partition(" ")  # "B Liver"
    if match:
        said, rest = match[1] or match[2] or match[3], match[4]
    line, _, below = rest.partition("\n")
    letter = reading.known(said) if match or len(said) == 1 else None
    if letter is None or not (match or letter in reading.words_of(line)) or _lists_options(reading):
        return None
    first, *after = RULES["sentence"].split(line, maxsplit=1)
    for part, behind in ((line, below), (first, "\n".join([*after, below]))):
        if named := reading.words_of(part.strip(" ()[]")):
            if letter not in named:
                return set()
            rest = behind  # letters within the option's own text choose nothing
            break
    else:
        behind = text[match.start(4) - 1 :] if match and match[3] is None and rest else ""
        if AFTER["verdict"].match(behind) or RULES["negated_after"].match(behind):
            return None
    others = _keys(_declared_letters(Reading(rest, reading.options, texts=False)))
    others |= _leading_letters(rest, reading.options)
    if match and (match[1] or match[2] or "A").islower():  # "(a) The force is 5 N. (b) ...": a list
        others |= set(map(str.upper, RULES["list_letter"].findall(rest))) & set(reading.options)
    return {letter} if others <= {letter} else set()


def _lists_options(reading: Reading) -> bool:
    """Tell whether an answer lists the options, or walks through them."""
    rules = (RULES["line_letter"], RULES["inline_letter"])
    letters = {one.upper() for rule in rules for one in rule.findall(reading.text)}
    found = letters & set(reading.options)
    weighed = set(RULES["weighed"].findall(reading.text)) & set(reading.options)
    return len(found) > 2 or len(found) == len(reading.options) or len(weighed) > 1


def _leading_letters(rest: str, options: Mapping[str, str]) -> Found:
    """Return the letters that begin further lines ("A. yes\\nB. no"), or follow at once ("A, B and C")."""
    found: Found = set()
    for line in map(str.strip, rest.split("\n")):
        match = RULES["leading"].match(line) or RULES["alone"].fullmatch(line)
        letter = next((group for group in match.groups()[:3] if group), "") if match else ""
        if len(letter) == 1 and letter.isupper() and letter in options:
            found.add(letter)
    together = RULES["together"].match(rest)
    return found | ({together[1].upper()} & set(options) if together else set())


Declared = tuple[int, Found]


def _declared(reading: Reading) -> Found | None:
    """Read what is declared; of contradicting declarations the last, if it says that it is final."""
    found = [*_declared_letters(reading), *_declared_texts(reading)]
    found.sort(key=lambda declared: declared[0])
    keys = _keys(found)
    if len(keys) > 1 and len(found[-1][1]) == 1:
        begin = max((place for place, one in found if not one & found[-1][1]), default=0)
        if RULES["final"].search(reading.text[begin : found[-1][0]]):
            return found[-1][1]
    return keys


def _keys(found: Sequence[Declared]) -> Found:
    return {key for _, keys in found for key in keys}


def _bare(reading: Reading) -> Found | None:
    """Read sentences of nothing but a letter and words that say that it is the answer."""
    found = RULES["bare"].finditer(reading.text) if reading.letters else ()
    return {letter for match in found if (letter := reading.known(match[1]))}


def _is_claimed(text: str, cue: int, end: int) -> bool:
    """Tell whether a declaration is made: not denied, supposed, asked or put into another's mouth."""
    sentence = re.split(r"[.;!?\n。](?!\d)", text[:cue])[-1]
    before = re.split(r"\b(?:but|however|so|therefore|thus|hence)\b", sentence)[-1]
    if RULES["unclaimed"].search(before):
        return False
    behind, sign, _ = re.split(r"([.;!\n。](?!\d)|[?？]|\Z)", text[end:], maxsplit=1)
    supposed = RULES["would_be"].search(text[cue:end]) and RULES["condition_behind"].search(behind)
    return sign not in ("?", "？") and not supposed


def _declared_letters(reading: Reading) -> list[Declared]:
    if not reading.letters:
        return []
    text, result = reading.text, []
    cued = ((start, RULES["letter"].match(text, end)) for _, start, end in reading.cues)
    found = [(start, match) for start, match in cued if match]
    found += [(match.start(1), match) for one in _LETTER_PATTERNS for match in one.finditer(text)]
    for start, match in found:
        keys = _meant(match[1], text[: match.start(1)], text[match.end(1) :], reading)
        if keys and _is_claimed(text, start, match.end()):
            result.append((start, keys))
    return result


def _meant(said: str, before: str, after: str, reading: Reading) -> Found:
    """Return the letters that a declared letter means: none, one, or several where it contradicts itself."""
    letter = reading.known(said)
    denied = RULES["negated_before"].search(before) or RULES["negated_after"].match(after)
    if letter is None or denied:
        return set()
    if said.islower() and not RULES["letter_ends"].match(after):
        return set()  # "the answer is a liver"
    named = _named_after(after, reading)
    if named - {letter}:
        # "the answer is B (liver)" where B is lung
        return {letter} if letter in named else named | {letter}
    if said in ("A", "I") and RULES["article_after"].match(after) and letter not in named:
        return set()  # "the answer is A large mass", "so I think"
    joined = RULES["joined"].match(after)
    return {letter, joined[1]} if joined and joined[1] in reading.options else {letter}


def _named_after(after: str, reading: Reading) -> Found:
    """Return the letters of the options whose text follows at once, up to the end of the line or sentence."""
    rest = RULES["sentence"].split(after.lstrip(")]}.:, -"), maxsplit=1)[0]
    return reading.words_of(rest.strip(" ()[]\"'"))


def _declared_texts(reading: Reading) -> list[Declared]:
    if not reading.texts:
        return []
    text, found = reading.text, []
    for name, start, end in reading.cues:
        if name in _FOR_LETTERS_ALONE:
            continue
        rest = RULES["sentence"].split(text[end:].lstrip("\n"), maxsplit=1)[0]
        keys = reading.words_of(rest.strip(" \"'()")) or _begins_with(rest, reading)
        if not keys and name != _CHOOSES_ZH:
            keys = reading.mentioned(rest)
        if keys and _is_claimed(text, start, end):
            found.append((start, keys))
    return found


def _begins_with(rest: str, reading: Reading) -> Found:
    """Return the option that a sentence begins with, unless another is joined to it."""
    all_mentions = mentions(rest, reading.names)
    opening = RULES["opening"].match(rest)
    start = opening.end() if opening else 0
    first = [one for one in all_mentions if one.start <= start <= one.end]
    if not first or cancelled_by(rest, first[0], all_mentions):
        return set()
    joined = RULES["joined_text"].fullmatch
    others = [one for one in all_mentions if joined(rest[first[0].end : one.start])]
    return _one_of_equals({one.key for one in (*first, *others)}, reading.options)


def _last_line(reading: Reading) -> Found | None:
    head, _, line = reading.text.rstrip().rpartition("\n")
    line = line.strip()
    if not head.strip() or not line:
        return None
    alone = RULES["alone"].fullmatch(line) if reading.letters else None
    if alone and (letter := reading.known(alone[1])):
        above = (RULES["alone"].fullmatch(one.strip()) for one in head.strip().split("\n"))
        return {letter} | {one[1].upper() for one in above if one}  # "A.\nB.\nC." lists
    if _lists_options(reading):
        return None
    if found := reading.words_of(line):
        return found
    leading = RULES["leading"].match(line) if reading.letters else None
    letter = reading.known(leading[1] or leading[2] or leading[3]) if leading else None
    return {letter} if leading and letter and letter in reading.words_of(leading[4]) else None


def _named(reading: Reading) -> Found | None:
    if not reading.letters or reading.refused:
        return None
    text = reading.text
    places = [
        Mention(letter, match.start(), match.end())
        for match in RULES["named_letter"].finditer(text)
        if (letter := match[1] or match[2] or match[3]) in reading.options
    ]
    if all(_is_label(reading, one) for one in places):
        return None
    denied = {
        one.key
        for one in places
        if RULES["negated_before"].search(text[: one.start])
        or RULES["negated_after"].match(text[one.end :])
        or cancelled_by(text, one, places)
    }
    found = {one.key for one in places} - denied
    texts = reading.mentioned(text)
    contradicts = found and texts and not texts & found  # "the lung (option A)"
    return found | texts if contradicts else found


def _is_label(reading: Reading, letter: Mention[str]) -> bool:
    """Tell whether a letter only labels its option's text in a sentence about it: "Lung (B) is for gas"."""
    own = (one for one in mentions(reading.text, reading.names) if one.key == letter.key)
    labelled = [one for one in own if not reading.text[one.end : letter.start].strip()]
    places = (Mention(letter.key, one.start, letter.end) for one in labelled)
    return any(not is_asserted(reading.text, one) for one in places)


def _first_sentence(reading: Reading) -> Found | None:
    if not reading.texts or reading.refused or reading.text.rstrip().endswith("?"):
        return None
    first = RULES["sentence"].split(reading.text, maxsplit=1)[0]
    return reading.words_of(first) if first != reading.text else None


def _yes_no(reading: Reading) -> Found | None:
    """Where yes and no are the options: "No mass is seen" chooses neither.

    Both letters, which is "not understood", if nothing is said: no later step is to guess.
    """
    polar = {option.strip().casefold(): letter for letter, option in reading.options.items()}
    if not reading.texts or len(reading.options) != 2 or set(polar) != {YES, NO}:
        return None
    said = yes_or_no(reading.text)
    return {polar[said]} if said else set(polar.values())


def _mentioned(reading: Reading) -> Found | None:
    if not reading.texts or reading.refused:
        return None
    text = reading.text
    if len(text.split()) > SHORT:
        tail = RULES["tail_sentence"].search(text)
        if tail is None or not RULES["concludes"].search(tail[1]):
            return None
        text = tail[1]
    found = reading.mentioned(text)
    places = mentions(text, reading.names)
    is_stated = any(one.key in found and is_asserted(text, one) for one in places)
    return found if is_stated else None


STEPS: tuple[Step, ...] = (
    _alone,
    _leading,
    _whole,
    _declared,
    _bare,
    _last_line,
    _named,
    _first_sentence,
    _yes_no,
    _mentioned,
)
"""The steps in their order. None or an empty set: the next one is tried. But an empty set of `_leading` means
a letter that contradicts what follows it, and the answer is not understood."""


def _one_of_equals(letters: set[str], options: Mapping[str, str]) -> Found:
    """Reduce letters whose options read the same to one: either is right or wrong with the other."""
    return {min(letters)} if len({options[letter] for letter in letters}) == 1 else letters


def has_options(question: Question) -> bool:
    """Tell whether a question has options."""
    return bool(question.options)


def _scorer(name: str, description: str, **may_read: bool) -> Scorer:
    def score(question: Question, answer: str) -> Score:
        letter = choose(question, answer, **may_read)
        return Score(float(letter is not None and letter in question.gold_letters()), letter)

    return Scorer(name, 5, description, score, has_options)


CHOICE = _scorer(
    "choice", "the option that the answer's letter or text names; none where two are named"
)
OPTION_LETTER = _scorer("option_letter", "the option that the answer's letter names", texts=False)
OPTION_TEXT = _scorer("option_text", "the option that the answer's text names", letters=False)
