"""An Optuna storage that processes and machines share: opened or refused in one line, a lock, signs of life.

Optuna's SQLite storage cannot compare and set, so whoever looks for trials to add or to take does so under a lock.
"""

import contextlib
import logging
import os
import re
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import optuna
import sqlalchemy
from optuna.trial import FrozenTrial, TrialState

from common.errors import UserError
from common.folders import file_lock

HEARTBEAT_SECONDS: Final = 15
STALE_SECONDS: Final = 60
_BUSY_SECONDS: Final = 60  # SQLite gives up on a busy file after 5 by itself; a machine under load needs more
_POSTGRESQL_LOCK: Final = 0x24B1  # any number that is ours

optuna.logging.set_verbosity(logging.WARNING)
warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)  # heartbeats are called so


class SharedStorage:
    """A storage of trials which any number of processes and machines use at a time.

    Args:
        url: in SQLAlchemy's form: ``sqlite:///FILE``, or ``postgresql://...`` for several machines.
        give_back: called under the lock with a running trial that has shown no sign of life for too long, once it has
            been set to FAIL; it may let the same work wait again.
        heartbeat_seconds: between two signs of life of a running trial.
        stale_seconds: after so long without one, the trial counts as interrupted.

    Raises:
        UserError: the storage can't be opened, or is of another kind.
    """

    def __init__(
        self,
        url: str,
        give_back: Callable[[optuna.Study, FrozenTrial], None],
        heartbeat_seconds: int = HEARTBEAT_SECONDS,
        stale_seconds: int = STALE_SECONDS,
    ) -> None:
        self._heartbeat_seconds = heartbeat_seconds
        try:
            parsed = sqlalchemy.make_url(url)
            self._dialect = parsed.get_backend_name()
            if self._dialect not in ("sqlite", "postgresql") or parsed.database in (None, "", ":memory:"):
                raise ValueError("it must be sqlite:///FILE, or postgresql://... for several machines")
            self._lock_file = Path(f"{parsed.database}.lock")
            if self._dialect == "sqlite" and not self._lock_file.parent.is_dir():
                raise ValueError(f"there is no folder {self._lock_file.parent}")
            self._lock_engine = sqlalchemy.create_engine(url)
            # Two that make the tables at once get in each other's way; what can't be written can still be looked at.
            may_write = os.access(self._lock_file.parent, os.W_OK)
            with self.exclusive() if may_write else contextlib.nullcontext():
                self.trials = optuna.storages.RDBStorage(
                    url,
                    engine_kwargs={"connect_args": {"timeout": _BUSY_SECONDS} if self._dialect == "sqlite" else {}},
                    heartbeat_interval=heartbeat_seconds,
                    grace_period=stale_seconds,
                    heartbeat_stale_trial_callback=give_back,
                )
        except ImportError:
            raise UserError(f"the storage {url} needs a driver: pip install 'psycopg[binary]'") from None
        except Exception as error:  # whatever SQLAlchemy, the driver or Optuna's schema check raise
            raise UserError(f"the storage {url} cannot be opened: {_reason(error)}") from error

    @property
    def serves_machines(self) -> bool:
        """Whether it may have users on other machines; SQLite is for one."""
        return self._dialect != "sqlite"

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        """Be the only process, on any machine, that looks for trials to add or to take."""
        if self._dialect == "sqlite":
            with file_lock(self._lock_file):
                yield
            return
        with self._lock_engine.connect() as connection, connection.begin():
            connection.execute(sqlalchemy.text(f"SELECT pg_advisory_xact_lock({_POSTGRESQL_LOCK})"))
            yield

    def take(self, trial_id: int, **attributes: Any) -> None:
        """Set a waiting trial running; under the lock."""
        for name, attribute in attributes.items():
            self.trials.set_trial_user_attr(trial_id, name, attribute)
        self.trials.record_heartbeat(trial_id)  # first: what runs without one would never count as stale
        self.trials.set_trial_state_values(trial_id, TrialState.RUNNING)

    @contextlib.contextmanager
    def heartbeat(self, trial_id: int) -> Iterator[None]:
        """Show signs of life of a trial meanwhile."""
        ended = threading.Event()

        def beat() -> None:
            while not ended.wait(self._heartbeat_seconds):
                with contextlib.suppress(optuna.exceptions.StorageInternalError):  # the database may be back next time
                    self.trials.record_heartbeat(trial_id)
            self.trials.remove_session()

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def give_back_stale(self, study: optuna.Study) -> None:
        """Call ``give_back`` for the running trials that have shown no sign of life for too long; under the lock."""
        optuna.storages.fail_stale_trials(study)

    def end(self, trial_id: int, state: TrialState, value: float | None, attributes: Mapping[str, Any]) -> bool:
        """Set a trial to a state with its attributes; False if it had ended before, as one does that was given back."""
        try:
            for name, attribute in attributes.items():
                self.trials.set_trial_user_attr(trial_id, name, attribute)
            return self.trials.set_trial_state_values(trial_id, state, None if value is None else [value])
        except optuna.exceptions.UpdateFinishedTrialError:
            return False


def sqlite_file(url: str) -> Path | None:
    """The file of an SQLite storage; None of another one.

    Raises:
        UserError: the URL is none.
    """
    try:
        parsed = sqlalchemy.make_url(url)
    except sqlalchemy.exc.ArgumentError as error:
        raise UserError(f"storage {url} is no URL of a storage: {error}") from None
    return Path(parsed.database or "") if parsed.get_backend_name() == "sqlite" else None


@contextlib.contextmanager
def errors_of_storage(url: str) -> Iterator[None]:
    """Tell in one line why a storage does not answer any more: locked, full, gone."""
    try:
        yield
    except (optuna.exceptions.StorageInternalError, sqlalchemy.exc.SQLAlchemyError) as error:
        raise UserError(
            f"the storage {url} does not take what has to be recorded ({_reason(error.__cause__ or error)}):"
            " mend that and run the same command again, which goes on from here"
        ) from None


def refuse_password(url: str | None) -> None:
    """Refuse a URL that holds a password, which configurations, logs and error messages would repeat.

    Raises:
        ValueError: it holds one.
    """
    if url and re.search(r"://[^/@]*:[^/@]*@|[?&]password=", url):
        raise ValueError(
            "storage holds a password, which would be written into the output folder: leave it out of the URL and "
            "give it to the database's driver (~/.pgpass or PGPASSWORD, for PostgreSQL)"
        )


def _reason(error: BaseException) -> str:
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__
