"""Train a modality's encoder against a frozen text tower: `python -m training.main`."""
