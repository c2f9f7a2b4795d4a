"""YAML without its traps: what two people could read in two ways is refused, and what has no end."""

import re
from typing import Any

import yaml

from negcore.texts import quoted

_AMBIGUOUS = re.compile(r"[-+]?0[0-9_]+|[-+]?[0-9_]+(:[0-9]+)+")
"""Whole numbers that YAML reads with other bases than people: octal after a zero, and by sixties between colons."""
_MOST_DIGITS = 100
_MOST_VALUES = 20_000
"""Values of a file in which every alias is written out: with aliases of aliases, a page can stand for billions."""
_MOST_LEVELS = 30


class PlainLoader(yaml.SafeLoader):
    """Loader of plain values that refuses keys that occur twice, and numbers that are not what they look like."""

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None:
            n_values = _n_values(node, {}, 0)
            if n_values > _MOST_VALUES:
                raise _refused(f"it stands for {n_values:.1e} values; at most {_MOST_VALUES} are read", node)
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key.value, str):
                raise _refused("a name of a field must be plain text", key)
            if key.value in seen:
                raise _refused(f"{quoted(key.value)} occurs twice; give it once", key)
            seen.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        if len(node.value) > _MOST_DIGITS:
            raise _refused(f"{quoted(node.value)} has {len(node.value)} digits; no number here needs as many", node)
        if _AMBIGUOUS.fullmatch(node.value):
            raise _refused(
                f"{node.value} would be read as {super().construct_yaml_int(node)}; write the number without leading "
                "zeros and colons, or text in quotes",
                node,
            )
        return super().construct_yaml_int(node)


def _refused(reason: str, node: yaml.Node) -> yaml.constructor.ConstructorError:
    return yaml.constructor.ConstructorError(None, None, reason, node.start_mark)


def _n_values(node: yaml.Node, known: dict[yaml.Node, int], level: int) -> int:
    """Count the values that a node stands for, every alias written out."""
    if level > _MOST_LEVELS:  # an alias of what it is part of has no end
        raise _refused(f"it is nested deeper than {_MOST_LEVELS} levels", node)
    if node not in known:
        inner = node.value if isinstance(node, yaml.CollectionNode) else ()
        nodes = (one for pair in inner for one in (pair if isinstance(pair, tuple) else (pair,)))
        known[node] = 1 + sum(_n_values(one, known, level + 1) for one in nodes)
    return known[node]


PlainLoader.add_constructor("tag:yaml.org,2002:int", PlainLoader.construct_yaml_int)
