from ...config import run
from .make import main

run(main)
