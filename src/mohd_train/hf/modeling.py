"""The transformer behind Hugging Face's interface: what works with ``LlamaForCausalLM`` works with ``MoHDForCausalLM``.

Masks, caches, generation and the classification loss are transformers' own; the model is :mod:`mohd_train.model`'s.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    DynamicCache,
    GenerationMixin,
    PreTrainedModel,
)
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    SequenceClassifierOutputWithPast,
)

from mohd_train.hf.configuration import MoHDConfig
from mohd_train.model.init import fill_parameter
from mohd_train.model.llama import IGNORE_INDEX, Transformer

# What tokenizers return for any model, and what has no effect here
IGNORED = ("token_type_ids",)


@dataclass
class MoHDCausalLMOutput(CausalLMOutputWithPast):
    """``loss`` is cross-entropy plus balance loss; ``balance_loss`` is the latter alone. Both need ``labels``."""

    balance_loss: Tensor | None = None


class _CacheAt(NamedTuple):
    """A transformers cache together with the positions of the new tokens, which some kinds require."""

    cache: Any
    cache_position: Tensor

    def get_seq_length(self) -> int:
        return int(self.cache.get_seq_length())

    def update(self, k: Tensor, v: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        keys, values = self.cache.update(k, v, layer, {"cache_position": self.cache_position})
        return keys, values


class MoHDPreTrainedModel(PreTrainedModel):
    """What the three models share: ``self.transformer``, and how it is run."""

    config_class = MoHDConfig
    config: MoHDConfig
    base_model_prefix = "transformer"
    _no_split_modules = ["Block"]
    _supports_sdpa = True
    supports_gradient_checkpointing = True

    def __init__(self, config: MoHDConfig) -> None:
        super().__init__(config)
        if (chosen := config._attn_implementation) not in (None, "sdpa"):
            raise ValueError(
                f"attn_implementation={chosen!r}: MoHD computes attention by torch's scaled_dot_product_attention alone; leave it "
                "out, or give 'sdpa'"
            )
        self.transformer = Transformer(config.to_plan(), kernels=config.kernels)

    def _init_weights(self, module: nn.Module) -> None:
        """Initializes the modules for which a loaded folder has no weights."""
        if isinstance(module, nn.Linear) and module is getattr(self, "score", None):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
            return
        for leaf, parameter in module.named_parameters(recurse=False):
            fill_parameter(module, leaf, parameter, self.transformer.plan)

    @property
    def base_model(self) -> Any:
        """The model without its head, as clients (TRL among them) call it: ``base_model(input_ids=...).last_hidden_state``."""
        return _Backbone(self)

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding [V, D]."""
        return self.transformer.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replaces the token embedding."""
        self.transformer.embedding = value  # type: ignore[assignment]

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
        """Recomputes each block in the backward pass, without reentrant autograd (the routing's tensors would be lost in it).

        Raises:
            ValueError: ``use_reentrant`` is asked for.
        """
        asked = dict(gradient_checkpointing_kwargs or {})
        if asked.pop("use_reentrant", False) or asked:
            raise ValueError(
                f"gradient_checkpointing_kwargs={gradient_checkpointing_kwargs}: give {{'use_reentrant': False}}, or nothing"
            )
        self.transformer.gradient_checkpointing = True

    def gradient_checkpointing_disable(self) -> None:
        """Turns recomputation off again."""
        self.transformer.gradient_checkpointing = False

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether blocks are recomputed in the backward pass."""
        return self.transformer.gradient_checkpointing

    def run(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        cache_position: Tensor | None = None,
        **others: Any,
    ) -> tuple[Any, Any]:
        """A `TransformerOutput` without logits, and the cache that a caller gets back (None without ``use_cache``).

        A cache that is given is used, whatever ``use_cache`` says, in training and with ``labels`` too, as Llama's is.

        Raises:
            TypeError: an argument that is none of this model's.
            ValueError: what can't be served, with the reason.
        """
        if unknown := [key for key, value in others.items() if key not in IGNORED and value is not None]:
            raise TypeError(f"{type(self).__name__} takes no argument {', '.join(map(repr, unknown))}")
        if output_attentions or (output_attentions is None and self.config.output_attentions):
            raise ValueError(
                "output_attentions: scaled_dot_product_attention returns no attention weights, and MoHD has no other attention"
            )
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training and labels is None
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        if past_key_values is not None and any(getattr(past_key_values, "is_sliding", [])):
            raise ValueError("past_key_values forgets tokens (a sliding window), and MoHD attends to all of them")
        if inputs_embeds is None:
            inputs_embeds = self.transformer.embedding(input_ids)
        if cache_position is None:
            past = 0 if past_key_values is None else past_key_values.get_seq_length()
            cache_position = torch.arange(past, past + inputs_embeds.shape[1], device=inputs_embeds.device)
        mask: Any = create_causal_mask(
            config=self.config,
            input_embeds=inputs_embeds,
            attention_mask=attention_mask,
            cache_position=cache_position,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        if mask is not None and mask.is_floating_point():  # a 4D mask of the caller's, added to the scores
            mask = mask.to(inputs_embeds.dtype)
        if position_ids is None:
            position_ids = cache_position[None]
        out = self.transformer(
            input_ids,
            attention_mask if attention_mask is not None and attention_mask.dim() == 2 else None,
            position_ids,
            None if past_key_values is None else _CacheAt(past_key_values, cache_position),
            labels_BT=labels,
            logits=False,
            balance=labels is not None,
            embeddings_BTD=inputs_embeds,
            mask=mask,
            built_mask=True,
            hidden_states=self.config.output_hidden_states if output_hidden_states is None else output_hidden_states,
        )
        return out, past_key_values if use_cache else None

    def wants_dict(self, return_dict: bool | None) -> bool:
        """Whether ``forward`` returns an output object rather than a tuple."""
        return bool(self.config.use_return_dict if return_dict is None else return_dict)


class _Backbone:
    """A model's transformer with the arguments and the output of :class:`MoHDModel`; it holds no weights of its own."""

    def __init__(self, owner: MoHDPreTrainedModel) -> None:
        self.owner = owner

    def __call__(
        self, input_ids: Tensor | None = None, return_dict: bool | None = None, **kwargs: Any
    ) -> BaseModelOutputWithPast | tuple[Any, ...]:
        out, cache = self.owner.run(input_ids, **kwargs)
        result = BaseModelOutputWithPast(
            last_hidden_state=out.hidden, past_key_values=cache, hidden_states=out.hidden_states or None
        )
        return result if self.owner.wants_dict(return_dict) else result.to_tuple()


class MoHDForCausalLM(MoHDPreTrainedModel, GenerationMixin):  # type: ignore[misc]  # transformers' own bases disagree
    """A MoHD or LLaMA transformer for causal language modelling.

    Routing of the last forward pass is not kept: call ``model.transformer`` for logits together with routing.
    """

    _tied_weights_keys: Any = ["transformer.head.weight"]

    def __init__(self, config: MoHDConfig) -> None:
        super().__init__(config)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        """The head [V, D]."""
        return self.transformer.head

    def set_output_embeddings(self, value: nn.Module) -> None:
        """Replaces the head."""
        self.transformer.head = value  # type: ignore[assignment]

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers', with the weights laid out for decoding token by token (``Transformer.lay_out_for_decoding``)."""
        if not self.training:
            self.transformer.lay_out_for_decoding()
        return super().generate(*args, **kwargs)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> MoHDCausalLMOutput | tuple[Any, ...]:
        """As ``LlamaForCausalLM.forward``; ``labels`` equal the input, -100 where they don't count.

        Args:
            num_items_in_batch: tokens that count in all microbatches of a step. The loss is then this one's share of their mean,
                balance loss included, so that the microbatches' losses add up to the step's.
        """
        out, cache = self.run(
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, labels, use_cache, **kwargs
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) and logits_to_keep else logits_to_keep
        logits = self.transformer.head(out.hidden if isinstance(kept, int) else out.hidden[:, kept])
        loss: Any = None
        balance = None
        if labels is not None:
            assert out.cross_entropy is not None
            balance = out.balance_loss
            loss = out.cross_entropy + balance
            if num_items_in_batch is not None:
                loss = loss * ((labels[:, 1:] != IGNORE_INDEX).sum() / num_items_in_batch)
        result = MoHDCausalLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=cache,
            hidden_states=out.hidden_states or None,
            balance_loss=balance,
        )
        return result if self.wants_dict(return_dict) else result.to_tuple()


class MoHDModel(MoHDPreTrainedModel):
    """The transformer without its head: hidden states [B, T, D] after the final norm."""

    _keys_to_ignore_on_load_unexpected: Any = [r"^transformer\.head\."]

    def __init__(self, config: MoHDConfig) -> None:
        super().__init__(config)
        del self.transformer.head
        self.post_init()

    def forward(
        self, input_ids: Tensor | None = None, return_dict: bool | None = None, **kwargs: Any
    ) -> BaseModelOutputWithPast | tuple[Any, ...]:
        """As ``LlamaModel.forward``."""
        return _Backbone(self)(input_ids, return_dict, **kwargs)

    @property
    def base_model(self) -> Any:
        """Itself."""
        return self


class MoHDForSequenceClassification(MoHDPreTrainedModel):
    """A score for each label from the last token that isn't padding."""

    _keys_to_ignore_on_load_unexpected: Any = [r"^transformer\.head\."]

    def __init__(self, config: MoHDConfig) -> None:
        super().__init__(config)
        del self.transformer.head
        self.num_labels = config.num_labels
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutputWithPast | tuple[Any, ...]:
        """As ``LlamaForSequenceClassification.forward``: ``labels`` [B] are classes, or targets of a regression."""
        out, cache = self.run(input_ids, attention_mask, **kwargs)
        batch, positions = out.hidden.shape[:2]
        real = attention_mask
        if real is None and input_ids is not None and self.config.pad_token_id is not None:
            real = input_ids != self.config.pad_token_id
        if real is None and batch > 1 and self.config.pad_token_id is None:
            raise ValueError("several sequences at once need an attention_mask, or a pad_token_id in the configuration")
        order = torch.arange(positions, device=out.hidden.device)
        last = order[-1:].expand(batch) if real is None else ((real != 0) * order).argmax(-1)
        pooled = self.score(out.hidden)[torch.arange(batch, device=out.hidden.device), last]
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=pooled, labels=labels, pooled_logits=pooled, config=self.config)
        result = SequenceClassifierOutputWithPast(
            loss=loss, logits=pooled, past_key_values=cache, hidden_states=out.hidden_states or None
        )
        return result if self.wants_dict(return_dict) else result.to_tuple()


AutoModel.register(MoHDConfig, MoHDModel)
AutoModelForCausalLM.register(MoHDConfig, MoHDForCausalLM)
AutoModelForSequenceClassification.register(MoHDConfig, MoHDForSequenceClassification)
