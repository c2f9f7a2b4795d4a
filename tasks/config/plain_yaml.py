"""YAML without its traps: what two people could read in two ways is refused."""

import re
from typing import Any

import yaml

_AMBIGUOUS = re.compile(r"[-+]?0[0-9_]+|[-+]?[0-9_]+(:[0-9]+)+")
"""Whole numbers that YAML reads with other bases than people: octal after a zero, and by sixties between colons."""


class PlainLoader(yaml.SafeLoader):
    """Loader of plain values that refuses keys that occur twice, and numbers that are not what they look like."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key.value!r} occurs twice; give it once", key.start_mark
                )
            if isinstance(key.value, str):
                seen.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        if _AMBIGUOUS.fullmatch(node.value):
            raise yaml.constructor.ConstructorError(
                None,
                None,
                f"{node.value} would be read as {super().construct_yaml_int(node)}; write the number without leading "
                "zeros and colons, or text in quotes",
                node.start_mark,
            )
        return super().construct_yaml_int(node)


PlainLoader.add_constructor("tag:yaml.org,2002:int", PlainLoader.construct_yaml_int)
