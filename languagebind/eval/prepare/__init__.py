"""Make the data that evaluation reads from a public download: `python -m languagebind.eval.prepare`.

A kind of dataset is a module here, found by its name: `prepare: {kind: table, ...}` in a dataset's YAML means
`table.py`, with

    class Options(BaseModel)            # the other keys of `prepare`; without it, `options` below is a dict
    def prepare(source: Path, output: Path, options: Options) -> Iterator[dict]
    def class_names(source: Path, options: Options) -> dict[str, str] | None  # optional: label -> name, in order

Both raise `UserError` if the download is damaged, or not what the options describe. `prepare` yields the manifest's
rows in order. A row's `path` starts at `source`, or at `output` if the kind writes the file itself (`output` is the
manifest's folder, or that of the class folders). A row also has a `label`, `labels`, `caption` or `captions`, and may
have `where`, its place in a table for messages. The generator may return the counts of what it left out or changed.
"""
