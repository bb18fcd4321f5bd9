"""The mixing strategies, one file a family, and their table."""
