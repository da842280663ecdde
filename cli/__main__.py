"""The command, and ``python -m specguard.cli``: what runs before anything else is loaded."""

import sys


def main() -> None:
    """Run the command line; interrupted while it loads, it is as quiet as later on."""
    try:
        from specguard.cli.main import main as command
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        sys.exit(130)
    command(prog_name="specguard")


if __name__ == "__main__":
    main()
