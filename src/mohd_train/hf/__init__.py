"""The Hugging Face integration: importing this registers it with AutoConfig and AutoModelForCausalLM."""

from mohd_train.hf.configuration import MoHDConfig
from mohd_train.hf.modeling import MoHDForCausalLM

__all__ = ["MoHDConfig", "MoHDForCausalLM"]
