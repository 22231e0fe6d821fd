"""How config files are read; apart from `config`, so that PyYAML is imported when a file is."""

import yaml

from .files import is_plain, twice


class PlainLoader(yaml.SafeLoader):
    """Reads booleans and nulls; leaves numbers and dates as the text that was written.

    Refuses a key given twice, and text that cannot be written or name a file. A tag as `!!int` says nothing more.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        if key := twice(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            raise yaml.YAMLError(f"{key} is given twice")
        return super().construct_mapping(node, deep)

    def construct_scalar(self, node: yaml.ScalarNode) -> str:
        value = super().construct_scalar(node)
        if not is_plain(value):
            raise yaml.YAMLError(f"{value!r} holds NUL or half of a character")
        return value

    def construct_yaml_bool(self, node: yaml.ScalarNode) -> bool:
        if self.construct_scalar(node).lower() not in self.bool_values:
            raise yaml.YAMLError(f"{node.value!r} is no boolean")
        return super().construct_yaml_bool(node)


PlainLoader.add_constructor("tag:yaml.org,2002:bool", PlainLoader.construct_yaml_bool)
for kind in ("int", "float", "timestamp"):
    PlainLoader.add_constructor(f"tag:yaml.org,2002:{kind}", PlainLoader.construct_yaml_str)
PlainLoader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if tag.endswith((":bool", ":null", ":merge"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
