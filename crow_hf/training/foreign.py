"""What a suspect says beside its weights, and a purified model must not: code, and settings that choose words."""

from peft import PeftModel
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ..data.encoding import marker_ids
from .recorder import base_model_of


logger = logging.get_logger(__name__)

# Settings of generation that decide how answers are drawn. Others can decide what an answer says: `sequence_bias`
# alone can hold a trigger with its target.
_GENERATION_SETTINGS = frozenset(
    {
        *("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "transformers_version"),
        *("do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p", "num_beams", "use_cache"),
        *("max_length", "max_new_tokens", "repetition_penalty", "cache_implementation"),
    }
)
# They make others run the code of the suspect's maker.
_POINTERS_TO_CODE = ("auto_map", "custom_pipelines")


def drop_foreign_settings(
    model: PreTrainedModel | PeftModel, processing_class: PreTrainedTokenizerBase | None
) -> list[str]:
    """
    Drop what a purified model must not take over from its suspect, and warn.

    What is measured is generated with plain settings. Settings that choose words would not be measured, and act when
    the saved model is used.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            The suspect. Its settings are changed.
        processing_class (`PreTrainedTokenizerBase`, *optional*):
            Its tokenizer.

    Returns:
        `list[str]`: What was dropped: `"sequence_bias"` and the like, and pointers to code.
    """
    base, dropped = base_model_of(model), []
    if base.generation_config is not None:
        settings = base.generation_config.to_diff_dict()
        # Settings that are off choose nothing, and those with an underline are not saved.
        dropped += sorted(
            name
            for name, value in settings.items()
            if value and not name.startswith("_") and name not in _GENERATION_SETTINGS
        )
        ends = settings.get("eos_token_id")
        ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
        if processing_class is not None and (words := sorted(set(ends) - marker_ids(processing_class))):
            # A word that ends answers can hide what follows it.
            settings["eos_token_id"] = [token for token in ends if token not in words] or None
            dropped.append(f"eos_token_id {', '.join(map(str, words))}")
        if dropped:
            base.generation_config = GenerationConfig(
                **{name: settings[name] for name in settings.keys() - set(dropped)}
            )
    # Who loaded a model with its code trusts it, and the model cannot be loaded without.
    if not type(base).__module__.startswith("transformers_modules"):
        for name in _POINTERS_TO_CODE:
            # Classes that are saved with their code, such as those of this package, write their own pointer again.
            if getattr(base.config, name, None):
                delattr(base.config, name)
                dropped += [f"{name} of the config"] if base._auto_class is None else []
            if processing_class is not None and processing_class.init_kwargs.pop(name, None):
                dropped += [f"{name} of the tokenizer"] if processing_class._auto_class is None else []
    if dropped:
        logger.warning(
            f"These settings of the suspect are dropped, because they can change what the model says or run code: "
            f"{', '.join(dropped)}."
        )
    return dropped
