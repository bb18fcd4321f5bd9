"""The ranks of a job: how they meet, are asked to stop, and find out who is missing."""
