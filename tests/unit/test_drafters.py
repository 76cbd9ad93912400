"""Drafters see only what a deployment has, and each does what its one sentence says."""

import numpy as np
import pytest

from ray_app.core.speculative.prompts import AnsweredPrompt, Prompt
from ray_app.drafters import hybrid
from ray_app.drafters.base import Distribution, Draft, Drafter
from ray_app.drafters.hybrid import HybridDrafter
from ray_app.drafters.previous_window import Continuation
from ray_app.drafters.replay import DRAFTERS, contiguous_folds, folds_of, num_matches, replay_fold
from ray_app.errors import ConfigError, InputError

QUESTION = Prompt("what is there?", (7, 8, 9))


def drive(num_rows: int, seed: int = 0) -> list[AnsweredPrompt]:
    """Answers of 12 tokens below 30 that change one word now and then."""
    rng = np.random.default_rng(seed)
    answer = rng.integers(0, 30, 12)
    rows = []
    for _ in range(num_rows):
        if rng.random() < 0.3:
            answer[rng.integers(12)] = rng.integers(0, 30)
        rows.append(AnsweredPrompt(Prompt("q", tuple(rng.integers(0, 30, 6).tolist())), tuple(answer.tolist())))
    return rows


def run(name: str, train: list[AnsweredPrompt], test: list[AnsweredPrompt], gamma: int = 4) -> list:
    return replay_fold(DRAFTERS[name](), train, test, gamma=gamma, vocabulary=30, clock=lambda: 0.0)


@pytest.mark.parametrize("name", DRAFTERS)
def test_passes_of_any_drafter_add_up_to_the_answer(name: str) -> None:
    rows = drive(30)
    for row, each in zip(run(name, rows[:20], rows[20:]), rows[20:], strict=True):
        assert sum(row.accepted) + len(row.accepted) in (row.length, row.length + 1)  # the last pass may end early
        assert row.length == len(each.answer)
        assert all(a <= d <= 4 for a, d in zip(row.accepted, row.drafted, strict=True))
        assert row.prefix <= row.matches <= row.length


@pytest.mark.parametrize("name", DRAFTERS)
def test_a_draft_does_not_depend_on_what_comes_behind_it(name: str) -> None:
    """Two futures that differ from some place on, replayed by two drafters of one history: same drafts before."""
    rows = drive(30)
    drafts = []
    for tail in (1, 2):
        drafter = DRAFTERS[name]()
        drafter.fit(rows[:20])
        for each in rows[20:25]:
            drafter.update(each.prompt, each.answer)
        answer = (*rows[25].answer[:6], *(tail,) * 6)
        drafts.append([tuple(drafter.draft(rows[25].prompt, answer[:place], 4).tokens) for place in range(7)])
    assert drafts[0] == drafts[1]


@pytest.mark.parametrize("name", DRAFTERS)
def test_only_drafters_labelled_so_learn_from_accepted_answers(name: str) -> None:
    rows = drive(40)
    drafter = DRAFTERS[name]()
    drafter.fit(rows[:20])
    before = [tuple(drafter.draft(rows[39].prompt, rows[39].answer[:place], 4).tokens) for place in range(12)]
    for each in rows[20:39]:
        drafter.update(each.prompt, each.answer)
    after = [tuple(drafter.draft(rows[39].prompt, rows[39].answer[:place], 4).tokens) for place in range(12)]
    assert (before != after) == drafter.learns_online


@pytest.mark.parametrize("name", DRAFTERS)
def test_a_drafter_that_has_learnt_nothing_may_draft_nothing(name: str) -> None:
    drafter = DRAFTERS[name]()
    drafter.fit([])
    assert len(drafter.draft(QUESTION, (1, 2), 3).tokens) <= 3


def test_probabilities_go_with_the_tokens_that_they_made_likely() -> None:
    rows = drive(20)
    for name in ("positional", "ngram"):
        drafter = DRAFTERS[name]()
        drafter.fit(rows)
        draft = drafter.draft(rows[0].prompt, rows[0].answer[:3], 5)
        assert draft.probabilities is not None
        assert [place.tokens[0] for place in draft.probabilities] == list(draft.tokens)


def test_what_is_no_distribution_is_refused() -> None:
    for tokens, shares in (((1, 2), (0.5, 0.4)), ((1,), (0.5, 0.5)), ((1, 1), (0.5, 0.5)), ((1, 2), (1.5, -0.5))):
        with pytest.raises(InputError, match=r"to one|negative"):
            Distribution(tokens, shares)


@pytest.mark.parametrize(("tokens", "words"), [((31,), "outside the vocabulary"), ((1,) * 9, "asked for 4")])
def test_a_drafter_that_breaks_its_word_is_named(tokens: tuple[int, ...], words: str) -> None:
    class Wrong(Drafter):
        name = "wrong"

        def draft(self, prompt: Prompt, accepted: object, num_tokens: int) -> Draft:  # noqa: ARG002
            return Draft(tokens)

    with pytest.raises(InputError, match=f"drafter 'wrong'.*{words}"):
        replay_fold(Wrong(), [], drive(2), gamma=4, vocabulary=30, clock=lambda: 0.0)


def test_positional_is_the_most_frequent_token_of_each_place() -> None:
    drafter = DRAFTERS["positional"]()
    drafter.fit([AnsweredPrompt(QUESTION, answer) for answer in ((1, 2, 3), (1, 5, 3), (4, 5))])
    assert tuple(drafter.draft(QUESTION, (), 9).tokens) == (1, 5, 3)
    assert tuple(drafter.draft(QUESTION, (1,), 1).tokens) == (5,)
    assert drafter.draft(Prompt("another", ()), (), 3).tokens == ()


def test_ngram_goes_by_the_longest_context_it_knows() -> None:
    drafter = DRAFTERS["ngram"]()
    answers = ((1, 2, 3, 4), (1, 2, 3, 4), (9, 3, 5), (8, 3, 5), (7, 3, 5))
    drafter.fit([AnsweredPrompt(QUESTION, answer) for answer in answers])
    assert drafter.draft(QUESTION, (1, 2, 3), 1).tokens == [4]
    assert drafter.draft(QUESTION, (6, 3), 1).tokens == [5]
    assert drafter.draft(QUESTION, (), 2).tokens == [1, 2]


def test_eventgpt_is_taken_place_for_place() -> None:
    assert DRAFTERS["eventgpt"]().draft(QUESTION, (1,), 5).tokens == (8, 9)


def test_prompt_lookup_finds_the_latest_earlier_place() -> None:
    drafter = DRAFTERS["prompt_lookup"]()
    assert drafter.draft(QUESTION, (1, 2, 3, 1, 2), 2).tokens == (3, 1)
    assert drafter.draft(QUESTION, (5, 8), 2).tokens == (9, 5)
    assert drafter.draft(QUESTION, (5, 6), 2).tokens == ()


def test_previous_window_continues_from_where_the_words_are_found() -> None:
    drafter = DRAFTERS["previous_window"]()
    drafter.update(QUESTION, (1, 2, 3, 4, 5))
    assert drafter.draft(QUESTION, (), 2).tokens == (1, 2)
    assert drafter.draft(QUESTION, (9, 9, 2, 3), 2).tokens == (4, 5)
    assert drafter.draft(QUESTION, (9, 9), 2).tokens == (3, 4)
    assert Continuation((1, 2, 1, 3)).behind((0, 0, 1), 1) == (3,)


def test_previous_window_is_that_of_the_same_sequence_and_question() -> None:
    drafter = DRAFTERS["previous_window"]()
    drafter.update(Prompt("q", (), sequence="a"), (1, 2))
    drafter.update(Prompt("q", (), sequence="b"), (3, 4))
    drafter.update(Prompt("other", (), sequence="a"), (5, 6))
    assert drafter.draft(Prompt("q", (), sequence="a"), (), 2).tokens == (1, 2)
    assert drafter.draft(Prompt("q", (), sequence="c"), (), 2).tokens == ()


def test_retrieval_takes_the_answer_with_the_nearest_draft() -> None:
    drafter = DRAFTERS["retrieval"]()
    drafter.fit([AnsweredPrompt(Prompt("q", (1, 2, 3)), (11, 12)), AnsweredPrompt(Prompt("q", (4, 5, 6)), (13, 14))])
    assert drafter.draft(Prompt("q", (9, 2, 3)), (), 2).tokens == (11, 12)
    assert drafter.draft(Prompt("q", (4, 5, 9)), (13,), 2).tokens == (14,)


def test_hybrid_follows_a_drive_that_repeats_itself_and_learns_a_new_answer_at_once() -> None:
    old, new = tuple(range(12)), tuple(range(12, 24))
    drafter = DRAFTERS["hybrid"]()
    drafter.fit([AnsweredPrompt(QUESTION, old)] * 10)
    assert drafter.draft(QUESTION, (), 12).tokens == old
    for _ in range(2):
        drafter.update(QUESTION, new)
    assert drafter.draft(QUESTION, new[:1], 11).tokens == new[1:]


def test_hybrid_is_the_same_whether_or_not_its_thoughts_were_kept() -> None:
    rows = drive(30)
    kept, fresh = DRAFTERS["hybrid"](), DRAFTERS["hybrid"]()
    for drafter in (kept, fresh):
        drafter.fit(rows[:20])
    for each in rows[20:]:
        for place in range(12):
            kept.draft(each.prompt, each.answer[:place], 4)
        kept.update(each.prompt, each.answer)
        fresh.update(each.prompt, each.answer)
    assert kept.draft(QUESTION, rows[0].answer[:2], 8) == fresh.draft(QUESTION, rows[0].answer[:2], 8)


def test_hybrid_starts_again_for_another_question() -> None:
    drafter, other = DRAFTERS["hybrid"](), Prompt("another", ())
    drafter.fit([AnsweredPrompt(QUESTION, (1, 2, 3)), AnsweredPrompt(other, (4, 5, 6))] * 3)
    assert drafter.draft(QUESTION, (), 3).tokens == (1, 2, 3)
    assert drafter.draft(other, (), 3).tokens == (4, 5, 6)


def test_folds_keep_their_distance() -> None:
    folds = contiguous_folds(100, 5, 10)
    assert [row for fold in folds for row in fold.test] == list(range(100))
    for fold in folds:
        assert min(abs(a - b) for a in fold.train for b in fold.test) == 11
        assert len(fold.train) in (70, 60)
    with pytest.raises(ConfigError, match="leave no row to learn from"):
        contiguous_folds(50, 5, 20)


def test_folds_of_named_sequences_never_cut_one() -> None:
    sequences = [*"aaaabbbbbbccd", *"ab"]
    folds = folds_of(sequences, 3, 20)
    assert [sorted({sequences[row] for row in fold.test}) for fold in folds] == [["b"], ["a"], ["c", "d"]]
    for fold in folds:
        assert sorted([*fold.train, *fold.test]) == list(range(15))
        assert list(fold.test) == sorted(fold.test)
    assert len(folds_of(sequences, 9, 20)) == 4


@pytest.mark.parametrize("sequences", [[""] * 30, ["a"] * 30, ["a", ""] * 15])
def test_folds_are_stretches_where_sequences_are_not_distinguished(sequences: list[str]) -> None:
    assert folds_of(sequences, 5, 2) == contiguous_folds(30, 5, 2)


def test_matches_by_shift() -> None:
    assert num_matches((1, 2, 3), (1, 9, 3)) == 2
    assert num_matches((1, 2, 3), (0, 1, 2), 1) == 2
    assert num_matches((0, 1, 2), (1, 2, 3), -1) == 2


def test_constant_is_the_answer_that_agrees_most_and_not_the_first() -> None:
    answers = [(1, 9, 9, 9), (1, 2, 3, 9), (1, 2, 3, 4), (8, 2, 3, 4), (1, 2, 7, 4)]
    drafter = DRAFTERS["constant"]()
    drafter.fit([AnsweredPrompt(QUESTION, answer) for answer in answers])
    assert tuple(drafter.draft(QUESTION, (), 4).tokens) == (1, 2, 3, 4)
    assert tuple(drafter.draft(QUESTION, (5, 5), 4).tokens) == (3, 4)


def test_hybrid_learns_which_words_of_an_answer_go_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first word decides the last one, and the words between are drawn at random: no context comes twice."""

    def right() -> float:
        rng = np.random.default_rng(0)
        drafter = HybridDrafter()

        def answer(first: int) -> tuple[int, ...]:
            return (first, *rng.integers(10, 60, 6).tolist(), 5, 2 + first)  # 0 … 5 2, 1 … 5 3

        for _ in range(150):
            drafter.update(QUESTION, answer(int(rng.integers(2))))
        tries = [answer(n % 2) for n in range(40)]
        return np.mean([drafter.draft(QUESTION, each[:-1], 1).tokens[0] == each[-1] for each in tries])

    assert right() > 0.9
    monkeypatch.setattr(hybrid, "WORD_RATE", 0.0)
    assert right() < 0.75, "without ties between words it is close to a guess, so the case can tell"


def test_of_equal_matches_the_nearest_to_the_same_place_is_continued() -> None:
    text = Continuation((5, 1, 9, 8, 7, 6, 5, 2))
    assert text.behind((5,), 1) == (1,)
    assert text.behind((3, 3, 3, 3, 3, 3, 5), 1) == (2,)


def test_hybrid_forgets_with_every_window() -> None:
    """A word for 30 windows, another for 4: what was said a moment ago counts for more than what was often said."""
    drafter = HybridDrafter()
    for _ in range(30):
        drafter.update(QUESTION, (1, 2, 3))
    for _ in range(4):
        drafter.update(QUESTION, (1, 2, 4))
    (tally_old, tally_new) = (drafter._tallies[QUESTION.question, ("place", 2)][token] for token in (3, 4))
    assert (tally_old.total, tally_new.total) == (30.0, 4.0)
    assert tally_new.window - tally_old.window == 4, "windows since the old word was said"
    assert tally_old.recent[1] == pytest.approx(sum(0.2**age for age in range(30)))
    assert drafter.draft(QUESTION, (1, 2), 1).tokens == (4,)


def test_the_hybrids_probabilities_add_up_to_one_and_its_draft_begins_with_the_likeliest() -> None:
    rng = np.random.default_rng(0)
    asked = Prompt("?", ())
    drafter = HybridDrafter()
    assert drafter.expected(asked, ()) == {}
    for _ in range(12):
        drafter.update(asked, tuple(rng.integers(5, 9, 6).tolist()))
    for accepted in ((), (5,), (6, 7)):
        expected = drafter.expected(asked, accepted)
        assert sum(expected.values()) == pytest.approx(1.0)
        assert drafter.draft(asked, accepted, 1).tokens[0] == max(expected, key=lambda token: expected[token])
