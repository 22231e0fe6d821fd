"""The YAML loader for config files, kept out of `config` so that PyYAML is imported only when a file is read."""

from typing import Any

import yaml

from .files import twice


class PlainLoader(yaml.SafeLoader):
    """YAML loader that reads booleans and nulls, keeps numbers and dates as text, and rejects duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        if key := twice(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            raise yaml.YAMLError(f"the key {key} is given twice")
        return super().construct_mapping(node, deep)


for kind in ("int", "float", "timestamp"):
    tag = f"tag:yaml.org,2002:{kind}"
    PlainLoader.add_constructor(tag, yaml.SafeLoader.construct_yaml_str)  # type: ignore[type-var]  # a subclass
PlainLoader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if tag.endswith((":bool", ":null", ":merge"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
