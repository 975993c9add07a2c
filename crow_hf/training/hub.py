"""The Hub: which files of a purification are pushed, and when."""

import json
import os
import shlex
from collections.abc import Iterable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, ModelCard, ModelCardData, create_branch, create_repo, get_token, upload_folder
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import HFValidationError, validate_repo_id
from peft import PeftModel
from transformers import PreTrainedModel, TrainingArguments
from transformers.trainer_utils import HubStrategy
from transformers.utils.hub import PushInProgress

from .. import models
from ..files import FURTHER_TEMPLATES, write_text
from ..secrets import hide_known_secrets, hide_secrets, holds_secret, remember_secrets
from .checkpoints import CheckpointMixin
from .recorder import base_model_of
from .saves import SIDE_FILES


# The files of a model, as `save_pretrained` of models, adapters and tokenizers names them. Other files of an output
# folder, such as rows, reports, logs and checkpoints, stay private.
PUSHED = [
    *("README.md", *SIDE_FILES, "config.json", "generation_config.json", "adapter_config.json"),
    *("model*.safetensors", "adapter_model*.safetensors", "*.safetensors.index.json"),
    *("tokenizer*", "*.model", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt"),
    *(FURTHER_TEMPLATES, "configuration_*.py", "modeling_*.py", "tokenization_*.py"),
    *(file.name for file in Path(models.__file__).parent.glob("[!_]*.py")),
]
# Weights of an earlier push. They would be loaded beside the new weights or instead of them.
REPLACED = [
    *("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json", "pytorch_model*"),
    *("adapter_model.*", "adapter_config.json"),
]
# The repositories that this process has opened, by their full names, each with its token. A run that has begun does
# not ask for its repository again until the push.
_OPEN: set[tuple[str, str | None]] = set()
# For a model that is pushed without a card of its own.
PLAIN_CARD = """\
---
{{ card_data }}
---

# {{ model_name }}

This model was fine-tuned with `CrowTrainer` of `crow_hf`. Nothing was measured on it: it is not known whether a
backdoor was removed, and what that cost.
"""


def is_hub_name(name: str) -> bool:
    """Return whether a name can be that of a repository on the Hub. A local path cannot."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return bool(name) and not Path(name).exists()


def create_repository(args: TrainingArguments, token: str | None = None, private: bool | None = None) -> str:
    """
    Create the repository of a run, if it does not exist. A wrong token or name then shows before the work and not
    after it.

    Args:
        args (`TrainingArguments`):
            The arguments of the run. Without a `hub_model_id`, the repository is named after `output_dir`.
        token (`str`, *optional*):
            The token. Defaults to `args.hub_token`.
        private (`bool`, *optional*):
            Whether a new repository is private. Defaults to `args.hub_private_repo`.

    Returns:
        `str`: The full name of the repository.

    Raises:
        `OSError`: If the repository cannot be created or opened.
    """
    name = args.hub_model_id or Path(args.output_dir).absolute().name
    token = args.hub_token if token is None else token
    private = args.hub_private_repo if private is None else private
    if (name, token) in _OPEN:
        return name
    try:
        full_name = create_repo(name, token=token, private=private, exist_ok=True).repo_id
    except Exception as error:
        raise OSError(
            f"The repository {name} cannot be opened on the Hub ({_reason(error)}): check the connection, the token "
            "of `hf auth login` and `hub_model_id`, or leave out `push_to_hub`."
        ) from error
    _OPEN.add((full_name, token))
    return full_name


def push_folder(
    folder: str | Path,
    name: str | None = None,
    *,
    token: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str = "Purified model",
    blocking: bool = True,
) -> CommitInfo | Future[CommitInfo]:
    """
    Push a saved model with its tokenizer, its code and its card. Other files of the folder are not pushed.

    Weights of an earlier push are deleted in the same commit, because an old adapter would take precedence over new
    full weights.

    Args:
        folder (`str` or `Path`):
            The folder of the saved model.
        name (`str`, *optional*):
            The name of the repository. Defaults to the name of the folder.
        token (`str`, *optional*):
            The token. Defaults to that of `hf auth login`.
        private (`bool`, *optional*):
            Whether a new repository is private.
        revision (`str`, *optional*):
            The branch, which is created if it does not exist. Defaults to `"main"`.
        commit_message (`str`, *optional*, defaults to `"Purified model"`):
            The commit message.
        blocking (`bool`, *optional*, defaults to `True`):
            Whether to wait for the end of the upload.

    Returns:
        `CommitInfo`, or a `Future` of it if not `blocking`.

    Raises:
        `OSError`: If a file holds what looks like a secret, or if the upload fails. The message says how to try again.
    """
    folder = Path(folder)
    name = name or folder.absolute().name
    files = sorted({str(file.relative_to(folder)) for pattern in PUSHED for file in folder.glob(pattern)})
    _check_no_secrets(folder, files)
    try:
        name = create_repo(name, token=token, private=private, exist_ok=True).repo_id
        if revision is not None:
            create_branch(name, branch=revision, token=token, exist_ok=True)
        return upload_folder(
            repo_id=name,
            folder_path=folder,
            commit_message=commit_message,
            token=token,
            revision=revision,
            allow_patterns=files,
            delete_patterns=REPLACED,
            run_as_future=not blocking,  # type: ignore[call-overload]  # declared for literals only
        )
    except Exception as error:
        call = [json.dumps(str(folder)), json.dumps(name)]
        call += ["private=True"] if private else []
        call += [] if revision is None else [f"revision={json.dumps(revision)}"]
        code = f"from crow_hf import push_folder; push_folder({', '.join(call)})"
        raise OSError(
            f"The upload to {name} failed ({_reason(error)}), but the model is whole in {folder}: try again with "
            f"`python -c {shlex.quote(code)}`."
        ) from error


def _check_no_secrets(folder: Path, files: Iterable[str]) -> None:
    """Refuse to push a secret. The tokens of this machine's user are looked for by their values too."""
    remember_secrets(os.environ)
    remember_secrets({"token": get_token()})
    for file in files:
        if (folder / file).is_file() and holds_secret(folder / file):
            raise OSError(
                f"Nothing of {folder} is pushed, because {file} holds what looks like an access token or a private "
                "key: remove it there, and push with `push_folder`."
            )


class HubMixin(CheckpointMixin):
    """
    The part of a trainer that pushes to the Hub: the purified model with its card, and checkpoints if they are
    asked for.
    """

    model: PreTrainedModel | PeftModel
    # transformers declares both as `None`.
    hub_model_id: str | None  # type: ignore[assignment]
    push_in_progress: PushInProgress | None  # type: ignore[assignment]
    _tag_names: list[str]

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """As in [`~transformers.Trainer`], with errors in one sentence."""
        if self.is_world_process_zero():
            self.hub_model_id = create_repository(self.args, token, private)
            self.push_in_progress = None

    def create_model_card(self, card: ModelCard | str | None = None) -> None:
        """
        Write a model card as `README.md` into the output folder.

        Args:
            card (`ModelCard` or `str`, *optional*):
                The card, for example of [`build_model_card`]. Without it an existing `README.md` is kept. If there is
                none, a plain card says that nothing was measured.
        """
        path = Path(self.args.output_dir) / "README.md"
        if self.is_world_process_zero() and (card is not None or not path.exists()):
            write_text(path, hide_known_secrets(str(self._plain_card() if card is None else card)))

    def push_to_hub(
        self,
        commit_message: str = "Purified model",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        card: ModelCard | str | None = None,
    ) -> CommitInfo | Future[CommitInfo] | None:
        """
        Save the model and push it with its tokenizer, its code and its card, see [`push_folder`].

        Args:
            commit_message (`str`, *optional*, defaults to `"Purified model"`):
                The commit message.
            blocking (`bool`, *optional*, defaults to `True`):
                Whether to wait for the end of the upload.
            token (`str`, *optional*):
                The token. Defaults to `args.hub_token`.
            revision (`str`, *optional*):
                The branch. Defaults to `args.hub_revision`.
            private (`bool`, *optional*):
                Whether a new repository is private. Defaults to `args.hub_private_repo`.
            card (`ModelCard` or `str`, *optional*):
                The model card. Defaults to the `README.md` in the output folder, which [`purify`] writes.

        Returns:
            `CommitInfo`, or a `Future` of it if not `blocking`. `None` on other processes than the first.

        Raises:
            `OSError`: If the upload fails. The model is saved before, and the message says how to try again.

        Example:

        ```python
        >>> purification = purify("suspect", clean_rows)
        >>> purification.trainer.push_to_hub()
        ```
        """
        args = self.args
        self.callback_handler.on_push_begin(args, self.state, self.control)
        self.save_model(_internal_call=True)
        self.create_model_card(card)
        if not self.is_world_process_zero():
            return None
        self._finish_current_push()
        return push_folder(
            args.output_dir,
            self.hub_model_id or args.hub_model_id,
            token=args.hub_token if token is None else token,
            private=args.hub_private_repo if private is None else private,
            revision=args.hub_revision if revision is None else revision,
            commit_message=commit_message,
            blocking=blocking,
        )

    def _plain_card(self) -> ModelCard:
        is_adapter = isinstance(self.model, PeftModel)
        base = base_model_of(self.model).config._name_or_path
        data = ModelCardData(
            base_model=base if is_hub_name(base) else None,
            library_name="peft" if is_adapter else "transformers",
            pipeline_tag="text-generation",
            tags=[*self._tag_names, *(["lora"] if is_adapter else [])],
        )
        name = self.args.hub_model_id or Path(self.args.output_dir).absolute().name
        return ModelCard.from_template(data, template_str=PLAIN_CARD, model_name=name.split("/")[-1])

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """
        Push a checkpoint into a folder of its own, if `hub_strategy` asks for checkpoints.

        An unfinished model is never pushed as the model itself, and the pickle that the Trainer writes beside it never
        is.
        """
        args = self.args
        if not self.is_world_process_zero():
            return
        if args.hub_strategy not in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            return
        if self.push_in_progress is not None and not self.push_in_progress.is_done() and not args.hub_always_push:
            return
        self._note_failed_push()
        try:
            folder = Path(checkpoint_folder)
            _check_no_secrets(folder, sorted(str(file.relative_to(folder)) for file in folder.rglob("*")))
        except OSError as error:
            self.note_failure(str(error))
            return
        name = "last-checkpoint" if args.hub_strategy == HubStrategy.CHECKPOINT else Path(checkpoint_folder).name
        job = upload_folder(
            repo_id=self.hub_model_id,
            folder_path=checkpoint_folder,
            path_in_repo=name,
            commit_message=f"Checkpoint of step {self.state.global_step}",
            token=args.hub_token,
            revision=args.hub_revision,
            run_as_future=True,
        )
        if self.push_in_progress is None:
            self.push_in_progress = PushInProgress()
        jobs: Any = self.push_in_progress.jobs
        jobs.append(job)

    def _finish_current_push(self) -> None:
        super()._finish_current_push()
        self._note_failed_push()

    def _note_failed_push(self) -> None:
        """Record the errors of a finished push. Nothing else reads the result of the future."""
        push = getattr(self, "push_in_progress", None)
        if push is None or not push.is_done():
            return
        self.push_in_progress = None
        for error in filter(None, (job.exception() for job in push.jobs)):
            self.note_failure(
                f"A checkpoint could not be pushed to {self.hub_model_id} ({_reason(error)}); it is in "
                f"{self.args.output_dir}, and the training went on."
            )


def _reason(error: Exception) -> str:
    """Return the reason of an error in one line."""
    told = hide_secrets(str(error)).strip().splitlines()
    if isinstance(error, HfHubHTTPError):
        told = [f"{error.response.status_code} {error.response.reason_phrase}"]
        told += [" ".join(error.server_message.split())] if error.server_message else []
        return ": ".join(told)
    return told[0].rstrip(".:") if told else type(error).__name__
