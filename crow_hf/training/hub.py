"""The Hub: what of a purification is pushed, and when."""

import json
import shlex
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, create_branch, create_repo, upload_folder
from huggingface_hub.errors import HfHubHTTPError
from transformers import TrainingArguments
from transformers.trainer_utils import HubStrategy
from transformers.utils.hub import PushInProgress

from .. import models


# All that makes a model, as `save_pretrained` of models, adapters and tokenizers names it. Whatever else lies in an output
# folder, such as rows, reports, logs and checkpoints, is nobody else's business.
PUSHED = [
    *("README.md", "LICENSE*", "config.json", "generation_config.json", "adapter_config.json"),
    *("model*.safetensors", "adapter_model*.safetensors", "*.safetensors.index.json"),
    *("tokenizer*", "*.model", "*.tiktoken", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt"),
    *("chat_template.*", "additional_chat_templates/*", "preprocessor_config.json", "processor_config.json"),
    *("configuration_*.py", "modeling_*.py", "tokenization_*.py"),
    *(file.name for file in Path(models.__file__).parent.glob("[!_]*.py")),
]
# Weights of an earlier push, which would be loaded beside the new ones or in their place.
REPLACED = [
    *("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json", "pytorch_model*"),
    *("adapter_model.*", "adapter_config.json"),
]


def create_repository(args: TrainingArguments, token: str | None = None, private: bool | None = None) -> str:
    """
    Create the repository of a run unless it is there, so that a wrong token or name shows before the work and not after it.

    Args:
        args (`TrainingArguments`):
            Of the run; without a `hub_model_id`, the repository is named after `output_dir`.
        token (`str`, *optional*):
            In place of `args.hub_token`.
        private (`bool`, *optional*):
            In place of `args.hub_private_repo`.

    Returns:
        `str`: Its full name.

    Raises:
        `OSError`: If that is not possible.
    """
    name = args.hub_model_id or Path(args.output_dir).absolute().name
    token = args.hub_token if token is None else token
    private = args.hub_private_repo if private is None else private
    try:
        return create_repo(name, token=token, private=private, exist_ok=True).repo_id
    except Exception as error:
        raise OSError(
            f"The repository {name} cannot be opened on the Hub ({_reason(error)}): check the connection, the token of "
            "`hf auth login` and `hub_model_id`, or leave out `push_to_hub`."
        ) from error


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
    Push a saved model with its tokenizer, code and card, and nothing else that lies in its folder.

    Weights of an earlier push are deleted in the same commit: an old adapter would win over new full weights.

    Args:
        folder (`str` or `Path`):
            The folder.
        name (`str`, *optional*):
            The repository; by default one that is named as the folder.
        token (`str`, *optional*):
            By default that of `hf auth login`.
        private (`bool`, *optional*):
            Whether the repository is private, if it is new.
        revision (`str`, *optional*):
            The branch, which is made if it is not there; `"main"` by default.
        commit_message (`str`, *optional*, defaults to `"Purified model"`):
            Of the commit.
        blocking (`bool`, *optional*, defaults to `True`):
            Whether to wait for the end of the upload.

    Returns:
        `CommitInfo`, or a `Future` of it.

    Raises:
        `OSError`: If it fails. The sentence says how to try again.
    """
    folder = Path(folder)
    name = name or folder.absolute().name
    files = sorted({str(file.relative_to(folder)) for pattern in PUSHED for file in folder.glob(pattern)})
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
            run_as_future=not blocking,
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


class HubMixin:
    """What a trainer pushes: the model when it is purified to the end, and a card that says what was shown of it."""

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """As in [`~transformers.Trainer`]; what goes wrong is told in one sentence."""
        if self.is_world_process_zero():
            self.hub_model_id = create_repository(self.args, token, private)
            self.push_in_progress = None

    def create_model_card(self, **facts: Any) -> None:
        """Write the README.md, see [`build_model_card`]."""
        # Here and not above: a card shows reports, and they are about trainers.
        from ..reporting.model_card import build_model_card
        from .files import write_text

        if self.is_world_process_zero():
            write_text(Path(self.args.output_dir) / "README.md", str(build_model_card(self, **facts)))

    def push_to_hub(
        self,
        commit_message: str = "Purified model",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **facts: Any,
    ) -> CommitInfo | Future[CommitInfo] | None:
        """
        Save the model and push it with its tokenizer, code and card: see [`push_folder`].

        Args:
            commit_message (`str`, *optional*, defaults to `"Purified model"`):
                Of the commit.
            blocking (`bool`, *optional*, defaults to `True`):
                Whether to wait for the end of the upload.
            token (`str`, *optional*):
                In place of `args.hub_token`.
            revision (`str`, *optional*):
                In place of `args.hub_revision`.
            private (`bool`, *optional*):
                In place of `args.hub_private_repo`.
            **facts:
                For the card, such as `purification` and `evaluations`: see [`build_model_card`].

        Returns:
            `CommitInfo`, or a `Future` of it if not `blocking`; `None` on other processes than the first.

        Raises:
            `OSError`: If the upload fails. The model is saved before, and the sentence says how to try again.

        Example:

        ```python
        >>> purification = purify("suspect", clean_rows)
        >>> purification.trainer.push_to_hub(purification=purification)
        ```
        """
        args = self.args
        self.callback_handler.on_push_begin(args, self.state, self.control)
        self.save_model(_internal_call=True)
        self.create_model_card(**facts)
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

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """
        Push a checkpoint beside the model, if `hub_strategy` asks for checkpoints.

        Nothing half purified is ever pushed as the model itself, and neither is the pickle that the Trainer would write for it.
        """
        args = self.args
        if not self.is_world_process_zero():
            return
        if args.hub_strategy not in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            return
        if self.push_in_progress is not None and not self.push_in_progress.is_done() and not args.hub_always_push:
            return
        self._note_failed_push()
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
            self.push_in_progress = PushInProgress([])
        self.push_in_progress.jobs.append(job)

    def _finish_current_push(self) -> None:
        super()._finish_current_push()
        self._note_failed_push()

    def _note_failed_push(self) -> None:
        """Of a push that is over: nobody else asks the future what became of it."""
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
    """What went wrong, in one line."""
    told = str(error).strip().splitlines()
    if isinstance(error, HfHubHTTPError):
        told = [f"{error.response.status_code} {error.response.reason_phrase}"]
        told += [" ".join(error.server_message.split())] if error.server_message else []
        return ": ".join(told)
    return told[0].rstrip(".:") if told else type(error).__name__
