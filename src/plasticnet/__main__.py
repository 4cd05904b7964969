"""``python -m plasticnet`` is the command line."""

from plasticnet.cli import main

main()
