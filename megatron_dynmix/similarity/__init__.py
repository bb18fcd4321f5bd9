"""Which datasets are redundant, before anything is trained."""
