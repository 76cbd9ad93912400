"""The draft length follows measured costs and acceptance, and costs next to nothing where drafts never help."""

import numpy as np
import pytest

from ray_app.core.speculative.decoding import Pass
from ray_app.core.speculative.gamma import OnlineGamma
from ray_app.errors import InputError

MOST = 8


def simulated(
    chance: float, pass_s: list[float], token_s: float, num_passes: int, seed: int = 0
) -> tuple[list[int], float]:
    """γ of each pass, and the speed-up over plain decoding, where each drafted token is right with one chance."""
    rng = np.random.default_rng(seed)
    policy = OnlineGamma(MOST, {size: pass_s[size] for size in (1, 2, 5, MOST + 1)})
    chosen, tokens, seconds = [], 0, 0.0
    for _ in range(num_passes):
        gamma = policy.choose()
        accepted = int((rng.random(gamma) < chance).cumprod().sum())
        cost = pass_s[gamma + 1] * float(rng.uniform(0.9, 1.1))
        policy.observe(Pass(gamma, gamma, accepted, gamma + 1, gamma * token_s, cost))
        chosen.append(gamma)
        tokens += accepted + 1
        seconds += cost + gamma * token_s
    return chosen, tokens * pass_s[1] / seconds


FLAT = [0.0, 1.0, *(1.0 + 0.03 * n for n in range(1, MOST + 1))]
STEEP = [0.0, *(float(n) for n in range(1, MOST + 2))]


def test_a_drafter_that_is_always_wrong_costs_under_three_hundredths() -> None:
    for pass_s in (FLAT, STEEP):
        _, speedup = simulated(0.0, pass_s, 0.01, 2000)
        assert speedup > 0.97


def test_drafts_that_are_always_right_are_taken_whole_where_passes_cost_little() -> None:
    chosen, speedup = simulated(1.0, FLAT, 0.01, 300)
    assert set(chosen[100:]) == {MOST}
    assert speedup > 6.0


def test_nothing_is_drafted_where_a_pass_costs_as_much_as_its_tokens() -> None:
    chosen, speedup = simulated(0.9, STEEP, 0.05, 1000)
    assert np.mean(chosen[200:]) < 0.3
    assert speedup > 0.97


@pytest.mark.parametrize(("chance", "token_s"), [(0.3, 0.0), (0.6, 0.1), (0.8, 0.2), (0.9, 0.02)])
def test_the_choice_is_near_the_best_fixed_length(chance: float, token_s: float) -> None:
    def speed(gamma: int) -> float:
        return sum(chance**n for n in range(gamma + 1)) / (FLAT[gamma + 1] + gamma * token_s)

    best = max(speed(gamma) for gamma in range(MOST + 1))
    _, speedup = simulated(chance, FLAT, token_s, 4000)
    assert speedup > 0.95 * best


def test_drafts_that_become_right_are_found() -> None:
    policy = OnlineGamma(MOST, {1: 1.0, 9: 1.24})
    chosen = []
    for place in range(3000):
        gamma = policy.choose()
        policy.observe(Pass(gamma, gamma, gamma if place > 1000 else 0, gamma + 1, 0.0, FLAT[gamma + 1]))
        chosen.append(gamma)
    assert np.mean(chosen[500:1000]) < 1.0
    assert chosen[-1] == MOST


def test_a_limit_below_one_or_no_measured_pass_is_an_error() -> None:
    with pytest.raises(InputError, match="a limit of at least 1"):
        OnlineGamma(0, {1: 1.0})
    with pytest.raises(InputError, match="the time of a pass over 1 token"):
        OnlineGamma(4, {2: 1.0})
