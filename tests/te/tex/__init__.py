"""What Transformer Engine's compiled part does, in plain torch: functions by their C++ names.

They compute in float32 and round to the dtype that is asked for, as the kernels do; what is asked of them in
a shape, dtype or order that the kernels would misread fails. What is not here raises NotImplementedError.
"""
