"""How answers are written before they are compared: that of exact match, of VQA accuracy, and of CIDEr."""

import re
from itertools import product

_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
# who counts nothing says "none"
_NUMBERS = {"none": "0"} | {word: str(number) for number, word in enumerate(_DIGITS)}
_ARTICLES = {"a", "an", "the"}
_MARKS = re.compile(r"[;/\[\]\"{}()=+\\_\->\<@`,?!]")
_CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's i'd've isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't needn't
    not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll
    somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd
    there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll
    what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't
    would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""


def _without_apostrophes(word: str) -> list[str]:
    """Returns a contraction with each choice of its apostrophes left out, the whole one included."""
    first, *rest = word.split("'")
    choices = product(("'", ""), repeat=len(rest))
    return [first + "".join(mark + part for mark, part in zip(marks, rest, strict=True)) for marks in choices]


_WHOLE = {short: word for word in _CONTRACTIONS.split() for short in _without_apostrophes(word)}

# what CoreNLP's tokenizer cuts off a word: the man 's, is n't
_CLITIC = r"(?:n't|'(?:s|m|d|re|ve|ll))(?!\w)"
_CAPTION_WORD = re.compile(
    rf"""{_CLITIC} | '\d0s                                                      # 's, '50s
    | can(?=not\b) | (?:gon|wan)(?=na\b) | got(?=ta\b) | (?:gim|lem)(?=me\b)    # can not, gon na
    | (?:[a-z]\.)+(?:[a-z]\b|(?!\w))                                            # p.m., t.v
    | (?:mr|mrs|ms|dr|st|mt|jr|sr|vs|etc|ave|blvd|ft)\.(?!\w) | no\.(?=\ ?\d)   # st. bernard, no. 5
    | \w+?(?={_CLITIC})
    | (?:\d+(?:[.,:/]\d+)+|[odl]'\w+|ma'am|\w+)(?:[-/.]\w+)*                    # 10:30, o'clock, black-and-white
    | \.\d+
    | [^\s\w.,:;?!'"`-]                                                         # $ & (""",
    re.VERBOSE,
)
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}


def plain_answer(text: str) -> str:
    """Returns an answer in lower case, with single spaces and without a full stop at its end.

    Example:
        >>> plain_answer(" The answer is B. ")
        'the answer is b'
    """
    return " ".join(text.lower().split()).rstrip(".")


def vqa_answer(text: str) -> str:
    """Returns an answer as VQA accuracy compares it.

    Lower case; numbers up to ten as digits; no articles; apostrophes added where a contraction lacks them; no full
    stops but decimal points; other punctuation as a space, apart from apostrophes and colons. Where punctuation stands
    beside a space, or a comma within a number, it goes without a space.

    Source: Antol et al., 2015, "VQA: Visual Question Answering", arXiv 1505.00468, section 3, and the rules of the
    challenge, https://visualqa.org/evaluation.html.

    Example:
        >>> vqa_answer("The two red-haired ones, arent they?")
        "2 red haired ones aren't they"
    """
    text = " ".join(text.split())
    has_thousands = re.search(r"\d,\d", text) is not None

    def instead(match: re.Match[str]) -> str:
        mark = match[0]
        return "" if has_thousands or f"{mark} " in text or f" {mark}" in text else " "

    cleaned = re.sub(r"\.(?!\d)", "", _MARKS.sub(instead, text)).lower()
    words = [_NUMBERS.get(word, word) for word in cleaned.split()]
    return " ".join(_WHOLE.get(word, word) for word in words if word not in _ARTICLES)


def caption_words(text: str) -> str:
    """Returns a caption as CIDEr takes it: words with spaces between them, in lower case, without punctuation.

    Source: Chen et al., 2015, "Microsoft COCO Captions: Data Collection and Evaluation Server", arXiv 1504.00325,
    section 3.1: the tokenizer of Stanford CoreNLP, then punctuation is removed.

    Differs from the paper: CoreNLP needs Java. These are its rules for what captions contain, among them clitics,
    numbers, hyphens and the abbreviations named above; rarer ones, such as months, web addresses and emoticons, are cut
    otherwise.

    Example:
        >>> caption_words("A man's dog isn't on the t-shirt (it sleeps).")
        "a man 's dog is n't on the t-shirt -lrb- it sleeps -rrb-"
    """
    found = _CAPTION_WORD.findall(text.lower().replace("\N{RIGHT SINGLE QUOTATION MARK}", "'"))
    return " ".join(_BRACKETS.get(word, word) for word in found)
