"""The command line: a file a command, each with `add_parser` and `run_command`."""
