"""``python -m memspan``: the command line."""

from memspan.commands import main

main()
