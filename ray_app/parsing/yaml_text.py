"""YAML from outside: plain values of a bounded size, however its anchors are used."""

import re
from typing import Any

import yaml

MAX_CHARACTERS = 2**16
"""Longest text. Settings, sweeps and calibrations have a few thousand; this many take up to a second."""
MAX_VALUES = 2**16
"""Most values, those repeated by anchors counted each time."""


class _PlainLoader(yaml.SafeLoader):
    """Read 1:8 as text, not as 68: YAML 1.1 reads it in base 60."""


_PlainLoader.yaml_implicit_resolvers = yaml.SafeLoader.yaml_implicit_resolvers | {
    digit: [("tag:yaml.org,2002:str", re.compile(r"\d+:\d+$")), *yaml.SafeLoader.yaml_implicit_resolvers[digit]]
    for digit in "0123456789"
}


def parse_yaml(text: str) -> Any:
    """Return the one document's value. ValueError: no YAML, too long, too deep, anchors that repeat without end."""
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"it has {len(text):,} characters, the limit is {MAX_CHARACTERS:,}")
    try:
        loader = _PlainLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        if (values := _values_in(node, {})) > MAX_VALUES:
            raise ValueError(f"its anchors repeat it to {values:,} values, the limit is {MAX_VALUES:,}")
        return loader.construct_document(node)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    except (yaml.YAMLError, ArithmeticError, LookupError, TypeError, AttributeError, MemoryError) as error:
        raise ValueError(str(error) or type(error).__name__) from error


def _values_in(node: yaml.Node, known: dict[int, int]) -> int:
    """Count the values below a node, each as often as it is repeated. ValueError: it contains itself."""
    if id(node) in known:
        if not known[id(node)]:
            raise ValueError("an anchor contains itself")
        return known[id(node)]
    known[id(node)] = 0
    count = 1
    for item in node.value if not isinstance(node, yaml.ScalarNode) else ():
        count += sum(_values_in(part, known) for part in (item if isinstance(item, tuple) else (item,)))
    known[id(node)] = count
    return count
