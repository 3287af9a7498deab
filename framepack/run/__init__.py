"""One FramePack run: its loop over the sections, the folder that keeps them, and what it asks of the program."""
