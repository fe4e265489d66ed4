"""Offline data: episodes, windows over them, the one border of units, and the file formats."""
