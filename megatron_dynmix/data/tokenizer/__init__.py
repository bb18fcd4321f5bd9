"""Text -> tokens with character positions."""
