"""Make an HTML page of results: `python -m languagebind.eval.report`."""
