"""The sample world: rendered scenes as real files in the layout of VIDAL-10M."""
