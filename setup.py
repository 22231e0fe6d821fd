from setuptools import find_packages, setup

# In a wheel, the folder configs/ is languagebind/_configs; languagebind/configs.py finds it in both places.
setup(
    packages=[*find_packages(include=["languagebind*", "training*"]), "languagebind._configs"],
    package_dir={"languagebind._configs": "configs"},
)
