"""Convert a public download into the data that evaluation reads: `languagebind prepare`.

Each kind of dataset is a module here. `prepare: {kind: table, ...}` in a dataset's YAML selects `table.py`, which has

    class Options                       # optional: the other keys of `prepare`; otherwise `options` is a dict
    def prepare(source: Path, output: Path, options: Options) -> Iterator[dict]
    def class_names(source: Path, options: Options) -> dict[str, str] | None  # optional: label -> name, in order

Both functions raise `UserError` if the download is damaged or does not match the options. `prepare` yields the rows of
the manifest in order. A row's `path` is relative to `source`, or to `output` if the kind writes the file itself.
`output` is the folder of the manifest or of the class folders. A row also has a `label`, `labels`, `caption` or
`captions`, and may have `where`, its place in a table. The generator may return counts of changed samples by reason.
"""
