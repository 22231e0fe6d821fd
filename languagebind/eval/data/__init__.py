"""The datasets of evaluation, their samples, and the protocols that read them."""
