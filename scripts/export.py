from languagebind.config import run
from languagebind.hub.export import main

if __name__ == "__main__":
    run(main)
