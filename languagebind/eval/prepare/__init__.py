"""Public downloads to manifests that evaluation reads; a module a kind of download."""
