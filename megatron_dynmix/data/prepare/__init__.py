"""Sources of any format -> tokens on disk."""
