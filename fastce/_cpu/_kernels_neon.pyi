from fastce._cpu._kernels_baseline import *
