"""``python -m specguard.cli``."""

from specguard.cli.main import main

if __name__ == "__main__":
    main(prog_name="specguard")
