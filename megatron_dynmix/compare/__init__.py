"""A grid of runs, strategy by seed: carried out, evaluated, and set side by side."""
