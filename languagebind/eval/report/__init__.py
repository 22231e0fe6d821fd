"""Make an HTML page of results: `languagebind report`."""
