"""Which option an answer chooses: our own rules, deterministic, and nothing is guessed.

An answer is read in this order; the first step that finds anything decides, and a step that finds two
different options ends with "not understood":

1. it is a letter and nothing else: ``B``, ``b``, ``(B)``, ``B.``;
2. it is the text of an option and nothing else;
3. it begins with a letter set apart: ``B. Liver``, ``B: the liver``, ``(b) liver``, ``B Liver`` where that is
   B's text;
4. it declares a letter, or the text of an option: ``the answer is (B)``, ``Answer: liver``, ``option B is
   correct``, ``答案是B``, ``选B``. What is negated ("the answer is not A") does not count;
5. it names the letter of an option in brackets or after "option";
6. its first sentence is the text of an option: ``False. The scale ...``;
7. it is short (:data:`SHORT` words) and names the text of exactly one option as whole words, the longest
   first: "MR angiography" names that option and not MR, "12" does not name 2, "not the liver" does not name
   liver; where the options are yes and no, by the rules of ``yes_no``.

A letter that stands before the text of another option ("A. Lung" where A is liver) contradicts itself and is
not understood.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import TypeVar

from gmai_xtuner.evaluate.questions import IMAGE_MARK, Question, Score, Scorer
from gmai_xtuner.evaluate.scoring.text import NO, YES, Mentions, clean, normalised, yes_or_no

Key = TypeVar("Key", bound=Hashable)

SHORT = 40
"""Words of an answer up to which the mere mention of an option counts as choosing it."""

_ALONE = re.compile(r"[\[({<]*\s*([A-Za-z])\s*[\])}>]*[.,:;)!、。]*")
_LEADING = re.compile(
    r"(?:[\[(]\s*([A-Za-z])\s*[\])][.,:、]?|([A-Za-z])\s*(?:[.:)、。：]|,(?=\s)|\n|\s-\s))\s*(.*)",
    re.DOTALL,
)
_LETTER = r"[\[({\"'“‘]*(?<![A-Za-z0-9])([A-Za-z])(?![A-Za-z0-9'’-])"
_CUE = (
    r"(?:\b(?:answer|choice|option)(?:\s+(?:to\s+(?:this|the)\s+question|here))?"
    r"(?:\s+(?:is|would\s+be|should\s+be|must\s+be|was)|\s*=)"
    # "each option:\n\nA. ..." announces a list
    r"|\b(?:answer|(?:correct|right|best|final|chosen|my)\s+(?:choice|option))\s*:"
    r"|\b(?:i(?:\s+would|'d)?\s+(?:choose|select|pick|say)|(?:i\s+)?(?:go|going)\s+with)\b,?"
    r"|(?:答案|选项|选择|正确(?:答案|选项)|应)(?:应该|应当|应)?(?:是|为|选)?\s*:?"
    r"|(?:应选|故选|选))"
)
_DECLARED_LETTER = re.compile(
    rf"{_CUE}\s*(?:that\s+)?(?:most\s+likely\s+|probably\s+)?(?:the\s+)?"
    rf"(?:option|choice|letter|answer|选项)?\s*:?\s*{_LETTER}",
    re.IGNORECASE,
)
# "it is B", "是B": weaker words, so nothing may follow
_IT_IS_LETTER = re.compile(
    r"(?:\b(?:[Ii]t|[Tt]his|[Tt]hat)(?:\s+is|'s)|\b(?:[Tt]herefore|[Tt]hus|[Hh]ence|[Ss]o),?|(?<!不)是)\s*"
    r"(?:option\s+)?[\[(\"]*([A-Z])[\])\"]*(?=\s*(?:[.,;:!。]|$))"
)
# at the beginning of a sentence or behind a word that announces it: not "hepatitis B is most likely"
_CORRECT_LETTER = re.compile(
    r"(?:^|[.,;:!?\n\[(\"]\s*|\b(?:[Oo]ption|[Cc]hoice|[Ll]etter|that|so|therefore|think|believe)\s+)[\[(\"]*"
    r"([A-Z])[\])\"]*\s*(?:is|would\s+be|seems(?:\s+to\s+be)?|appears\s+to\s+be)\s+(?:the\s+)?"
    r"(?:correct|right|best|answer|most\s+(?:likely|appropriate|accurate|plausible))"
    r"\s*(?:answer|option|choice|one\b|because|since|as\b|[.,;:!\n]|$)",
)
_CORRECT_CHINESE = re.compile(r"(?<![A-Za-z])([A-Z])\s*(?:是|为)?(?:选项)?(?:正确|对的|是答案)")
_DECLARED_TEXT = re.compile(
    r"(?:\banswer(?:\s+(?:is|would\s+be|should\s+be)|\s*:)|答案(?:是|为|:)+)\s*(?:that\s+)?:?\s*([^\n]+)",
    re.IGNORECASE,
)
_NAMED_LETTER = re.compile(
    r"[\[(]([A-Z])[\])]|\b(?:[Oo]ption|[Cc]hoice|选项)\s*[\[(]?([A-Z])\b(?![-'’])"
)
_FIRST_SENTENCE = re.compile(r"\n|(?<=\D)[.。!](?:\s|$)")
_LIST_LETTER = re.compile(r"[\[(]([a-z])[\])]")
_LETTER_ENDS = re.compile(r"[\])}\"'’”.,;:!]|\s*$")
# "the answer is A or B", "答案是A和B"
_JOINED = re.compile(r"[\])}]*\s*(?:,|and|or|/|&|和|或|、)\s*[\[(]*([A-Z])\b(?!\s+[a-z])")
_LAST_LINE = re.compile(r"\n\s*([^\n]+?)\s*$")
_NEGATED_BEFORE = re.compile(
    r"(?:\b(?:not|isn't|isnt|never|no|cannot\s+be|can't\s+be|excludes?|excluding|rules?\s+out|ruled\s+out|nor"
    r"|neither|rather\s+than|instead\s+of)|不(?:是|选|为|会是)?|并非|排除|非)\s*(?:the\s+)?(?:option|choice|选项)?\s*[\[(\"']*$",
    re.IGNORECASE,
)
_NEGATED_AFTER = re.compile(
    r"^[\])}\"'.]*\s*(?:is|are|was|would\s+be|seems?)?\s*(?:not|n't|incorrect|wrong|false|unlikely|excluded|"
    r"ruled\s+out|isn't|不(?:正确|对|是)|错)",
    re.IGNORECASE,
)
# "A 45-year-old", "a large mass": an article, not a letter
_ARTICLE_AFTER = re.compile(
    r"^\s+(?!(?:is|was|because|since|as|and|or|which|for|due|with|not|seems)\b)[a-z0-9]"
)


def choose(
    question: Question, answer: str, *, letters: bool = True, texts: bool = True
) -> str | None:
    """Return the letter of the option that an answer chooses; None where it is not understood.

    Args:
        question: with options.
        answer: what the model said.
        letters: read letters.
        texts: read the texts of options.
    """
    # an option that is an image can be named by its letter alone
    options = {
        letter: "" if IMAGE_MARK in option else option
        for letter, option in question.lettered().items()
    }
    text = clean(answer)
    if not text:
        return None
    if letters and (alone := _ALONE.fullmatch(text)):
        letter = _known(alone[1], options)
        if letter or not words_of(options, text):
            return letter
    if texts and (whole := _verbatim(options, text)):
        return _only(whole)
    if letters and (leading := _leading(text, options, texts=texts)) is not _NOTHING:
        return leading
    if texts and (whole := words_of(options, text)):
        return _only(whole)
    if letters and (found := _declared_letters(text, options)):
        return _only(found)
    if texts and (found := _declared_texts(text, options)):
        return _only(found)
    if letters and (found := _named_letters(text, options)):
        return _only(found)
    if texts and (first := words_of(options, _FIRST_SENTENCE.split(text, maxsplit=1)[0])):
        return _only(first)
    if texts and (polar := _polar(options)):
        said = yes_or_no(text)
        return polar[said] if said else None
    if texts and len(text.split()) <= SHORT:
        return _only(mentioned(text, {letter: (option,) for letter, option in options.items()}))
    return None


def words_of(options: Mapping[str, str], text: str) -> set[str]:
    """Return the letters of the options whose words a text is; case decides where nothing else differs."""
    if exact := _verbatim(options, text):
        return exact
    said = normalised(text)
    return _same(
        {letter for letter, option in options.items() if said and normalised(option) == said},
        options,
    )


def _verbatim(options: Mapping[str, str], text: str) -> set[str]:
    """Return the letters of the options that a text is, but for outer spaces, a last full stop, and case."""
    for same in (str.strip, str.casefold):
        said = same(text.strip().rstrip(".。"))
        found = {
            letter
            for letter, option in options.items()
            if said and same(option.strip().rstrip(".。")) == said
        }
        if found:
            return _same(found, options)
    return set()


def mentioned(text: str, names: Mapping[str, Iterable[str]]) -> set[str]:
    """Return the keys whose name stands in a text as whole words, not negated, not part of a longer one.

    Args:
        text: the answer, cleaned.
        names: key -> the texts that it goes by.
    """
    mentions = Mentions(text)
    return unnegated(
        [
            (start, end, negator, key)
            for key, texts in names.items()
            for name in texts
            for start, end, negator in mentions.of(normalised(name))
        ]
    )


def unnegated(places: Sequence[tuple[int, int, int | None, Key]]) -> set[Key]:
    """Return the keys of the places that are neither negated nor part of a longer one.

    A negation that belongs to a longer place ("No abnormality" as an option) negates nothing else.

    Args:
        places: (start, end, place of the word that negates, key).
    """

    def within(first: int, last: int, length: int) -> bool:
        return any(
            start <= first and last <= end and end - start > length for start, end, _, _ in places
        )

    return {
        key
        for start, end, negator, key in places
        if (negator is None or within(negator, negator + 1, 1))
        and not within(start, end, end - start)
    }


def _polar(options: Mapping[str, str]) -> dict[str, str] | None:
    """Return the letters of yes and no, where those are the options: "No mass is seen" chooses neither."""
    letters = {option.strip().casefold(): letter for letter, option in options.items()}
    return letters if len(options) == 2 and set(letters) == {YES, NO} else None


_NOTHING = "nothing"


def _leading(text: str, options: Mapping[str, str], *, texts: bool) -> str | None:
    match = _LEADING.match(text)
    rest = ""
    letter: str | None = None
    if match:
        letter = _known(match[1] or match[2], options)
        rest = match[3]
    elif texts:  # "B Liver"
        first, _, rest = text.partition(" ")
        letter = _known(first, options) if len(first) == 1 else None
        if letter and letter not in words_of(options, rest):
            letter = None
    if letter is None:
        return _NOTHING
    line, _, below = rest.partition("\n")
    if texts and (named := words_of(options, line)):
        if letter not in named:
            return None
        rest = below  # letters within the option's own text choose nothing
    others = _declared_letters(rest, options) | _leading_letters(rest, options)
    if match and (match[1] or match[2]).islower():  # "(a) The force is 5 N. (b) ...": a list
        others |= {
            found.upper() for found in _LIST_LETTER.findall(rest) if found.upper() in options
        }
    return letter if others <= {letter} else None


def _leading_letters(rest: str, options: Mapping[str, str]) -> set[str]:
    """Return the letters that begin further lines ("A. yes\\nB. no"), or follow at once ("A, B and C")."""
    found = set()
    for line in rest.split("\n"):
        line = line.strip()
        match = _LEADING.match(line) or _ALONE.fullmatch(line)
        letter = next((group for group in match.groups()[:2] if group), "") if match else ""
        if letter.isupper() and letter in options:
            found.add(letter)
    together = re.match(r"(?:and\s+|or\s+|&\s*|和)?\(?([A-Z])\b(?:[),.]|\s+(?:and|or)\b|$)", rest)
    if together and together[1] in options:
        found.add(together[1])
    return found


def _declared_letters(text: str, options: Mapping[str, str]) -> set[str]:
    found: set[str] = set()
    for pattern in (_DECLARED_LETTER, _IT_IS_LETTER, _CORRECT_LETTER, _CORRECT_CHINESE):
        for match in pattern.finditer(text):
            found |= _declared(match[1], text[: match.start(1)], text[match.end(1) :], options)
    if not found and (last := _LAST_LINE.search(text)) and (alone := _ALONE.fullmatch(last[1])):
        letter = _known(alone[1], options)
        return {letter} if letter else set()
    return found


def _declared(said: str, before: str, after: str, options: Mapping[str, str]) -> set[str]:
    """Return the letters that one declaration means: none, one, or several where it contradicts itself.

    Args:
        said: the letter.
        before: the text before it.
        after: the text behind it.
        options: letter -> text.
    """
    letter = _known(said, options)
    if letter is None or _NEGATED_BEFORE.search(before) or _NEGATED_AFTER.match(after):
        return set()
    if said.islower() and not _LETTER_ENDS.match(after):
        return set()  # "the answer is a liver"
    if named := _named_after(after, options) - {letter}:
        # "the answer is B (liver)" where B is lung
        return named | {letter} if letter not in _named_after(after, options) else {letter}
    if (
        said in ("A", "I")
        and _ARTICLE_AFTER.match(after)
        and letter not in _named_after(after, options)
    ):
        return set()  # "the answer is A large mass", "so I think"
    joined = _JOINED.match(after)
    return {letter, joined[1]} if joined and joined[1] in options else {letter}


def _named_after(after: str, options: Mapping[str, str]) -> set[str]:
    """Return the letters of the options whose text follows at once, up to the end of the line or sentence."""
    rest = re.split(r"\n|(?<=[^\d])\.(?:\s|$)", after.lstrip(")]}.:, -"), maxsplit=1)[0]
    return words_of(options, rest.strip(" ()[]\"'"))


def _declared_texts(text: str, options: Mapping[str, str]) -> set[str]:
    found = set()
    for match in _DECLARED_TEXT.finditer(text):
        rest = re.split(r"(?<=\D)\.(?:\s|$)|。", match[1], maxsplit=1)[0]
        found |= words_of(options, rest) or mentioned(
            rest, {letter: (option,) for letter, option in options.items()}
        )
    return found


def _named_letters(text: str, options: Mapping[str, str]) -> set[str]:
    found = set()
    for match in _NAMED_LETTER.finditer(text):
        letter = match[1] or match[2]
        start = match.start(1) if match[1] else match.start(2)
        after = text[start + 1 :]
        if (
            letter in options
            and not _NEGATED_BEFORE.search(text[:start])
            and not _NEGATED_AFTER.match(after)
        ):
            found.add(letter)
    return found


def _known(letter: str, options: Mapping[str, str]) -> str | None:
    return letter.upper() if letter.upper() in options else None


def _same(letters: set[str], options: Mapping[str, str]) -> set[str]:
    """Reduce letters whose options read the same to one: either is right or wrong with the other."""
    if letters and len({options[letter] for letter in letters}) == 1:
        return {min(letters)}
    return letters


def _only(letters: set[str]) -> str | None:
    return next(iter(letters)) if len(letters) == 1 else None


def has_options(question: Question) -> bool:
    """Tell whether a question has options."""
    return bool(question.options)


def _scorer(name: str, description: str, **read: bool) -> Scorer:
    def score(question: Question, answer: str) -> Score:
        letter = choose(question, answer, **read)
        return Score(float(letter is not None and letter in question.gold_letters()), letter)

    return Scorer(name, 1, description, score, has_options)


CHOICE = _scorer(
    "choice", "the option that the answer's letter or text names; none where two are named"
)
OPTION_LETTER = _scorer("option_letter", "the option that the answer's letter names", texts=False)
OPTION_TEXT = _scorer("option_text", "the option that the answer's text names", letters=False)
