"""One map by its key, what a selection means to maps that are there, and the table of maps."""
