from languagebind.config import run
from languagebind.data.checking import main

if __name__ == "__main__":
    run(main)
