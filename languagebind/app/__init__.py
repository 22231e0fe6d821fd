"""A page in the browser for files and texts: python -m languagebind.app --help"""
