"""What a suspect says beside its weights, and a purified model must not: code, and settings that choose words."""

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, cached_file, logging

from ..data.encoding import marker_ids
from .recorder import base_model_of


logger = logging.get_logger(__name__)

# Settings of generation that decide how answers are drawn. Others can decide what an answer says: `sequence_bias`
# alone can hold a trigger with its target, and a `repetition_penalty` near 0 repeats the prompt.
_GENERATION_SETTINGS = frozenset(
    {
        *("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "transformers_version"),
        *("do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p", "use_cache"),
        *("max_length", "max_new_tokens", "cache_implementation"),
    }
)
# Others have no place in the config of a model, where they would act too.
_CHOOSE_WORDS = frozenset(name for name in vars(GenerationConfig()) if not name.startswith(("_", "output_")))
_CHOOSE_WORDS -= _GENERATION_SETTINGS
# They make others run the code of the suspect's maker.
_POINTERS_TO_CODE = ("auto_map", "custom_pipelines", "use_kernels", "kernel_config", "allow_all_kernels")
# With these, a config can name compiled code on the Hub, as `owner/kernel`, or code that takes minutes to compile.
_IMPLEMENTATION = re.compile(r"(attn|experts)_implementation(_internal)?$")
# Where [`load_causal_lm`] leaves the names of the settings that it did not follow.
_SET_ASIDE = "settings_set_aside"
_SAFE_WEIGHTS, _SAFE_INDEX = ".safetensors", ".safetensors.index.json"


def check_named_files(path: str, variant: str | None = None, **options: Any) -> None:
    """
    Check that a model's config and its index name no weights but safetensors beside them.

    Args:
        path (`str`):
            The folder of the model, or its name on the Hub.
        variant (`str`, *optional*):
            The variant of the weights.
        **options:
            Where the files are: the `revision`, the `cache_dir` and the like.

    Raises:
        `ValueError`: If a name leads to a file of another kind or in another place, or if a file cannot be read.
    """
    own = _read(path, CONFIG_NAME, options).get("transformers_weights")
    if own is not None:
        _check_names(path, CONFIG_NAME, [own], (_SAFE_WEIGHTS, _SAFE_INDEX))
    own_index = SAFE_WEIGHTS_INDEX_NAME.replace(".json", f".{variant}.json")
    for index in (SAFE_WEIGHTS_INDEX_NAME, own_index, str(own)):
        if index.endswith(_SAFE_INDEX) or index == own_index:
            names = _read(path, index, options).get("weight_map", {})
            _check_names(path, index, names.values() if isinstance(names, dict) else [names], (_SAFE_WEIGHTS,))


def _check_names(path: str, file_name: str, names: Iterable[Any], endings: tuple[str, ...]) -> None:
    for name in names:
        if not isinstance(name, str) or not name.endswith(endings) or re.search(r"[/\\:]", name):
            raise ValueError(
                f"{file_name} of {path} names the weights {name!r}: only safetensors beside it are read, because "
                "other files can run code or be private. Convert the weights on a machine you can afford to lose."
            )


def named_implementations(path: str, **options: Any) -> list[str]:
    """
    Return the settings of a model's config that say how to compute attention and experts. The user chooses that.

    Args:
        path (`str`):
            The folder of the model, or its name on the Hub.
        **options:
            Where the config is: the `revision`, the `cache_dir` and the like.
    """

    def search(held: Any) -> Iterator[str]:
        if isinstance(held, dict):
            yield from (key for key, value in held.items() if _IMPLEMENTATION.search(key) and value)
        for value in held.values() if isinstance(held, dict) else held if isinstance(held, list) else ():
            yield from search(value)

    return sorted(set(search(_read(path, CONFIG_NAME, options))))


def set_aside(model: PreTrainedModel, names: list[str]) -> None:
    """Remember settings of a suspect that were not followed, for [`drop_foreign_settings`], and warn."""
    if names:
        setattr(model, _SET_ASIDE, names)
        logger.warning(
            f"The config names implementations, which are not used: {', '.join(names)}. Pass `model_init_kwargs` to "
            "choose one."
        )


def settings_set_aside(model: PreTrainedModel | PeftModel) -> list[str]:
    """Return the settings of a suspect that [`set_aside`] remembers."""
    return getattr(base_model_of(model), _SET_ASIDE, [])


def _read(path: str, file_name: str, options: dict[str, Any]) -> dict[str, Any]:
    """Read a file of JSON of a model. A file that is missing, or holds something else, is empty."""
    file = cached_file(path, file_name, _raise_exceptions_for_missing_entries=False, **options)
    try:
        held = {} if file is None else json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file_name} of {path} cannot be read. Download or save the model again.") from error
    return held if isinstance(held, dict) else {}


def without_pointers(held: Any) -> Any:
    """Return a value of JSON without the settings that point to code."""
    if isinstance(held, dict):
        return {key: without_pointers(value) for key, value in held.items() if key not in _POINTERS_TO_CODE}
    return [without_pointers(value) for value in held] if isinstance(held, list) else held


def foreign_generation(
    model: PreTrainedModel | PeftModel, processing_class: PreTrainedTokenizerBase | None
) -> dict[str, Any]:
    """
    Return the settings of generation with which a suspect can choose its words, or end an answer at one.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            The suspect.
        processing_class (`PreTrainedTokenizerBase`, *optional*):
            Its tokenizer. Without it, no end token is taken for a word.

    Returns:
        `dict[str, Any]`: The settings by name. Of `eos_token_id`, a list of the ids that are no special tokens.
    """
    config = base_model_of(model).generation_config
    # Settings that are off choose nothing, and those with an underline are not saved.
    settings = {} if config is None else config.to_diff_dict()
    found = {
        name: value
        for name, value in sorted(settings.items())
        if value and not name.startswith("_") and name not in _GENERATION_SETTINGS
    }
    ends = _as_list(settings.get("eos_token_id"))
    # A word that ends answers can hide what follows it.
    if processing_class is not None:
        # They may be anything, also lists.
        marks = list(marker_ids(processing_class))
        found |= {"eos_token_id": words} if (words := [end for end in ends if end not in marks]) else {}
    return found


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
    base = base_model_of(model)
    found = foreign_generation(model, processing_class)
    words = found.get("eos_token_id", [])
    dropped = [name if name != "eos_token_id" else f"{name} {', '.join(map(str, words))}" for name in found]
    if found and base.generation_config is not None:
        settings = base.generation_config.to_diff_dict()
        ends = [token for token in _as_list(settings.pop("eos_token_id", None)) if token not in words]
        kept = {name: value for name, value in settings.items() if name not in found and not name.startswith("_")}
        base.generation_config = GenerationConfig(eos_token_id=ends or None, **kept)
        if words and (own := _as_list(getattr(base.config, "eos_token_id", None))):
            base.config.eos_token_id = [token for token in own if token not in words] or None
    # Who loaded a model with its code trusts it, and the model cannot be loaded without.
    pointers = () if type(base).__module__.startswith("transformers_modules") else _POINTERS_TO_CODE
    # Classes that are saved with their code, such as those of this package, write their own pointer again.
    in_config = _clean(base.config, pointers)
    dropped += [f"{name} of the config" for name in in_config if name != "auto_map" or base._auto_class is None]
    if processing_class is not None:
        in_tokenizer = _clean(processing_class.init_kwargs, pointers)
        dropped += [f"{name} of the tokenizer" for name in in_tokenizer if processing_class._auto_class is None]
    for adapter in model.peft_config.values() if isinstance(model, PeftModel) else ():
        # PEFT writes its own again where it needs one.
        if adapter.auto_mapping and '"transformers.' not in json.dumps(adapter.auto_mapping):
            dropped.append("auto_mapping of the adapter")
        adapter.auto_mapping = None
    dropped += settings_set_aside(model)
    if dropped:
        logger.warning(
            f"These settings of the suspect are dropped, because they can change what the model says or run code: "
            f"{', '.join(dropped)}."
        )
    return dropped


def _as_list(ids: Any) -> list[int]:
    return list(ids) if isinstance(ids, list) else [] if ids is None else [ids]


def _clean(config: Any, pointers: Iterable[str]) -> list[str]:
    """Drop pointers to code and settings that choose words from a config and the parts inside it, and name them."""
    if isinstance(config, (list, tuple)):
        return [name for each in config for name in _clean(each, pointers)]
    held, words = config, frozenset[str]()
    if isinstance(config, PreTrainedConfig):
        # Some architectures have such a setting of their own.
        held, words = vars(config), _CHOOSE_WORDS - {field.name for field in fields(config)}
    if not isinstance(held, dict):
        return []
    found = []
    for name, value in list(held.items()):
        if value and (name in pointers or name in words):
            del held[name]
            found.append(name)
        else:
            found += _clean(value, pointers)
    return found
