"""The `grouped` backend's products: tokens that chose the same sub-dimension share a GEMM."""
