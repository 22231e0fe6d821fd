from languagebind.config import run
from languagebind.data.embed_text import main

if __name__ == "__main__":
    run(main)
