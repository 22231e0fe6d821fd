from languagebind.config import run
from languagebind.partner import main

if __name__ == "__main__":
    run(main)
