"""A search from start to report: one coordinator on each machine launches runs, watches them and judges them.

All that is known lies in the storage and in the runs' folders. A coordinator that is killed takes its runs with it, which
save and leave; the same command goes on.
"""

import contextlib
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from common.errors import UserError
from common.folders import check_folder, claim_folder, errors_of_writing, file_lock, only_writer, write_json
from common.storage import HEARTBEAT_SECONDS, errors_of_storage, sqlite_file
from data_prep.shards import Manifest, read_manifest
from pretrain.architecture import resolve
from pretrain.batch_plan import check_divisible
from pretrain.budget import parse_duration
from pretrain.checkpoint import latest_checkpoint, read_state
from pretrain.config import PretrainConfig
from pretrain.ds_config import has_half_precision_weights, load_ds_config, zero_stage
from pretrain.fingerprint import search_fingerprint
from pretrain.init_from import resolve_from
from pretrain.interruptions import Interruptions
from pretrain.launch import Launch, Outcome, RunFolder, cause_of, read_outcome
from pretrain.optimizer import check_optimizer
from pretrain.places import Place, find_places, hardware_of
from pretrain.run_record import lost_seconds, read_metrics
from pretrain.sampling import is_pruned, propose
from pretrain.search_config import SearchConfig, describe
from pretrain.search_runs import SearchRun
from pretrain.study import SearchStore
from pretrain.summary import GOES_ON, read_summary

STORAGE_FILE: Final = "trials.db"
RUNS_FOLDER: Final = "runs"
_MAY_CHANGE: Final = ("space", "num_runs", "keep_dropped_checkpoints")
_MAX_KILLS: Final = 10  # in a row without coming further: a person kills at random, a system short of memory for ever
_MAX_ERRORS: Final = 2
_MAX_FAILURES: Final = 3  # of different runs in a row: then it is no fault of theirs
_POLL_SECONDS: Final = 0.2
_LOOK_SECONDS: Final = 3.0
_LINE_SECONDS: Final = 60.0
_ORPHANS_SECONDS: Final = 300.0
