"""A run, or several, explained on one HTML page that needs no other file and no network."""

REPORT = "report.html"
"""The page of a run, in its directory."""
