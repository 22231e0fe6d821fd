"""From annotated files to shards: VIDAL's layout, webdataset shards, and a sample world in the same form."""
