"""Train a modality's encoder against a text tower: `python -m training.main`."""
