"""The YAML loader of config files. It is not in `config`, so that PyYAML is imported only if a file is read."""

from typing import Any

import yaml

from .files import twice


class PlainLoader(yaml.SafeLoader):
    """Reads booleans and nulls, and keeps numbers and dates as text. Refuses a key that is given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        if key := twice(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            raise yaml.YAMLError(f"{key} is given twice")
        return super().construct_mapping(node, deep)


for kind in ("int", "float", "timestamp"):
    tag = f"tag:yaml.org,2002:{kind}"
    PlainLoader.add_constructor(tag, yaml.SafeLoader.construct_yaml_str)  # type: ignore[type-var]  # a subclass
PlainLoader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if tag.endswith((":bool", ":null", ":merge"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
