"""The command line: a module or two for each command."""
