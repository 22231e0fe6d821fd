"""Public downloads to data that evaluation reads: `python -m languagebind.eval.prepare`.

A kind is a module here, found by name: `prepare: {kind: table, ...}` in a dataset's YAML means `table.py`, with

    def prepare(source: Path, output: Path, options: dict) -> Iterator[dict]

which yields the manifest's rows in order: `path` below `source`, or below `output` where the kind writes the file
itself (the manifest's folder, or the one of the class folders), with `label`, `labels`, `caption` or `captions`, and
where there is one `where`, the place in a table for messages. What the generator returns, if anything, are counts by
reason of what it left out. A kind may have `class_names(source, options) -> dict[label, name] | None` for datasets that
name their classes in a file.
"""
