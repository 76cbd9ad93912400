"""Losses of drafts against numpy in float64, and the number of target passes against the loop of `decode`."""

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from ray_app.core.draft_losses import DRAFT_LOSSES, GAMMA, DraftWeights, Positions, draft_loss
from ray_app.core.speculative.decoding import FixedGamma, Greedy, Proposal, decode
from ray_app.core.speculative.teacher_forced import num_passes

B, L, I = 3, 5, 7  # noqa: E741
END = 9


def some_positions(seed: int = 0) -> tuple[Positions, np.ndarray, np.ndarray]:
    """Positions with answers of different lengths and a token that the drafter cannot say; p and q in float64."""
    rng = np.random.default_rng(seed)
    p = rng.dirichlet(np.full(I, 0.3), (B, L))
    p[0, 1] = np.eye(I)[2]  # no doubt at all
    logits = rng.normal(size=(B, L, I))
    q = np.exp(logits) / np.exp(logits).sum(axis=2, keepdims=True)
    chosen = p.argmax(axis=2)
    chosen[1, 2] = -1
    used = np.arange(L) < np.array([5, 4, 1])[:, None]
    positions = Positions(
        torch.tensor(logits, dtype=torch.float32).log_softmax(dim=2),
        torch.tensor(p, dtype=torch.float32),
        torch.tensor(chosen),
        torch.tensor(used),
    )
    return positions, p, q


def by_numpy(name: str, p: np.ndarray, q: np.ndarray, chosen: int) -> float:
    """A loss of one position."""
    seen = p > 0
    kl = float((p[seen] * np.log(p[seen] / q[seen])).sum())
    alpha = float(np.minimum(p, q).sum())
    match name:
        case "kl":
            return kl
        case "reverse_kl":
            return float((q * np.log(q / np.maximum(p, 1e-8))).sum())
        case "acceptance":
            return 1.0 - alpha
        case "lk":
            share = np.exp(-3.0 * alpha)
            return float(share * kl + (1.0 - share) * (1.0 - alpha))
        case _:
            return float(-np.log(q[chosen])) if chosen >= 0 else 0.0


def length_by_numpy(p: np.ndarray, q: np.ndarray, used: np.ndarray, row: int, start: int) -> float:
    """Expected share of a draft that is not accepted, token by token."""
    accepted, lost = 1.0, 0.0
    for place in range(start, min(start + GAMMA, L)):
        if not used[row, place]:
            break
        accepted *= np.minimum(p[row, place], q[row, place]).sum()
        lost += 1.0 - accepted
    return lost / GAMMA


def test_the_expected_length_weighs_early_tokens_more() -> None:
    positions, p, q = some_positions()
    used = positions.used_BL.numpy()
    expected = np.array([[length_by_numpy(p, q, used, b, n) for n in range(L)] for b in range(B)])
    found_BL = DRAFT_LOSSES["accepted_length"](positions)
    np.testing.assert_allclose(found_BL.numpy()[used], expected[used], rtol=2e-5)
    np.testing.assert_allclose(
        draft_loss(positions, DraftWeights(accepted_length=1.0)).numpy(),
        (expected * used).sum(axis=1) / used.sum(axis=1),
        rtol=2e-5,
    )
    logits = torch.zeros(1, L, I, requires_grad=True)
    p_BLI = torch.eye(I)[:1].expand(1, L, I)
    each = Positions(logits.log_softmax(2), p_BLI, torch.zeros(1, L, dtype=torch.long), torch.ones(1, L).bool())
    DRAFT_LOSSES["accepted_length"](each)[0, 0].backward()
    assert logits.grad is not None
    size_L = logits.grad[0, :, 0].abs()
    assert (size_L[:-1] > size_L[1:]).all()


@pytest.mark.parametrize("name", [name for name in DRAFT_LOSSES if name != "accepted_length"])
def test_a_loss_is_that_of_numpy_at_each_position_and_a_pair_has_the_mean_over_its_answer(name: str) -> None:
    positions, p, q = some_positions()
    expected = np.array(
        [[by_numpy(name, p[b, n], q[b, n], int(positions.chosen_BL[b, n])) for n in range(L)] for b in range(B)]
    )
    np.testing.assert_allclose(DRAFT_LOSSES[name](positions).numpy(), expected, rtol=2e-5, atol=2e-6)
    used = positions.used_BL.numpy()
    means = (expected * used).sum(axis=1) / used.sum(axis=1)
    weights = DraftWeights(**{name: 0.5})
    np.testing.assert_allclose(draft_loss(positions, weights).numpy(), 0.5 * means, rtol=2e-5, atol=2e-6)
    assert weights.needs_drafter
    assert not DraftWeights().needs_drafter


def test_weighted_losses_add_up() -> None:
    positions, _, _ = some_positions(1)
    both = draft_loss(positions, DraftWeights(kl=1.0, acceptance=2.0))
    apart = draft_loss(positions, DraftWeights(kl=1.0)) + 2.0 * draft_loss(positions, DraftWeights(acceptance=1.0))
    torch.testing.assert_close(both, apart)


@pytest.mark.parametrize("name", ["kl", "acceptance", "lk", "accepted_length"])
def test_a_drafter_that_is_the_target_has_no_loss(name: str) -> None:
    _, p, _ = some_positions(2)
    same = torch.tensor(np.maximum(p, 1e-30), dtype=torch.float64)
    positions = Positions(same.log(), same, same.argmax(dim=2), torch.ones(B, L, dtype=torch.bool))
    assert float(DRAFT_LOSSES[name](positions).abs().max()) < 1e-9


def test_positions_behind_an_end_have_no_gradient_and_the_weight_of_lk_has_none() -> None:
    positions, _, _ = some_positions(3)
    logits = torch.randn(B, L, I, dtype=torch.float64, requires_grad=True)
    each = Positions(logits.log_softmax(2), positions.p_BLI.double(), positions.chosen_BL, positions.used_BL)
    draft_loss(each, DraftWeights(lk=1.0)).sum().backward()
    assert logits.grad is not None
    assert not logits.grad[~positions.used_BL].any()
    with torch.no_grad():
        share = torch.exp(-3.0 * (1.0 - DRAFT_LOSSES["acceptance"](each)))
    again = logits.detach().requires_grad_()
    each = Positions(again.log_softmax(2), positions.p_BLI.double(), positions.chosen_BL, positions.used_BL)
    fixed = share * DRAFT_LOSSES["kl"](each) + (1.0 - share) * DRAFT_LOSSES["acceptance"](each)
    ((fixed * positions.used_BL).sum(dim=1) / positions.used_BL.sum(dim=1)).sum().backward()
    torch.testing.assert_close(logits.grad, again.grad)


class Recorded:
    """A target that says what was recorded."""

    def __init__(self, answer: Sequence[int]) -> None:
        self.answer, self.read = answer, 0

    def logits(self, places: range) -> torch.Tensor:
        rows = torch.zeros(len(places), END + 2)
        for row, place in enumerate(places):
            rows[row, self.answer[place] if place < len(self.answer) else 0] = 1.0
        return rows

    def prefill(self, _: object) -> torch.Tensor:
        return self.logits(range(1))

    def step(self, tokens: Sequence[int]) -> torch.Tensor:
        first, self.read = self.read + 1, self.read + len(tokens)
        return self.logits(range(first, self.read + 1))

    def crop(self, num_tokens: int) -> None:
        self.read -= num_tokens


class PartlyRight:
    """Drafts the answer's token where it is right, and a wrong one elsewhere."""

    def __init__(self, answer: Sequence[int], right: Sequence[bool]) -> None:
        self.answer, self.right = answer, right

    def propose(self, accepted: Sequence[int], num_tokens: int) -> Proposal:
        places = range(len(accepted), min(len(accepted) + num_tokens, len(self.answer)))
        return Proposal(tuple(self.answer[n] if self.right[n] else END + 1 for n in places))


@pytest.mark.parametrize("gamma", [1, 2, 8])
def test_passes_are_counted_as_decoding_makes_them(gamma: int) -> None:
    answer = [*range(1, 7), END]
    for right in itertools.product([False, True], repeat=len(answer)):
        done = decode(
            Recorded(answer),
            None,
            PartlyRight(answer, right),
            choice=Greedy(),
            gamma=FixedGamma(gamma),
            max_new_tokens=20,
            end_token=END,
            clock=lambda: 0.0,
        )
        assert list(done.tokens) == answer
        assert len(done.passes) == num_passes(right, gamma), right
