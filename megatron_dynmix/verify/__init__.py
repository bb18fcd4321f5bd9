"""What a run drew: put on record, drawn again, compared."""
