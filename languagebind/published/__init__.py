"""The published checkpoints and the classes of the original package, on our encoder and text tower."""

# First of all, because it makes `_auto` import the configs, and whatever imports them may import it in their midst.
import transformers.models.auto.configuration_auto  # noqa: F401
