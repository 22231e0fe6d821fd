"""How config files are read; apart from `config`, so that PyYAML is imported when a file is."""

import yaml

from .files import is_plain


class PlainLoader(yaml.SafeLoader):
    """Reads booleans and nulls; leaves numbers and dates as the text that was written.

    Refuses a key given twice, and text that cannot be written or name a file.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.YAMLError(f"{key} is given twice")
        return super().construct_mapping(node, deep)

    def construct_scalar(self, node: yaml.ScalarNode) -> str:
        value = super().construct_scalar(node)
        if not is_plain(value):
            raise yaml.YAMLError(f"{value!r} holds NUL or half of a character")
        return value


PlainLoader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if tag.endswith((":bool", ":null", ":merge"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
