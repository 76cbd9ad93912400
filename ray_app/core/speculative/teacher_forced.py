"""Target passes of a greedy drafter, counted from one pass of the drafter along the target's own answer.

A greedy draft equals the answer up to its first wrong token, and up to there the drafter has read the answer itself.
So a draft's accepted part is the run of right tokens from where it starts, and the count is that of `decode`.
"""

from collections.abc import Sequence


def num_passes(right: Sequence[bool], gamma: int) -> int:
    """Return the target passes that an answer takes with drafts of γ tokens.

    `right`: for each token of the answer, its end included, True if the drafter's likeliest token behind those
    before it is that token.
    """
    passes = place = 0
    while place < len(right):
        run = 0
        while run < gamma and place + run < len(right) and right[place + run]:
            run += 1
        place += run + 1
        passes += 1
    return passes
