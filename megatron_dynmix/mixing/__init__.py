"""From gate loads to sampling weights, in pure NumPy float64: no torch, no ranks, no files."""
