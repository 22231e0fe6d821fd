"""Make VIDAL's modalities and captions from videos and titles: python -m languagebind.generate STEP --help"""
