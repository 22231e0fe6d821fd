"""Checkpoints in and out: ours, the published ones, and the classes of the original package."""
