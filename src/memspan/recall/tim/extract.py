"""From an exchange to thoughts: by a language model, or by rules of high precision and honest low recall."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol, runtime_checkable

from memspan.recall.chat import Chat, language_of, load_prompt
from memspan.recall.pack import as_data
from memspan.recall.records import Trust
from memspan.recall.text import is_chinese, sentences

if TYPE_CHECKING:
    from memspan.recall.memorybank import TraitReader

__all__ = ["Extractor", "Fact", "LLMExtractor", "RuleExtractor", "rule_traits"]


class Fact(NamedTuple):
    """A triple with its sentence and who stated it."""

    head: str
    relation: str
    tail: str
    text: str
    source: Trust = "user"
    confidence: float = 1.0


@runtime_checkable
class Extractor(Protocol):
    """An exchange -> facts."""

    calls_model: bool

    def __call__(self, query: str, response: str, at: datetime, name: str = "") -> list[Fact]:
        """Extract.

        Args:
            query: the user's words.
            response: the assistant's.
            at: when; dates such as "yesterday" are counted from here.
            name: the user's, "" where unknown.
        """
        ...


class LLMExtractor:
    """Facts by a language model, with a checked schema.

    Args:
        client: of the model.
    """

    calls_model = True

    def __init__(self, client: Chat) -> None:
        self.client = client

    def __call__(self, query: str, response: str, at: datetime, name: str = "") -> list[Fact]:
        """One call (one more where the answer is not valid).

        Raises:
            ChatFailed: no valid answer.
        """
        from pydantic import BaseModel, Field

        class One(BaseModel):
            head: str = Field(min_length=1, max_length=100)
            relation: str = Field(min_length=1, max_length=100)
            tail: str = Field(min_length=1, max_length=300)
            text: str = Field(min_length=1, max_length=300)
            source: Literal["user", "assistant"]

        class Facts(BaseModel):
            facts: list[One] = Field(max_length=50)

        prompt = load_prompt("thoughts", language_of(query + response))
        messages = prompt.messages(
            day=f"{at:%Y-%m-%d}",
            name=as_data(name or "the user"),
            question=as_data(query),
            response=as_data(response),
        )
        found = self.client.structured(messages, Facts)
        return [Fact(one.head, one.relation, one.tail, one.text, one.source) for one in found.facts]


class RuleExtractor:
    """Facts that people state about themselves in the first person, and recommendations of the assistant.

    Example:
        >>> from datetime import UTC
        >>> at = datetime(2023, 5, 2, tzinfo=UTC)
        >>> facts = RuleExtractor()("I live in Rome. I don't like tea.", "", at, "Linda")
        >>> [fact[:3] for fact in facts]
        [('Linda', 'lives in', 'Rome'), ('Linda', 'not likes', 'tea')]
    """

    calls_model = False

    def __call__(self, query: str, response: str, at: datetime, name: str = "") -> list[Fact]:
        """Extract; questions, quotations and conditions say nothing."""
        head = name or "The user"
        facts: list[Fact] = []
        for sentence in _statements(query):
            facts += _english(sentence, at, head) or _chinese(sentence, at, name or "用户")
        for sentence in _statements(response):
            facts += _advice(sentence)
        return list(dict.fromkeys(facts))


_TAIL = r"(?P<tail>[^.;:!?]+)"
_ADVERB = (
    r"(?:(?:really|also|absolutely|always|just|still|very much|recently|finally|usually|often|now|currently"
    r"|actually|have|has|instead) )*"
)
_NOW = r"(?:now |actually |currently |no longer a secret: )?"
_FROM = r"(?:(?:away )?from [^.;:!?]+? )?"
_NOT = r"(?P<no>(?:do not|don't|don’t|never|didn't|did not|no longer|stopped|used to|quit) )?"
_AM = r"(?:I am|I'm|I’m)(?: now| currently| actually)?"
_HAVE = r"(?:I've|I’ve|I have|we've|we have)"
_DOING = (
    r"(?!(?:go|look|think|wonder|ask|hop|try|tell|talk|say|mean|kidd|jok|us|do|be|hav|wait)ing\b)"
    r"[a-z]{2,}ing\b"
)
_DID = (
    r"(?:(?!(?:need|want|hop|ask|us|suppos|lik|lov|enjoy|agre|mention|decid|car|wonder|realiz|realis|notic"
    r"|believ|consider|expect|hat|discuss|talk|answer|guess|imagin|wish)e?d\b)[a-z]{2,}ed"
    r"|ate|made|took|got|found|met|saw|learnt|wrote|won|lost|built|drew|sang|ran|swam|flew|drove|rode|spent"
    r"|gave|began|broke|caught|chose|fell|grew|held|kept|paid|sold|taught|wore|went|came|left|bought"
    r"|brought)\b"
)
_OWNED = (
    "cat|dog|sister|brother|wife|husband|partner|boss|son|daughter|mother|father|job|age|hobby|car",
    "phone number|number|email|e-mail|password|pin|code|secret word|size|diet|major|school|university|team",
    "doctor|dentist",
    "appointment|meeting|flight|exam|interview|wedding|deadline|party|lesson|class|train|trip|move",
)
_RULES: tuple[tuple[str, str], ...] = (
    (rf"\bmy name is {_TAIL}", "is named"),
    (rf"\bmy birthday is {_NOW}(?:on )?{_TAIL}", "birthday is"),
    (
        rf"\bmy (?:new )?favou?rite (?P<noun>[\w ]{{2,30}}?) (?P<no>(?:is|are)(?: not|n't) )?(?:is |are )?"
        rf"{_NOW}{_TAIL}",
        "favourite {noun} is",
    ),
    (rf"\bI {_NOT}{_ADVERB}(?:like|love|enjoy|adore) {_TAIL}", "likes"),
    (rf"\bI {_ADVERB}(?:prefer) {_TAIL}", "prefers"),
    (rf"\bI {_ADVERB}(?:hate|dislike|can't stand|cannot stand) {_TAIL}", "not likes"),
    (rf"\bI {_NOT}{_ADVERB}live in {_TAIL}", "lives in"),
    (rf"\b(?:I|we)(?:'ve| have)? {_ADVERB}(?:moved|relocated) (?:house )?{_FROM}to {_TAIL}", "lives in"),
    (rf"\b(?:I|we) {_ADVERB}left [^.;:!?]+? (?:and|to) (?:moved|move) to {_TAIL}", "lives in"),
    (rf"\bmy (?:new )?(?:home|place|flat|house|address|city) is {_NOW}(?:now |in |at )*{_TAIL}", "lives in"),
    (rf"\b{_AM} (?P<no>not )?(?:living|based|settled) in {_TAIL}", "lives in"),
    (rf"\bI (?P<no>stopped|quit) (?:liking|enjoying|loving) {_TAIL}", "likes"),
    (rf"\bI (?P<no>went off|(?:am|have) (?:over|gone off)|am tired of|can no longer stand) {_TAIL}", "likes"),
    (rf"\bI (?P<no>stopped|quit) (?:living) in {_TAIL}", "lives in"),
    (rf"\bI {_ADVERB}(?:changed|switched) (?:jobs?|careers?) {_FROM}to {_TAIL}", "works as"),
    (rf"\bI {_ADVERB}(?:became|got hired as|started (?:working )?as|was promoted to) {_TAIL}", "works as"),
    (rf"\bI {_NOT}{_ADVERB}work as {_TAIL}", "works as"),
    (rf"\b{_AM} (?P<no>no longer |not )?(?:working|employed) as {_TAIL}", "works as"),
    (rf"\bI {_ADVERB}(?:joined|started at|moved over to|left [^.;:!?]+? for) {_TAIL}", "works at"),
    (
        r"\bmy (?P<noun>[a-z]+(?: [a-z]+){0,2}?) (?:(?:was|is|has been|got|has|have been) )?"
        rf"(?:moved|changed|postponed|rescheduled|shifted|brought forward|pushed back) {_FROM}to {_TAIL}",
        "{noun} is",
    ),
    (rf"\bI {_NOT}{_ADVERB}work (?:at|for) {_TAIL}", "works at"),
    (rf"\b{_AM} from {_TAIL}", "is from"),
    (rf"\b{_AM} (?P<no>not )?allergic to {_TAIL}", "is allergic to"),
    (rf"\b{_AM} (?P<no>not )?(?P<tail>an? [a-z][a-z -]{{2,30}})(?=[,.;!?]|$)", "is"),
    (rf"\bI(?:'ve| have)? {_ADVERB}(?:went|travell?ed|been) to {_TAIL}", "went to"),
    (rf"\bI(?:'ve| have)? {_ADVERB}visited {_TAIL}", "visited"),
    (rf"\bI(?:'ve| have)? {_ADVERB}bought {_TAIL}", "bought"),
    (rf"\bI(?:'ve| have)? {_ADVERB}(?:watched|saw|seen) {_TAIL}", "saw"),
    (rf"\bI(?:'ve| have)? {_ADVERB}(?:read|finished reading) {_TAIL}", "read"),
    (rf"\bI(?:'ve| have)? {_ADVERB}adopted {_TAIL}", "adopted"),
    (rf"\b(?:I plan to|{_AM} planning to|I want to|{_AM} going to) {_TAIL}", "plans to"),
    (rf"\bI {_NOT}have (?P<tail>(?:an?|two|three|four|no) [^,.;:!?]+)", "has"),
    (rf"\bmy (?P<noun>[a-z]+(?: [a-z]+)?) is {_NOW}(?:called|named) (?P<tail>[^,.;:!?]+)", "{noun} is named"),
    (
        r"\b(?:my|the) (?:new |right |correct )?(?P<noun>" + "|".join(_OWNED) + r") (?P<no>is(?: not|n't) )?"
        rf"(?:is )?{_NOW}(?:on |at )?(?P<tail>[^,.;:!?]+)",
        "{noun} is",
    ),
    (rf"\byou (?:once |already )?recommended (?:me )?{_TAIL}", "was recommended"),
    (rf"\bmy favou?rite(?: one)? (?:is|are|was) {_TAIL}", "favourite is"),
    # What was done or goes on, in the sentence's own verb.
    (rf"\b{_HAVE} been (?P<verb>(?:{_ADVERB}){_DOING}) {_TAIL}", "has been {verb}"),
    (rf"\b{_HAVE} been (?P<tail>(?:a bit|a little|so|very|really|quite|too) [^.;:!?]+)", "has been"),
    (rf"\b{_AM} (?P<verb>{_ADVERB}{_DOING}) {_TAIL}", "is {verb}"),
    (rf"\b(?:I|we)(?:'ve| have)? {_ADVERB}(?P<verb>{_DID}) {_TAIL}", "{verb}"),
    (rf"\bI {_ADVERB}(?:feel|felt) {_TAIL}", "feels"),
    (rf"\bI (?:was|am) (?:most |very |really |quite )?interested in {_TAIL}", "is interested in"),
    (rf"\bI {_ADVERB}(?:loved|liked|enjoyed) {_TAIL}", "liked"),
)
_ENGLISH = tuple((re.compile(pattern, re.I), relation) for pattern, relation in _RULES)
_ZH_TAIL = r"(?P<tail>[^，。；！？,.;!?\s]{1,30})"
_ZH_WHEN = r"(?:我|我们)(?:今天|昨天|上周|最近|刚刚|这几天|也|还)*"
_CHINESE = tuple(
    (re.compile(pattern), relation)
    for pattern, relation in (
        (rf"我(?:的名字叫|的名字是|叫){_ZH_TAIL}", "叫"),
        (rf"我(?:并)?(?P<no>不)?(?:很|非常|最|也|特别)?喜欢{_ZH_TAIL}", "喜欢"),
        (rf"我(?P<no>(?:现在)?不(?:再)?)?(?:现在|目前|已经|其实)*住在{_ZH_TAIL}", "住在"),
        (
            rf"我(?:们)?(?:已经|最近|刚刚?|上周)*(?:从[^，。；！？]{{1,20}})?搬(?:家)?(?:到|去)了?{_ZH_TAIL}",
            "住在",
        ),
        (rf"{_ZH_WHEN}去了{_ZH_TAIL}", "去了"),
        (rf"{_ZH_WHEN}买了{_ZH_TAIL}", "买了"),
        (rf"{_ZH_WHEN}(?:看了|看过|看到了?){_ZH_TAIL}", "看了"),
        (rf"{_ZH_WHEN}(?:读了|读过|读完了){_ZH_TAIL}", "读了"),
        (rf"{_ZH_WHEN}(?:在|正在|一直在)(?P<verb>学习|练习|准备|计划|尝试|读|看){_ZH_TAIL}", "在{verb}"),
        (rf"{_ZH_WHEN}(?P<verb>参观|参加|学习|遇到|尝试|养|吃|做|听|写)(?:了|过){_ZH_TAIL}", "{verb}了"),
        (rf"{_ZH_WHEN}(?:计划|打算|准备)(?!的){_ZH_TAIL}", "计划"),
        (rf"{_ZH_WHEN}(?:感到|感觉){_ZH_TAIL}", "感到"),
        (
            r"我的(?P<verb>[^的，。；！？\s]{1,6}?)(?:现在|目前|其实|已经)*(?P<no>不)?(?:是|改成|改到|改为|变成|换成)了?"
            rf"{_ZH_TAIL}",
            "的{verb}是",
        ),
    )
)
_HEDGED = re.compile(
    r"\b(if|unless|maybe|perhaps|might|would like|would love|wish|suppose|imagine)\b|如果|也许|可能|要是",
    re.I,
)
_CUT = re.compile(
    r"\s+(?:but|because|and (?:I|it|he|she|we|they|(?-i:the|my))|so|which|when|while|who|where|since|although"
    r"|though|after|before|with my|yesterday|today|tonight|tomorrow|recently|lately|anymore|any more"
    r"|these days"
    r"|last (?:week|month|year|night|\w+day)|this (?:week|month|year|morning|evening|afternoon|weekend)"
    r"|next (?:week|month|year|\w+day)|(?:a|two|three|\d+) (?:days?|weeks?|months?|years?) ago"
    r"|a lot|very much|on (?:mon|tues|wednes|thurs|fri|satur|sun)day)\b.*$",
    re.I,
)
_ADVICE = tuple(
    re.compile(pattern, re.I)
    for pattern in (
        rf"\bI (?:would |can |also )*(?:recommend|suggest)(?: that)?(?: you)?(?: to| try)? {_TAIL}",
        r"\byou (?:can|could|should|might|may)(?: also| want to| consider| like to)*"
        rf" (?:try|watch|read|visit|use|choose|check out|go to|listen to) {_TAIL}",
        r"\b(?:suggestions|options|choices|places|books|films|movies|methods|ways)(?: for you)?(?: to try)?"
        rf"(?: (?:could|can|may))? (?:include|like) {_TAIL}",
        rf"\b(?:such as|including) {_TAIL}",
        r"(?:推荐|建议)(?!给)(?:你|您)?(?:可以)?(?:去|看|听|读|尝试|试试)?(?P<tail>[^。；！？.;!?]{2,40})",
        r"(?:你|您)(?:可以|不妨|应该)(?:考虑|尝试|试试|试着|看看|去|听听|读读|使用)(?P<tail>[^。；！？.;!?]{2,40})",
        r"^(?P<tail>[A-Z][^,.;:!?]{2,60}?) (?:is|are|might be|would be|could be)(?: both| all)?"
        r" (?:an? )?(?:very |really |also )?(?:good|great|nice|excellent) (?:choices?|options?|ones?|ideas?)",
    )
)
_NO_ADVICE = {"you", "that", "to", "it", "doing", "this", "these", "them", "your", "some", "and"}
_NO_ITEM = {
    "i",
    "it",
    "he",
    "she",
    "we",
    "they",
    "you",
    "the",
    "right",
    "so",
    "but",
    "which",
    "because",
    "my",
}
_LIST_ITEM, _LONGEST = 6, 20  # words
_EMBEDDED = re.compile(
    r"\b(?:what|whatever|which|everything|anything|all(?: that)?) $", re.I
)  # "what I read"
_ASIDE = re.compile(
    r",\s*(?:but |and |so )?(?:do|did|have|has|can|could|would|will|are|is|what|how|which|where|any)\b"
    r"[^,]*[?？]\s*$",
    re.I,
)
_ASKS = re.compile(
    r"\s*(?:do|did|does|have|has|can|could|would|will|are|is|was|were|what|how|which|where|when|who|why)\b",
    re.I,
)
_EMPTY = {"it", "that", "this", "them", "him", "her", "you", "to", "so", "one", "those", "these"}
_VERBS = {"likes": "likes", "prefers": "prefers"}


def _statements(text: str) -> list[str]:
    """Sentences that state something: no question, no quotation of somebody, no condition."""
    found = []
    for sentence in sentences(text):
        plain = re.sub(
            r"[\"“][^\"”]*\bI\b[^\"”]*[\"”]|「[^」]*我[^」]*」|“[^”]*我[^”]*”", " ", sentence.strip()
        )
        plain = re.sub(r"[\"“”《》]", "", plain)
        if (stated := _ASIDE.sub(".", plain)) != plain and not _ASKS.match(stated):
            plain = stated  # "I took up judo, do you like it?" states something first
        if plain and not re.search(r"[?？]\s*$", plain) and not _HEDGED.search(plain):
            found.append(plain)
    return found


def _english(sentence: str, at: datetime, head: str) -> list[Fact]:
    facts = []
    taken: list[tuple[int, int]] = []
    for pattern, relation in _ENGLISH:
        at_most = 0
        while match := pattern.search(sentence, at_most):
            groups = match.groupdict()
            tail = _trim(groups["tail"])
            end = match.start("tail") + _used(groups["tail"], tail)  # the clause goes on after a list's end
            at_most = max(end, match.start() + 1)
            if any(a < end and match.start() < b for a, b in taken):
                continue
            if _EMBEDDED.search(sentence, 0, match.start()) or not tail or tail.lower() in _EMPTY:
                continue
            if tail.split()[0].lower() in ("it", "that", "you", "him", "her", "them"):
                continue
            name = relation.format(
                noun=(groups.get("noun") or "").lower().strip(),
                verb=(groups.get("verb") or "").lower().strip(),
            )
            if groups.get("no"):
                name = f"not {name}"
            if name.startswith("not not "):
                name = name[8:]
            taken.append((match.start(), end))
            day = _resolved(sentence, at)
            facts.append(Fact(head, name, tail, _sentence(head, name, tail, day), "user"))
    return facts


def _used(raw: str, tail: str) -> int:
    """How far into ``raw`` its trimmed tail reaches."""
    last = tail.split()[-1] if tail else ""
    place = raw.find(tail) if tail else -1
    return place + len(tail) if place >= 0 else raw.find(last) + len(last)


def _chinese(sentence: str, at: datetime, head: str) -> list[Fact]:
    facts = []
    for pattern, form in _CHINESE:
        for match in pattern.finditer(sentence):
            tail = match["tail"].strip().removesuffix("了").removesuffix("吗")
            if not tail or "什么" in tail:
                continue
            denied = match.groupdict().get("no")
            relation = form.format(verb=match.groupdict().get("verb") or "")
            day = _resolved(sentence, at)
            text = f"{head}{'不' if denied else ''}{relation}{tail}{f'（{day}）' if day else ''}。"
            facts.append(Fact(head, f"not {relation}" if denied else relation, tail, text, "user"))
    return facts


def _sentence(head: str, relation: str, tail: str, day: str) -> str:
    when = f" ({day})" if day else ""
    if relation.startswith("not "):
        plain = relation[4:]
        verb = {"likes": "does not like", "lives in": "does not live in", "works as": "does not work as"}.get(
            plain
        )
        verb = verb or {"works at": "does not work at", "has": "does not have"}.get(plain)
        return f"{head} {verb or f'is not: {plain}'} {tail}{when}."
    if relation == "was recommended":
        return f"{head} was recommended {tail}{when}."
    if relation.endswith((" is named", " is")) and relation not in ("is", "is named"):
        return f"{head}'s {relation} {tail}{when}."
    return f"{head} {relation} {tail}{when}."


def _advice(sentence: str) -> list[Fact]:
    """What the assistant recommends: one fact a sentence."""
    for pattern in _ADVICE:
        if not (found := pattern.search(sentence)):
            continue
        tail = _trim(re.sub(r"\s(?:is|are|can|could|may|might|will|would)\b.*", "", found["tail"]))
        if tail and is_chinese(tail):
            return [Fact("助手", "推荐", tail, f"助手推荐{tail}。", "assistant", 0.7)]
        if tail and tail.split()[0].lower() not in _NO_ADVICE:
            text = f"The assistant recommended {tail}."
            return [Fact("The assistant", "recommended", tail, text, "assistant", 0.7)]
    return []


def _trim(tail: str) -> str:
    """The tail up to the clause's end: commas stay inside a list ("tea, jazz, and chess")."""
    parts = tail.strip().split(",")
    end = 1
    for place, part in enumerate(parts[1:], 2):
        words = part.split()
        if not words or len(words) > _LIST_ITEM or words[0].lower() in _NO_ITEM:
            break
        joined = words[0].lower() in ("and", "or")
        if joined and len(words) > 1 and words[1].lower() in _NO_ITEM:
            break
        if joined or (place == 2 and words[0].lower() in ("especially", "such", "including")):
            end = place
            break
        if "and" in words[1:] and place == len(parts):
            end = place
    kept = _CUT.sub("", f" {','.join(parts[:end]).strip()}").strip()
    return " ".join(kept.split()[:_LONGEST]).strip(" '\"-,")


def _resolved(sentence: str, at: datetime) -> str:
    """The day that a word such as "yesterday" means; "" where there is none."""
    plain = sentence.lower()
    for words, shift in _SHIFTS:
        if re.search(words, plain):
            return f"{at + timedelta(days=shift):%Y-%m-%d}"
    if found := re.search(r"\b(a|one|two|three|four|five|six|\d+) (day|week)s? ago\b", plain):
        number = {"a": 1, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6}.get(
            found[1]
        ) or int(found[1])
        return f"{at - timedelta(days=number * (7 if found[2] == 'week' else 1)):%Y-%m-%d}"
    if re.search(r"\blast week\b|上周", plain):
        return f"in the week before {at:%Y-%m-%d}"
    if re.search(r"\blast month\b|上个月", plain):
        return f"in the month before {at:%Y-%m-%d}"
    return ""


_SHIFTS = (
    (r"\bday before yesterday\b|前天", -2), (r"\byesterday\b|\blast night\b|昨天|昨晚", -1),
    (r"\btoday\b|\bthis (morning|afternoon|evening)\b|\btonight\b|今天", 0), (r"\btomorrow\b|明天", 1),
)  # fmt: skip


def rule_traits(lines: Sequence[str], day: str) -> list[tuple[str, str, list[int]]]:
    """A portrait's traits by the same rules (a :class:`~memspan.recall.memorybank.TraitReader`).

    Example:
        >>> rule_traits(["I love hiking", "Is it late?"], "2023-05-01")
        [('likes', 'hiking', [0])]
    """
    at = datetime.fromisoformat(f"{day}T12:00:00+00:00")
    lasting = (
        "likes",
        "not likes",
        "prefers",
        "lives in",
        "works as",
        "works at",
        "is from",
        "is allergic to",
        "is",
    )
    return [
        (fact.relation, fact.tail, [place])
        for place, line in enumerate(lines) for fact in RuleExtractor()(line, "", at)
        if fact.relation in lasting or fact.relation.startswith("favourite")
    ]  # fmt: skip


if TYPE_CHECKING:
    _: TraitReader = rule_traits
