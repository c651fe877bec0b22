"""The command where one of its packages is not installed."""

from __future__ import annotations

import subprocess
import sys


def test_a_missing_package_is_one_line() -> None:
    code = "import sys; sys.modules['tyro'] = None; from gapt_optim.viewing.entry import main; raise SystemExit(main())"
    done = subprocess.run([sys.executable, "-c", code, "report", "run"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: gapt-optim needs the package tyro; pip install")


def test_a_module_of_ours_that_is_missing_is_no_matter_of_packages() -> None:
    """An installation that is broken: pip would not mend it."""
    code = (
        "import sys; sys.modules['gapt_optim.viewing.command'] = None; import gapt_optim.viewing.entry as e; e.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("ModuleNotFoundError: import of gapt_optim.viewing.command halted")


def test_with_all_packages_it_is_the_command() -> None:
    code = "from gapt_optim.viewing.entry import main; raise SystemExit(main())"
    done = subprocess.run([sys.executable, "-c", code, "--version"], capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout.startswith("gapt-optim ")
