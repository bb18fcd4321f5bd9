"""Checkpoints: written so that nothing is lost, read so that nothing wrong is used."""
