"""What other rules would have made of the signals that a run has on record."""
