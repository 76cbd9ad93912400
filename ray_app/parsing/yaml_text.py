"""YAML from outside: plain values of a bounded size, however its anchors are used."""

import re
from collections import Counter
from typing import Any

import yaml

MAX_CHARACTERS = 2**16
"""Longest text. Settings, sweeps and calibrations have a few thousand; this many take up to a second."""
MAX_VALUES = 2**16
"""Most values, those repeated by anchors counted each time."""


TEXT = re.compile(r"0[\d_]+$|0x\w{17,}$|0b\w{65,}$|\d+_[\d_]*$|\d+(:[\d.]+)+$|\d{4}-\d\d?-\d\d?(\D.*)?$", re.ASCII)
"""Text that begins with a digit and that YAML 1.1 takes for something else: 010 (8), 2024_01 (202401), 1:8 (68),
2024-01-31 (a date), numbers of thousands of digits."""
PLAIN = ("null", "bool", "int", "float", "str", "seq", "map")
"""Kinds of values that are read, by their tags in YAML."""


class _PlainLoader(yaml.SafeLoader):
    """Reads what JSON could hold too: a folder may be named 2024-01-31."""


_PlainLoader.yaml_implicit_resolvers = yaml.SafeLoader.yaml_implicit_resolvers | {
    digit: [("tag:yaml.org,2002:str", TEXT), *yaml.SafeLoader.yaml_implicit_resolvers[digit]]
    for digit in "0123456789"
}
_PlainLoader.yaml_constructors = {
    tag: constructor
    for tag, constructor in yaml.SafeLoader.yaml_constructors.items()
    if tag is None or tag.rpartition(":")[2] in PLAIN
}


def parse_yaml(text: str) -> Any:
    """Return the one document's value, of plain values.

    ValueError: no YAML, too long, too deep, a key that is there twice, anchors that repeat without end.
    """
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
    """Count the values below a node, each as often as it is repeated. ValueError: it contains itself, a key twice."""
    if id(node) in known:
        if not known[id(node)]:
            raise ValueError("an anchor contains itself")
        return known[id(node)]
    known[id(node)] = 0
    if isinstance(node, yaml.MappingNode):
        keys = [(key.tag, key.value) for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := next((key for key, count in Counter(keys).items() if count > 1), None):
            raise ValueError(f"'{twice[1][:40]}' is there twice, in the mapping of line {node.start_mark.line + 1}")
    count = 1
    for item in node.value if not isinstance(node, yaml.ScalarNode) else ():
        count += sum(_values_in(part, known) for part in (item if isinstance(item, tuple) else (item,)))
    known[id(node)] = count
    return count
