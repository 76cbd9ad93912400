"""Target passes of a greedy drafter, counted from one pass of the drafter along the target's own answer.

A greedy draft equals the answer up to its first wrong token, and up to there the drafter has read the answer itself.
So a draft's accepted part is the run of right tokens from where it starts, and the count is that of `decode`.

A drafter that reads the target's states has only predicted ones in a draft, so one pass is not enough: drafts begin
at every position, and `num_passes_by_runs` counts with their runs of right tokens.
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


def num_passes_by_runs(runs: Sequence[int], gamma: int) -> int:
    """Return the target passes that an answer takes with drafts of γ tokens from the target's own states.

    `runs`: for each token of the answer, its end included, how many tokens in a row a draft behind it has right. The
    first draft begins with the answer's first token, which the state behind the prompt gives.
    """
    last, passes = min(runs[0], gamma - 1) + 1, 1
    while last < len(runs) - 1:
        last += min(runs[last], gamma) + 1
        passes += 1
    return passes
