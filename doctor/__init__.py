"""What of this machine works, tried rather than asked, and the command that mends what does not."""
