"""Answers to questions about a scene, made of its facts: true, varied, and the same for the same seed.

An answer is a row of clauses, each about one topic. Its question decides which comes first; what is in the picture
decides much of the order of the others and of the words, so that the words are hard to guess without seeing it. The
rest is drawn.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from ray_app.scenes.facts import SceneFacts, Vehicle

Generator = np.random.Generator
LEAST_WORDS = 32
"""Shorter answers get further topics: 40 tokens."""
CLOSE_M, NEAR_M = 12.0, 25.0
"""Distances of vehicles that words are for."""
QUESTIONS: Mapping[str, tuple[str, ...]] = {
    "What are the key elements in this scene?": (),
    "Where are we?": ("setting", "sides", "road"),
    "What time of day is it, and how is the sky?": ("light", "sides", "road"),
    "How does the road continue?": ("road", "ahead", "setting"),
    "What is on the left and on the right?": ("sides", "parked", "people"),
    "Is there a vehicle ahead of us?": ("lead", "ahead", "road"),
    "What traffic comes towards us?": ("oncoming", "lead", "setting"),
    "Are there people to watch for?": ("people", "signals", "sides"),
    "Are vehicles parked along the road?": ("parked", "sides", "setting"),
    "Is there a traffic light or crossing traffic?": ("signals", "lead", "road"),
    "What is nearest to us?": ("order", "sides", "setting"),
    "What moves in this scene?": ("traffic", "people", "setting"),
    "How do we move?": ("motion", "lead", "road"),
}
"""Topics that come first in an answer, by question. The last question is for windows alone."""
FRAME_QUESTIONS = tuple(QUESTIONS)[:-1]
"""Questions that one picture answers."""
ALL = ("setting", "sides", "road", "lead", "oncoming", "parked", "people", "signals", "ahead")


def answer(facts: SceneFacts, question: str, seed: int) -> str:
    """Return the answer to one of `QUESTIONS`; `seed` draws among equally true wordings."""
    rng = np.random.default_rng([seed, list(QUESTIONS).index(question)])
    first = QUESTIONS[question]
    topics = [*first, *(topic for topic in _by_salience(facts, rng) if topic not in first)]
    if "light" in first:  # the place follows, and with it the light a second time
        topics.remove("setting")
    clauses: dict[str, str] = {}
    for asked in (False, True):  # the second time what is absent is said too
        for topic in topics:
            if asked and len(" ".join(clauses.values()).split()) >= LEAST_WORDS:
                break
            if topic not in clauses and (clause := TOPICS[topic](facts, rng, asked or topic in first)):
                clauses[topic] = clause
            if first and len(" ".join(clauses.values()).split()) >= LEAST_WORDS:
                break
    return " ".join(clause[0].upper() + clause[1:] + "." for clause in clauses.values())


def _by_salience(facts: SceneFacts, rng: Generator) -> list[str]:
    """Return all topics, what matters most in this picture first."""
    weight = {topic: len(ALL) - place + 1.5 * rng.random() for place, topic in enumerate(ALL)}
    weight["signals"] += 10 * bool(facts.traffic_light or facts.crossing)
    weight["people"] += 9 * bool(facts.people_crossing) + 3 * bool(sum(facts.people))
    if facts.lead:
        weight["lead"] += 8 if facts.lead.distance_m < CLOSE_M else 4
    if facts.oncoming:
        weight["oncoming"] += 5 if facts.oncoming[0].distance_m < NEAR_M else 2
    weight["road"] += 4 * (facts.bend != "straight") + 2 * (facts.lanes == 3)
    weight["parked"] += 2 * (sum(facts.parked) > 3)
    weight["setting"] += 6 * (facts.daytime == "night")
    return sorted(weight, key=lambda topic: -weight[topic])


def _pick(rng: Generator, *forms: str) -> str:
    return forms[rng.integers(len(forms))]


PLACES = {
    "city": ("a city street", "the middle of a city"),
    "suburb": ("a suburb", "a suburban street"),
    "country": ("a country road", "the open country"),
    "highway": ("a highway", "a wide highway"),
}
LIGHTS = {
    "day": ("in daylight", "by day"),
    "dusk": ("at dusk", "in the evening"),
    "night": ("at night", "in the dark"),
}
SKIES = {True: ("under clouds", "below a cloudy sky"), False: ("under a clear sky", "with a clear sky")}


def _setting(facts: SceneFacts, rng: Generator, _: bool) -> str:
    place, light = _pick(rng, *PLACES[facts.place]), _pick(rng, *LIGHTS[facts.daytime])
    sky = "" if facts.cloudy is None else " " + _pick(rng, *SKIES[facts.cloudy])
    return _pick(rng, f"{place} {light}{sky}", f"{light}{sky} we drive along {place}")


def _light(facts: SceneFacts, rng: Generator, _: bool) -> str:
    light = {"day": "it is day", "dusk": "it is evening", "night": "it is night"}[facts.daytime]
    skies = {True: (", the sky full of clouds", ", cloudy"), False: (", the sky clear", ", clear")}
    sky = "" if facts.cloudy is None else _pick(rng, *skies[facts.cloudy])
    return f"{light}{sky}, and we are on {PLACES[facts.place][0]}"


def _road(facts: SceneFacts, rng: Generator, _: bool) -> str:
    lanes = {1: "one lane", 2: "two lanes", 3: "three lanes"}[facts.lanes] + " each way"
    if facts.bend == "straight":
        bend = _pick(rng, "runs straight", "is straight")
    else:
        bend = _pick(rng, f"bends to the {facts.bend}", f"curves {facts.bend}")
    return _pick(rng, f"{lanes}, and the road {bend}", f"the road {bend}, {lanes}")


def _sides(facts: SceneFacts, rng: Generator, _: bool) -> str:
    left, right = facts.sides
    if left == right:
        return _pick(rng, f"{left} on both sides", f"both sides have {left}")
    if facts.bend == "right" or (facts.bend == "straight" and rng.random() < 0.3):
        return f"{right} on the right and {left} on the left"
    return f"{left} on the left and {right} on the right"


def _named(vehicle: Vehicle) -> str:
    name = f"{vehicle.colour} {vehicle.kind}".strip()
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def _far(vehicle: Vehicle) -> str:
    return "close" if vehicle.distance_m < CLOSE_M else "some way" if vehicle.distance_m < NEAR_M else "far"


def _lead(facts: SceneFacts, rng: Generator, asked: bool) -> str:
    if not facts.lead:
        return _pick(rng, "no vehicle is ahead in our lane", "our lane is free") if asked else ""
    name, far = _named(facts.lead), _far(facts.lead)
    return _pick(rng, f"{name} drives {far} ahead in our lane", f"we follow {name}, {far} ahead")


def _ahead(facts: SceneFacts, rng: Generator, _: bool) -> str:
    if not facts.ahead:
        return ""
    name = _named(facts.ahead[0])
    return _pick(rng, f"in the next lane {name} is ahead", f"next to our lane drives {name}")


def _oncoming(facts: SceneFacts, rng: Generator, asked: bool) -> str:
    if not facts.oncoming:
        return _pick(rng, "nothing comes towards us", "no oncoming traffic") if asked else ""
    name, far = _named(facts.oncoming[0]), _far(facts.oncoming[0]).replace("close", "close by")
    far = far if far == "close by" else f"{far} off"
    if len(facts.oncoming) == 1:
        return _pick(rng, f"{name} comes towards us, {far}", f"{far} {name} comes towards us")
    number = "two" if len(facts.oncoming) == 2 else "several"
    return _pick(
        rng, f"{number} vehicles come towards us, first {name}, {far}", f"oncoming are {number}, {name} first"
    )


def _parked(facts: SceneFacts, rng: Generator, asked: bool) -> str:
    left, right = facts.parked
    if not left and not right:
        return _pick(rng, "no vehicle is parked", "nothing is parked") if asked else ""
    side = "both sides" if left and right else "the left" if left else "the right"
    number = {1: "one vehicle is", 2: "two vehicles are"}.get(left + right, "a row of vehicles is")
    return _pick(rng, f"{number} parked on {side}", f"on {side} {number} parked")


def _people(facts: SceneFacts, rng: Generator, asked: bool) -> str:
    left, right = facts.people
    if facts.people_crossing:
        return _pick(rng, "people cross ahead of us", "someone on foot crosses ahead")
    if not left and not right:
        return _pick(rng, "no people are in sight", "no one walks here") if asked else ""
    side = "both sides" if left and right else "the left" if left else "the right"
    who = "one person" if left + right == 1 else "several people"
    return _pick(rng, f"on foot on {side}: {who}", f"{who} on foot on {side}")


def _signals(facts: SceneFacts, rng: Generator, asked: bool) -> str:
    parts = []
    if facts.traffic_light:
        parts.append(f"a traffic light shows {facts.traffic_light}")
    if facts.crossing:
        parts.append(_pick(rng, "vehicles cross ahead", "traffic crosses"))
    if not parts and asked:
        return _pick(rng, "no traffic light and no crossing traffic", "neither light nor crossing")
    return " and ".join(parts)


def _order(facts: SceneFacts, rng: Generator, _: bool) -> str:
    seen = [(each.distance_m, f"{_named(each)} {where}") for where, some in (
        ("in our lane", [facts.lead] if facts.lead else []),
        ("in the next lane", facts.ahead[:1]),
        ("in the oncoming lane", facts.oncoming[:1]),
    ) for each in some]  # fmt: skip
    if not seen:
        return _pick(rng, "no moving vehicle is in sight", "no vehicle moves near us")
    names = [name for _, name in sorted(seen)]
    return _pick(rng, "nearest is ", "first comes ") + ", then ".join(names)


def _traffic(facts: SceneFacts, rng: Generator, _: bool) -> str:
    parts = [make(facts, rng, False) for make in (_lead, _ahead, _oncoming, _signals)]
    return "; ".join(part for part in parts if part) or _pick(
        rng, "no vehicle moves in our sight", "no moving vehicle is in sight"
    )


def _motion(facts: SceneFacts, rng: Generator, _: bool) -> str:
    motion = facts.motion
    assert motion is not None, "only a window has motion"
    speed = {"standing": "we wait", "slow": "we drive slowly", "moderate": "we drive on", "fast": "we drive fast"}
    parts = [speed[motion.speed]]
    if motion.change != "steady":
        parts.append(motion.change)
    if motion.turn != "straight":
        parts.append(_pick(rng, f"turning {motion.turn}", f"in a bend to the {motion.turn}"))
    if motion.lead:
        parts.append({"closing": "closing on", "opening": "falling behind"}[motion.lead] + " the vehicle ahead")
    return ", ".join(parts)


TOPICS: Mapping[str, Callable[[SceneFacts, Generator, bool], str]] = {
    "setting": _setting, "light": _light, "road": _road, "sides": _sides, "lead": _lead, "ahead": _ahead,
    "oncoming": _oncoming, "parked": _parked, "people": _people, "signals": _signals, "order": _order,
    "traffic": _traffic, "motion": _motion,
}  # fmt: skip
"""Makers of a clause by topic; the last argument: the question asks for it, so that absence is said too."""


@dataclass(frozen=True, slots=True)
class FactKind:
    """One kind of fact: its values in a scene, and how they are read from a text."""

    question: str
    """Question whose answer says it."""
    true: Callable[[SceneFacts], str]
    """The value in a scene."""
    patterns: Mapping[str, str]
    """Regular expression by value; the first that is found in a text counts."""
    otherwise: str = "unsaid"
    """Value of a text in which none is found."""

    def said(self, text: str) -> str:
        """Return the value that a text says."""
        found = (value for value, pattern in self.patterns.items() if re.search(pattern, text, re.IGNORECASE))
        return next(found, self.otherwise)


KEY_ELEMENTS, WHERE, TIME, ROAD, BOTH_SIDES, LEAD, ONCOMING, PEOPLE, PARKED, SIGNALS = FRAME_QUESTIONS[:10]
SIDE_WORDS = ("houses", "tall buildings", "trees", "a hedge", "a fence", "a rail", "open ground")


def _side_patterns(side: str) -> dict[str, str]:
    return {word: rf"{word} on (?:the {side}|both sides)|both sides have {word}" for word in SIDE_WORDS}


SKY_WORDS = {None: "unsaid", True: "clouds", False: "clear"}
FEW = ("none", "one", "two", "several")
WHERE_PARKED = ("none", "left", "right", "both")


def _people_value(facts: SceneFacts) -> str:
    return "crossing" if facts.people_crossing else "some" if sum(facts.people) else "none"


FACTS: Mapping[str, FactKind] = {
    "place": FactKind(KEY_ELEMENTS, lambda f: f.place, {
        "city": r"\bcity\b", "suburb": r"\bsuburb", "country": r"\bcountry\b", "highway": r"\bhighway\b"}),
    "light": FactKind(KEY_ELEMENTS, lambda f: f.daytime, {
        "day": r"\bday", "dusk": r"\bdusk\b|\bevening\b", "night": r"\bnight\b|\bdark\b"}),
    "sky": FactKind(KEY_ELEMENTS, lambda f: SKY_WORDS[f.cloudy], {
        "clouds": r"\bcloud", "clear": r"\bclear\b"}),
    "bend": FactKind(KEY_ELEMENTS, lambda f: f.bend, {
        **{side: f"bends to the {side}|curves {side}" for side in ("left", "right")}, "straight": "straight"}),
    "lanes": FactKind(KEY_ELEMENTS, lambda f: str(f.lanes), {
        "1": "one lane each", "2": "two lanes each", "3": "three lanes each"}),
    "left": FactKind(KEY_ELEMENTS, lambda f: f.sides[0], _side_patterns("left")),
    "right": FactKind(KEY_ELEMENTS, lambda f: f.sides[1], _side_patterns("right")),
    "lead": FactKind(LEAD, lambda f: _far(f.lead) if f.lead else "none", {
        "none": "no vehicle is ahead|lane is free", **{far: f"{far} ahead" for far in ("close", "some way", "far")}}),
    "oncoming": FactKind(ONCOMING, lambda f: FEW[min(len(f.oncoming), 3)], {
        "none": "nothing comes towards|no oncoming", "two": r"\btwo vehicles come|oncoming are two",
        "several": "several vehicles come|oncoming are several", "one": "comes towards us"}),
    "parked": FactKind(PARKED, lambda f: WHERE_PARKED[bool(f.parked[0]) + 2 * bool(f.parked[1])], {
        "none": "no vehicle is parked|nothing is parked", "both": r"parked on both|on both sides [a-z ]+ parked",
        "left": r"parked on the left|on the left [a-z ]+ parked",
        "right": r"parked on the right|on the right [a-z ]+ parked"}),
    "people": FactKind(PEOPLE, _people_value, {
        "none": "no people are|no one walks", "crossing": "people cross|on foot crosses", "some": "on foot"}),
    "signals": FactKind(SIGNALS, lambda f: "some" if f.traffic_light or f.crossing else "none", {
        "none": "no traffic light and|neither light", "some": "traffic light shows|vehicles cross|traffic crosses"}),
}  # fmt: skip
"""Kinds of facts that a text is judged by."""
