"""The router that counts gate loads, and their reduction over the process groups."""
