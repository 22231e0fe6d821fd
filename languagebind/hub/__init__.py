"""Checkpoints in and out: ours, the published ones, and the classes of the original package."""

# First of all, because it makes `_auto` import the configs, and whatever imports them may import it in their midst.
import transformers.models.auto.configuration_auto  # noqa: F401
