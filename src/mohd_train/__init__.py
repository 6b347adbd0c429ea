"""MoHD (Mixture of Hidden Dimensions, arXiv:2412.05644): pretraining on MosaicML Composer."""

__version__ = "0.1.0"
