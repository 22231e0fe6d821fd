"""What is evaluated: datasets, their samples, and how these are read."""
