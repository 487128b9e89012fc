"""Between the arrays of the caller and those that the kernels work on: formats, strides, order."""
