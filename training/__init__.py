"""`python -m training.main`: fits a modality's encoder to a frozen text tower."""
