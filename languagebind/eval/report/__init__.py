"""A page of results: `python -m languagebind.eval.report`."""
