"""Look into a data folder: what is in it, as a person reads it, and whether every byte is as it was written."""

from pathlib import Path

import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from common.errors import UserError
from common.folders import sha256_of_file
from data_prep.shards import Manifest, Rows, SplitReader, read_manifest


def summary(manifest: Manifest) -> str:
    """The manifest in a few lines."""
    content = manifest.content
    rows = {split: sum(shard.rows for shard in manifest.of_split(split)) for split in ("train", "validation")}
    return "\n".join(
        [
            f"data folder          {manifest.folder}",
            f"documents            {content['num_documents']:,}",
            f"sequences            {content['num_sequences']:,}"
            f" ({content['num_validation_sequences']:,} held out for validation)",
            f"tokens               {content['num_tokens']:,}",
            f"padding              {content['padding_share']:.1%} of {manifest.max_seq_length} positions a row",
            f"vocabulary           {manifest.vocab_size:,} tokens",
            f"rows to train on     {rows['train']:,} ({content['dupe_factor']} masked copies)",
            f"rows to validate on  {rows['validation']:,}",
            f"shards               {len(manifest.shards)}",
        ]
    )


def show_rows(manifest: Manifest, num_rows: int) -> str:
    """The first ``num_rows`` training rows as text: every predicted token as ``[what the model sees=>original]``."""
    tokenizer = AutoTokenizer.from_pretrained(manifest.tokenizer_folder)
    reader = SplitReader(manifest, "train")
    rows = reader.read_range(0, min(num_rows, reader.num_rows))
    reader.close()
    return "\n\n".join(_show_row(rows, index, tokenizer) for index in range(len(rows)))


def _show_row(rows: Rows, index: int, tokenizer: PreTrainedTokenizerFast) -> str:
    seen = tokenizer.convert_ids_to_tokens(rows.input_ids[index, : rows.sequence_length[index]].tolist())
    for position, original in zip(rows.masked_lm_positions[index], rows.masked_lm_ids[index], strict=True):
        if position:
            seen[position] = f"[{seen[position].strip('[]')}=>{tokenizer.convert_ids_to_tokens(int(original))}]"
    num_predictions = np.count_nonzero(rows.masked_lm_positions[index])
    text = " ".join(seen).replace(" ##", "")
    return f"row {index}: {rows.sequence_length[index]} tokens, {num_predictions} predictions\n{text}"


def verify(manifest: Manifest) -> None:
    """Read every byte of every shard.

    Raises:
        UserError: shards that are missing or differ from what was written; all of them are named.
    """
    wrong = []
    for shard in manifest.shards:
        path = manifest.folder / shard.file
        if not path.is_file():
            wrong.append(f"{shard.file} is missing")
        elif sha256_of_file(path) != shard.sha256:
            wrong.append(f"{shard.file} is damaged")
    if wrong:
        raise UserError(
            f"data folder {manifest.folder}: {'; '.join(wrong)}: "
            "delete the damaged ones and run `python -m data_prep build` again, which makes just what is missing"
        )
    for split in ("train", "validation"):
        SplitReader(manifest, split).close()


def inspect_folder(folder: Path, num_rows: int) -> str:
    """:func:`summary` and :func:`show_rows` of a folder."""
    if num_rows < 1:
        raise UserError(f"num_rows must be at least 1, not {num_rows}")
    manifest = read_manifest(folder)
    return f"{summary(manifest)}\n\n{show_rows(manifest, num_rows)}"
