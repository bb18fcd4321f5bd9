"""A run, or several, explained on one HTML page that needs no other file and no network."""
