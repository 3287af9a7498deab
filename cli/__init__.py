"""The command line: generate, plan, inspect, convert, demo."""
