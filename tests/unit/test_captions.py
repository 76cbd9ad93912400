"""Facts of rendered scenes and answers made of them: what is said is in the geometry, and in the picture."""

from dataclasses import replace

import numpy as np
import pytest

from ray_app.scenes import facts as facts_module
from ray_app.scenes.captions import FACTS, FRAME_QUESTIONS, KEY_ELEMENTS, QUESTIONS, answer
from ray_app.scenes.facts import PAINT_WORDS, SceneFacts, frame_facts, window_facts
from ray_app.scenes.roadside import PAINTS, Board, Thing, Wall, vehicle
from ray_app.scenes.scene import Scene

SMALL = {"height": 96, "width": 128}
TIMES = (3.0, 41.0, 90.0, 133.0)


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [Scene(seed, **SMALL) for seed in range(8)]


@pytest.fixture(scope="module")
def found(scenes: list[Scene]) -> list[SceneFacts]:
    return [frame_facts(scene, t_s) for scene in scenes for t_s in TIMES]


def open_road(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, *things: Thing, moving: tuple[Thing, ...] = ()
) -> SceneFacts:
    """The facts if there were these things alone."""
    monkeypatch.setattr(facts_module, "traffic", lambda *_: moving)
    monkeypatch.setattr(scene, "roadside_ahead", lambda _: list(things))
    return frame_facts(scene, 3.0)


@pytest.fixture
def straight(monkeypatch: pytest.MonkeyPatch) -> Scene:
    """A scene by day on a straight road, whose haze hides nothing."""
    scene = Scene(1, **SMALL)
    light = replace(scene.world.light, haze_m=600.0)
    scene.world = replace(scene.world, daytime="day", light=light, lanes=2, lane=1)
    monkeypatch.setattr(scene.road, "bend", lambda _: np.zeros_like(scene.road.GRID_M))
    return scene


def ahead(scene: Scene, metres: float, paint: int = 4) -> tuple[Thing, ...]:
    n = scene.world.lane_m * (scene.world.lane + 0.5)
    return tuple(vehicle(scene.view(3.0).s + metres, n, PAINTS[paint], False, False))


def test_what_an_answer_says_is_what_is_true(found: list[SceneFacts]) -> None:
    for seed, facts in enumerate(found):
        for kind, fact in FACTS.items():
            for asked in {fact.question, KEY_ELEMENTS} if kind in ("place", "light", "bend") else {fact.question}:
                text = answer(facts, asked, seed)
                assert fact.said(text) == fact.true(facts), (kind, text, facts)


def test_a_wrong_fact_is_noticed(found: list[SceneFacts]) -> None:
    text = answer(replace(found[0], place="city"), KEY_ELEMENTS, 0)
    assert FACTS["place"].said(text) != FACTS["place"].true(replace(found[0], place="country"))


def test_answers_depend_on_facts_question_and_seed_alone(found: list[SceneFacts]) -> None:
    again = frame_facts(Scene(0, **SMALL), TIMES[0])
    assert again == found[0]
    assert frame_facts(Scene(0, height=480, width=640), TIMES[0]) == found[0]
    assert answer(again, KEY_ELEMENTS, 5) == answer(found[0], KEY_ELEMENTS, 5)
    assert len({answer(again, KEY_ELEMENTS, seed) for seed in range(20)}) > 5
    assert len({answer(again, asked, 5) for asked in FRAME_QUESTIONS}) > 9


def test_there_are_ten_questions_and_their_answers_are_not_short(found: list[SceneFacts]) -> None:
    assert len(QUESTIONS) >= 10
    for seed, facts in enumerate(found):
        for asked in FRAME_QUESTIONS:
            words = answer(facts, asked, seed).split()
            assert 28 <= len(words) <= 100, (asked, " ".join(words))


def test_no_place_of_an_answer_has_one_word(found: list[SceneFacts]) -> None:
    texts = [answer(facts, KEY_ELEMENTS, seed).split() for seed, facts in enumerate(found)]
    for place in range(25):
        words = [words[place] for words in texts if len(words) > place]
        assert max(words.count(word) for word in set(words)) < 0.6 * len(words), place
    assert len({" ".join(words) for words in texts}) == len(texts)


def test_the_vehicle_ahead_is_where_traffic_puts_it(straight: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = open_road(straight, monkeypatch, moving=ahead(straight, 15.0))
    assert facts.lead is not None
    assert (facts.lead.kind, facts.lead.colour) == ("car", PAINT_WORDS[4])
    assert facts.lead.distance_m == pytest.approx(15.0)
    assert facts.oncoming == ()
    assert "some way ahead" in answer(facts, "Is there a vehicle ahead of us?", 0)


def test_what_is_hidden_is_not_said(straight: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    far, near = ahead(straight, 30.0), ahead(straight, 8.0, paint=0)
    s = straight.view(3.0).s
    hoarding = Wall(s + 6.0, -20.0, s + 6.0, 20.0, 0.0, 6.0, "fence", (0, 0, 0))
    both = open_road(straight, monkeypatch, moving=(*far, *near))
    assert both.lead is not None
    assert both.lead.colour == PAINT_WORDS[0]
    assert open_road(straight, monkeypatch, hoarding, moving=far).lead is None


def test_what_is_too_small_too_far_or_in_the_haze_is_not_said(
    straight: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert open_road(straight, monkeypatch, moving=ahead(straight, 130.0)).lead is None
    assert open_road(straight, monkeypatch, moving=ahead(straight, 40.0)).lead is not None
    straight.world = replace(straight.world, light=replace(straight.world.light, haze_m=20.0))
    assert open_road(straight, monkeypatch, moving=ahead(straight, 40.0)).lead is None


def test_at_night_there_are_no_colours_and_only_lit_or_near_things(
    straight: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight.world = replace(straight.world, daytime="night")
    s, kerb = straight.view(3.0).s, straight.world.kerb_m
    trees = [Board(s + 40.0 + i, kerb + 3.0 + i, 7.0, 9.0, 0.0, "tree0", (40, 60, 30)) for i in range(9)]
    facts = open_road(straight, monkeypatch, *trees, moving=ahead(straight, 15.0))
    assert facts.lead is not None
    assert facts.lead.colour == ""
    assert facts.sides == ("open ground", "open ground")
    assert facts.cloudy is None
    straight.world = replace(straight.world, daytime="day")
    assert open_road(straight, monkeypatch, *trees).sides == ("open ground", "trees")


def test_said_sides_are_the_sides_of_the_picture(straight: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    s, kerb = straight.view(3.0).s, straight.world.kerb_m
    hedge = Wall(s + 2.0, -kerb - 1.0, s + 90.0, -kerb - 1.0, 0.0, 2.0, "hedge", (45, 65, 32))
    house = Wall(s + 5.0, kerb + 2.0, s + 40.0, kerb + 2.0, 0.0, 8.0, "facade0", (120, 120, 120))
    text = answer(open_road(straight, monkeypatch, hedge, house), "What is on the left and on the right?", 3)
    assert FACTS["left"].said(text) == "a hedge"
    assert FACTS["right"].said(text) == "houses"


@pytest.mark.parametrize("seed", [0, 3, 7])
def test_a_said_vehicle_changes_the_picture_where_it_is(seed: int) -> None:
    """Rendered with the vehicle ahead and without it, pictures differ if it is said to be there."""
    scene = Scene(seed, **SMALL)
    for t_s in TIMES:
        scene.world = replace(scene.world, lead=True)
        facts, with_lead = frame_facts(scene, t_s), scene.rgb(t_s).astype(int)
        scene.world = replace(scene.world, lead=False)
        differing = int((np.abs(with_lead - scene.rgb(t_s)).max(axis=2) > 8).sum())
        assert frame_facts(scene, t_s).lead is None
        if facts.lead is not None and facts.lead.distance_m < 25.0:
            assert differing > 10


def test_a_window_says_how_the_vehicle_moves(scenes: list[Scene]) -> None:
    asked = "How do we move?"
    said = set()
    for seed, scene in enumerate(scenes):
        for t_s in TIMES:
            facts = window_facts(scene, t_s, t_s + 1.0)
            text = answer(facts, asked, seed)
            assert ("we wait" in text.lower()) == (scene.speed(t_s + 1.0) < 0.3)
            assert ("braking" in text) == (scene.speed(t_s + 1.0) - scene.speed(t_s) < -0.8)
            assert replace(facts, motion=None) == frame_facts(scene, t_s + 1.0)
            said |= {text.split(".")[0]}
    assert len(said) > 5
