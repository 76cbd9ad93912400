"""The list of wrong changes fits the code: each changes a file that its tests can still import."""

import ast

import pytest

from benchmarks.mutants import ROOT, Mutant, read_mutants


@pytest.mark.parametrize("mutant", read_mutants(), ids=lambda mutant: mutant.name)
def test_a_listed_change_is_of_words_that_occur_once_and_leaves_valid_python(mutant: Mutant) -> None:
    source = (ROOT / mutant.file).read_text()
    changed = mutant.applied(source)
    assert changed != source
    ast.parse(changed)
    assert all((ROOT / test.partition("::")[0]).is_file() for test in mutant.tests)


def test_the_list_is_long_enough_to_say_something_and_names_nothing_twice() -> None:
    names = [mutant.name for mutant in read_mutants()]
    assert len(names) == len(set(names)) >= 60


def test_words_that_do_not_occur_once_are_refused() -> None:
    mutant = Mutant("x.py", "f", "1", "2", ())
    with pytest.raises(ValueError, match="2 times"):
        mutant.applied("def f():\n    return 1 + 1\n")
    with pytest.raises(ValueError, match="there is no f"):
        mutant.applied("def g():\n    return 1\n")
    assert mutant.applied("a = 1\ndef f():\n    return 1\n") == "a = 1\ndef f():\n    return 2\n"
