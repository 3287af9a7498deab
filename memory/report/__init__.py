"""What was used: the monitor, the log of copies and blocks, its text and its picture."""
