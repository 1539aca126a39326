"""Send a fine-tuned model to the Hugging Face hub: its files, its records, and a card made from these."""

import contextlib
import hashlib
import html
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
)
from huggingface_hub.utils import validate_repo_id

from common.errors import UserError
from common.folders import read_json
from common.page import HTML_FILE, markdown_table
from finetune.heads import PRUNED_HEADS_FILE, read_pruned_heads
from finetune.kept_models import kept_folder
from finetune.model_card import CARD_FILE, Subject, model_card
from finetune.model_record import PRETRAINING_FILE, RECORD_FILE, ModelRecord, read_record
from finetune.results import median_cell_of

RESULTS_FILE: Final = "results.json"
_CONFIG_FILE: Final = "config.json"
_AS_THEY_ARE: Final = (
    _CONFIG_FILE,
    *"tokenizer.json special_tokens_map.json added_tokens.json".split(),
    *"vocab.txt vocab.json merges.txt spiece.model sentencepiece.bpe.model".split(),
    PRUNED_HEADS_FILE,
)
# What is of this machine alone in other files.
_OF_HERE: Final = {
    "tokenizer_config.json": ("name_or_path", "is_local", "local_files_only"),
    PRETRAINING_FILE: ("init_from",),
}
_PATH: Final = re.compile(r"(?<![\w.:/<~])~?(?:/[\w.@+%=-]+){2,}")


@dataclass(frozen=True)
class SentFile:
    """A file of the repository, as it is sent."""

    name: str
    content: bytes | Path

    @property
    def size(self) -> int:
        """In bytes."""
        return len(self.content) if isinstance(self.content, bytes) else self.content.stat().st_size

    @property
    def sha256(self) -> str:
        """In hexadecimal."""
        if isinstance(self.content, bytes):
            return hashlib.sha256(self.content).hexdigest()
        with self.content.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


def publish_run(
    folder: Path,
    repo_id: str,
    private: bool = False,
    task_name: str | None = None,
    license: str | None = None,
    dry_run: bool = False,
) -> None:
    """Send a model with its records and card in one commit, and print where it is.

    Args:
        folder: of a ``train`` run, of a grid, or any model with ``finetuning.json``. Of a run the model of the best
            configuration's median seed is sent.
        repo_id: ``user/name``, or a name of the user's own.
        private: make the repository a private one, if it does not exist.
        task_name: which model, if the run has several.
        license: an identifier of the hub's list, for the card.
        dry_run: print every file and the card, and send nothing.

    Raises:
        UserError: the folder has no such model, or the hub can't be reached or refuses.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UserError(f"--repo_id {repo_id} is no name of a repository: {str(error).splitlines()[0]}") from None
    files = files_to_send(folder, repo_id, task_name, license)
    if dry_run:
        rows = [(file.name, f"{file.size:,}", file.sha256) for file in files]
        print(markdown_table(["file", "bytes", "SHA-256"], rows))
        print(f"\n{next(file.content for file in files if file.name == CARD_FILE).decode()}")
        print(f"nothing was sent; without --dry_run these {len(files)} files go to {repo_id}")
        return
    print(_send(files, repo_id, private))


def require_login() -> str:
    """The name of the user who is logged in on the hub.

    Raises:
        UserError: nobody is, or the hub can't be reached.
    """
    api = HfApi()
    with _hub_errors(api, "your account"):
        return api.whoami()["name"]


def _send(files: list[SentFile], repo_id: str, private: bool) -> str:
    """Returns the repository's address."""
    require_login()
    api = HfApi()
    with _hub_errors(api, repo_id):
        repository = api.create_repo(repo_id, private=private or None, exist_ok=True)
        if private and not api.model_info(repository.repo_id).private:
            raise UserError(f"{repo_id} exists on the hub and is public: make it private there, or leave --private out")
        additions = [
            CommitOperationAdd(file.name, file.content if isinstance(file.content, bytes) else str(file.content))
            for file in files
        ]
        api.create_commit(repository.repo_id, additions, commit_message="Model, records and card")
    return str(repository)


@contextlib.contextmanager
def _hub_errors(api: HfApi, what: str) -> Iterator[None]:
    """Tell in one line what the hub refuses, or that it can't be reached."""
    try:
        yield
    except LocalTokenNotFoundError:
        raise UserError(f"nobody is logged in at {api.endpoint}: run 'hf auth login', or set HF_TOKEN") from None
    except HfHubHTTPError as error:
        raise UserError(_refusal(error, what)) from None
    except (HTTPError, OfflineModeIsEnabled) as error:
        raise UserError(f"{api.endpoint} can't be reached ({_first_line(error)}): nothing was published") from None
    except (OSError, RuntimeError) as error:  # of one file's upload
        reason = " ".join(_first_line(part) for part in (error, error.__cause__) if part)
        raise UserError(f"the upload to {what} broke off ({reason}): run the same command again") from None
    except ValueError as error:
        if "metadata in README" not in str(error):
            raise
        raise UserError(f"the hub does not take the card's metadata: {' '.join(str(error).split())}") from None


def _refusal(error: HfHubHTTPError, what: str) -> str:
    status = error.response.status_code
    if status == 401:
        return "the hub does not know your token: run 'hf auth login', or set HF_TOKEN to a valid one"
    if status == 403:
        return f"the hub does not let you write to {what}: take a --repo_id of your own, and a token that may write"
    reason = error.server_message or error.response.reason_phrase
    return f"the hub answers {status} for {what} ({' '.join(reason.split())}): try again later, or another --repo_id"


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def files_to_send(folder: Path, repo_id: str, task_name: str | None, license: str | None) -> list[SentFile]:
    """Exactly what is published: weights, configuration, tokenizer, records and card; no machine's paths in any of it.

    Raises:
        UserError: the folder has no such model, or it is not whole.
    """
    model = _model_folder(folder, task_name)
    record = read_record(model)
    weights = sorted(model.glob("*.safetensors")) + sorted(model.glob("*.safetensors.index.json"))
    if not weights or not (model / _CONFIG_FILE).is_file():
        raise UserError(f"{model} has no {_CONFIG_FILE} or no weights (model.safetensors): make the model again")
    results = _json(folder / RESULTS_FILE)
    config = read_json(model / _CONFIG_FILE, "the model's configuration")
    subject = Subject(
        repo_id=repo_id,
        record=record,
        labels=tuple(config["id2label"].values()),
        num_bytes=sum(path.stat().st_size for path in weights),
        license=license,
        removed_heads=read_pruned_heads(model) or None,
        is_quantized="quantization_config" in config,
        results=results if results and "task_facts" in results else None,
        pretraining=_json(model / PRETRAINING_FILE),
    )
    files = [*weights, *(path for name in _AS_THEY_ARE if (path := model / name).is_file())]
    return [
        *(SentFile(path.name, path) for path in files),
        *(SentFile(name, _without(keys, model / name)) for name, keys in _OF_HERE.items() if (model / name).is_file()),
        SentFile(RECORD_FILE, _public_record(record)),
        *_public_report(folder, results),
        SentFile(CARD_FILE, model_card(subject).encode()),
    ]


def _without(keys: Sequence[str], path: Path) -> bytes:
    """A JSON file without these keys, wherever they are in it."""

    def without(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: without(part) for key, part in value.items() if key not in keys}
        return [without(part) for part in value] if isinstance(value, list) else value

    return _encoded(without(_json(path)))


def _json(path: Path) -> Any:
    return read_json(path, "a record of the run") if path.is_file() else None


def _model_folder(folder: Path, task_name: str | None) -> Path:
    """The folder itself, or that of the run's model for the task."""
    if (folder / RECORD_FILE).is_file():
        of_task = read_record(folder).task_name
        if task_name not in (None, of_task):
            raise UserError(f"the model in {folder} is tuned for {of_task}, not for {task_name}")
        return folder
    results = _json(folder / RESULTS_FILE)
    if not results or "tasks" not in results:
        raise UserError(
            f"{folder} has no {RECORD_FILE}: publish takes the output of 'python -m finetune train', of a grid, or a"
            " model that these have tuned"
        )
    tasks = list(results["tasks"])
    if task_name is None and len(tasks) != 1:
        raise UserError(f"{folder} has models of {' '.join(tasks) or 'no task'}: name one with --task_name")
    if task_name is not None and task_name not in tasks:
        raise UserError(f"{folder} has no model for --task_name {task_name}; it has: {' '.join(tasks)}")
    name = task_name or tasks[0]
    model = kept_folder(folder, median_cell_of(name, results["tasks"][name]))
    if not model.is_dir():
        raise UserError(f"{model} does not exist: the grid has not kept its models (keep_models: false)")
    return model


def _public_record(record: ModelRecord) -> bytes:
    """Without places on this machine: the base model by its name, a user's own files by theirs."""
    own_task = record.own_task and {
        **record.own_task,
        **{name: Path(place).name for name in _PLACES if (place := record.own_task.get(name))},
    }
    return _encoded({**asdict(record), "base_model_path": record.base_model, "own_task": own_task})


_PLACES: Final = ("train", "dev", "dataset")


def _public_report(folder: Path, results: Any) -> list[SentFile]:
    """Results and report, where the folder has them, without this machine's name, its processes and its paths.

    Causes of failures may hold paths; each is replaced by its last part.
    """
    if results is None:
        return []
    for trial in results.get("trials", ()):
        trial.pop("worker", None)
    paths: set[str] = set()
    files = [SentFile(RESULTS_FILE, _encoded(_without_paths(results, paths)))]
    if (folder / HTML_FILE).is_file():
        page = (folder / HTML_FILE).read_text(encoding="utf-8")
        for path in sorted(paths, key=len, reverse=True):
            page = page.replace(html.escape(path), html.escape(Path(path).name))
        files.append(SentFile(HTML_FILE, page.encode()))
    return files


def _without_paths(value: Any, found: set[str]) -> Any:
    """A JSON value with each absolute path in its texts cut to its last part; what they were is added to ``found``."""
    if isinstance(value, dict):
        return {key: _without_paths(part, found) for key, part in value.items()}
    if isinstance(value, list):
        return [_without_paths(part, found) for part in value]
    if isinstance(value, str):
        found.update(_PATH.findall(value))
        return _PATH.sub(lambda match: Path(match[0]).name, value)
    return value


def _encoded(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
