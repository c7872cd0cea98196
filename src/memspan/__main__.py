"""``python -m memspan``: the command line."""

from memspan.cli import main

main()
