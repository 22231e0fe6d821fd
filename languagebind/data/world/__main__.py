from ...config import run
from .files import main

run(main)
