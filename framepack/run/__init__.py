"""One run: its folder, its film, and what it asks of the program around it."""
