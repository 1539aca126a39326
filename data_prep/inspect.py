"""Look into a data folder: what is in it, as a person reads it, and whether every byte is as it was written."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from common.errors import UserError
from common.folders import is_undamaged
from data_prep.shards import TOKENIZER_FOLDER, Manifest, Rows, SplitReader, read_manifest, shard_files
from data_prep.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def summary(manifest: Manifest) -> str:
    """The manifest in a few lines."""
    content = manifest.content
    rows = {split: sum(shard.rows for shard in manifest.of_split(split)) for split in ("train", "validation")}
    size = sum((manifest.folder / shard.file).stat().st_size for shard in manifest.shards)
    lines = {
        "data folder": str(manifest.folder),
        "documents": f"{content['num_documents']:,}" if content["num_documents"] else "not known of indexed shards",
        **{f"  {name.replace('_', ' ')}": f"{number:,}" for name, number in content.get("cleaning", {}).items()},
        "sequences": f"{content['num_sequences']:,} ({content['num_validation_sequences']:,} held out for validation)",
        "tokens": f"{content['num_tokens']:,}",
        "padding": f"{content['padding_share']:.1%} of {manifest.max_seq_length} positions a row",
        "vocabulary": f"{manifest.vocab_size:,} tokens",
        "rows to train on": f"{rows['train']:,} ({content['dupe_factor']} masked copies)",
        "rows to validate on": f"{rows['validation']:,}",
        "shards": f"{len(manifest.shards)} files, {size / 1e6:,.0f} MB",
    }
    width = max(map(len, lines)) + 2
    return "\n".join(f"{name:<{width}}{value}" for name, value in lines.items())


def show_rows(manifest: Manifest, num_rows: int) -> str:
    """The first ``num_rows`` training rows as text: every predicted token as ``[what the model sees=>original]``."""
    tokenizer = load_tokenizer(str(manifest.tokenizer_folder))
    reader = SplitReader(manifest, "train")
    rows = reader.read_range(0, min(num_rows, reader.num_rows))
    reader.close()
    return "\n\n".join(_show_row(rows, index, tokenizer) for index in range(len(rows)))


def _show_row(rows: Rows, index: int, tokenizer: "PreTrainedTokenizerFast") -> str:
    shown = tokenizer.convert_ids_to_tokens(rows.input_ids[index, : rows.sequence_length[index]].tolist())
    predictions = np.flatnonzero(rows.masked_lm_positions[index])
    for slot in predictions:
        position = rows.masked_lm_positions[index, slot]
        original = tokenizer.convert_ids_to_tokens(int(rows.masked_lm_ids[index, slot]))
        seen = shown[position].removeprefix("##").strip("[]")
        glue = "##" if original.startswith("##") else ""  # a word's later parts follow without a space
        shown[position] = f"{glue}[{seen}=>{original.removeprefix('##')}]"
    text = " ".join(shown).replace(" ##", "")
    return f"row {index}: {rows.sequence_length[index]} tokens, {len(predictions)} predictions\n{text}"


def verify(manifest: Manifest) -> None:
    """Read every byte of every shard and of the tokenizer.

    Raises:
        UserError: files that are missing, differ from what was written, or don't belong here; all of them are named.
    """
    digests = {shard.file: shard.sha256 for shard in manifest.shards}
    foreign = [
        f"{name} is not of this data set, move it away" for name in shard_files(manifest.folder) - digests.keys()
    ]
    for name, digest in manifest.content.get("tokenizer_files", {}).items():
        digests[f"{TOKENIZER_FOLDER}/{name}"] = digest
    wrong = [
        f"{name} is {'damaged' if (manifest.folder / name).exists() else 'missing'}"
        for name, digest in digests.items()
        if not is_undamaged(manifest.folder / name, digest)
    ]
    if foreign or wrong:
        found = "; ".join([*(f"{name} is not of this data set, move it away" for name in sorted(foreign)), *wrong])
        raise UserError(f"data folder {manifest.folder}: {found}" + (f": {manifest.remedy}" if wrong else ""))
    for split in ("train", "validation"):
        SplitReader(manifest, split).close()


def inspect_folder(folder: Path, num_rows: int) -> str:
    """:func:`summary` and :func:`show_rows` of a folder."""
    if num_rows < 1:
        raise UserError(f"num_rows must be at least 1, not {num_rows}")
    manifest = read_manifest(folder)
    return f"{summary(manifest)}\n\n{show_rows(manifest, num_rows)}"
