"""``python -m plasticnet`` is the command line."""

from plasticnet.apps.cli import main

main()
