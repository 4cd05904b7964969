"""``python -m plasticnet`` and the command ``plasticnet``: the command line, or a line that says what it lacks."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line. Where a package of the extra ``cli`` is missing, name it; the exit status is then 2."""
    try:
        from plasticnet.apps.cli import main as run
    except ModuleNotFoundError as error:
        if (error.name or "plasticnet").partition(".")[0] == "plasticnet":
            raise
        print(f"plasticnet: the commands need {error.name}: pip install 'plasticnet[cli]'", file=sys.stderr)
        sys.exit(2)
    run()


if __name__ == "__main__":
    main()
