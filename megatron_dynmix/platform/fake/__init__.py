"""A GPU that is not there: torch's fake tensors, which have shapes and devices but no data, take its place.

`process` starts a process in which they can, `device` puts the stand-ins in place there, `engine` is the C++
module of Transformer Engine in shapes, and `observe` sees every tensor that lives and every wait for it.
"""
