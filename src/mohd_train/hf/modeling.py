"""``MoHDForCausalLM``: the transformer behind Hugging Face's interface (safetensors, ``generate`` with a cache, lm-eval)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from mohd_train.hf.configuration import MoHDConfig
from mohd_train.model.init import fill_parameter
from mohd_train.model.llama import Transformer


@dataclass
class MoHDCausalLMOutput(CausalLMOutputWithPast):
    """``loss`` is cross-entropy plus balance loss; ``balance_loss`` shows the latter alone. Both want ``labels``."""

    balance_loss: Tensor | None = None


class MoHDForCausalLM(PreTrainedModel, GenerationMixin):  # type: ignore[misc]  # transformers' own two bases disagree
    """A MoHD or LLaMA transformer for causal language modelling.

    Routing of the last forward pass is not kept: call ``model.transformer`` for logits together with routing.
    """

    config_class = MoHDConfig
    base_model_prefix = "transformer"
    _no_split_modules = ["Block"]
    _supports_sdpa = True
    supports_gradient_checkpointing = False

    def __init__(self, config: MoHDConfig) -> None:
        super().__init__(config)
        self.transformer = Transformer(config.to_plan(), kernels=config.kernels)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """For the modules that a loaded folder leaves without weights."""
        for leaf, parameter in module.named_parameters(recurse=False):
            fill_parameter(module, leaf, parameter, self.transformer.plan)

    def get_input_embeddings(self) -> nn.Embedding:
        """The token embedding [V, D]."""
        return self.transformer.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replaces the token embedding."""
        assert isinstance(value, nn.Embedding)
        self.transformer.embedding = value

    def get_output_embeddings(self) -> nn.Linear:
        """The head [V, D]."""
        return self.transformer.head

    def set_output_embeddings(self, value: nn.Linear) -> None:
        """Replaces the head."""
        self.transformer.head = value

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers', with the weights laid out for one token at a time (``Transformer.lay_out_for_decoding``)."""
        if not self.training:
            self.transformer.lay_out_for_decoding()
        return super().generate(*args, **kwargs)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int = 0,
        **kwargs: Any,
    ) -> MoHDCausalLMOutput | tuple[Any, ...]:
        """As ``LlamaForCausalLM.forward``; ``labels`` equal the input, -100 where they don't count."""
        refused = [key for key in ("inputs_embeds", "output_attentions", "output_hidden_states") if kwargs.get(key)]
        if refused:
            raise ValueError(
                f"MoHDForCausalLM does not offer {', '.join(refused)}; use forward hooks on model.transformer.blocks"
            )
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training and labels is None
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        mask = attention_mask
        if mask is not None and mask.dim() != 2:
            raise ValueError(
                f"attention_mask has shape {tuple(mask.shape)}; give [batch, positions] with 0 for padding"
            )
        cache = past_key_values if use_cache else None
        out = self.transformer(
            input_ids, mask, position_ids, cache, labels_BT=labels, logits=False, balance=labels is not None
        )
        logits = self.transformer.head(out.hidden[:, -logits_to_keep:] if logits_to_keep else out.hidden)
        result = MoHDCausalLMOutput(
            loss=None if out.cross_entropy is None else out.cross_entropy + out.balance_loss,
            logits=logits,
            past_key_values=past_key_values if use_cache else None,
            balance_loss=None if labels is None else out.balance_loss,
        )
        return result if return_dict is not False else result.to_tuple()


AutoModelForCausalLM.register(MoHDConfig, MoHDForCausalLM)
