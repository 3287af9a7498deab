"""Video files and pictures: written, read, joined."""
