"""The command line: ``specguard solve | models | backends``."""
