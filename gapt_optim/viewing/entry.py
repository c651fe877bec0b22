"""Where the command ``gapt-optim`` begins: a package that is missing is one clear line."""

from __future__ import annotations

import sys


def main() -> int:
    """Run the command; exit code 2 where one of its packages is not installed."""
    try:
        from .command import main as command
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == __name__.partition(".")[0]:
            raise
        install = 'pip install "gapt_optim[viewing]", or from a checkout: pip install -e ".[viewing]"'
        print(f"error: gapt-optim needs the package {error.name}; {install}", file=sys.stderr)
        return 2
    return command()
