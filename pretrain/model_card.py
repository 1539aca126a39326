"""The README.md of an exported model: what it is and how it was made, from the run's record alone.

What the record does not tell is left out, never guessed: so are licence and language, which no run knows.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml

from common.folders import provenance
from common.page import markdown_table
from data_prep.shards import Manifest
from pretrain.architecture import Architecture
from pretrain.config import PretrainConfig

CARD_FILE = "README.md"
_LAYER_NORMS = {"pre_ln": "before each sublayer (pre-LN)", "post_ln": "after each residual (post-LN), as in BERT"}
_UNUSED_SETTINGS = {"muon": ("name",), "adafactor": ("name", "muon_", "adam_")}
_OF_MANIFEST = (
    "num_documents num_sequences num_validation_sequences num_tokens max_seq_length dupe_factor "
    "max_predictions_per_seq tokenizer_sha256"
).split()
_OF_DATA_CONFIG = "masked_lm_prob whole_word_masking deduplicate".split()


def data_facts(manifest: Manifest) -> dict[str, Any]:
    """What the card tells of the data, without names of files or folders."""
    config = manifest.content.get("config", {})
    facts = {
        "manifest_sha256": manifest.sha256,
        "sources": sorted({source["kind"] for source in config.get("sources", [])}) or None,
        **{name: manifest.content.get(name) for name in _OF_MANIFEST},
        **{name: config.get(name) for name in _OF_DATA_CONFIG},
    }
    facts["num_documents"] = facts["num_documents"] or None  # indexed shards don't tell
    return {name: value for name, value in facts.items() if value is not None}


def run_facts(config: PretrainConfig, dtype: torch.dtype, manifest: Manifest) -> dict[str, Any]:
    """What stays the same through a run, for its record; ``dtype`` is that of matrix products."""
    return {
        "training": _training_facts(config, dtype),
        "data": data_facts(manifest),
        "software": software_facts(),
    }


def _training_facts(config: PretrainConfig, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "init_from": config.init_from and "/".join(Path(config.init_from).parts[-2:]),
        "optimizer": asdict(config.optimizer),
        "schedule": config.schedule,
        "schedule_length": config.schedule_length,
        "warmup_proportion": config.warmup_proportion,
        "gradient_clipping": config.gradient_clipping,
        "dropout": config.model.hidden_dropout_prob,
        "precision": str(dtype).removeprefix("torch."),
        "seed": config.seed,
    }


def software_facts() -> dict[str, Any]:
    """Commit and versions that this process runs."""
    facts = provenance()
    return {name: facts[name] for name in ("commit", "python", "versions")}


def model_card(record: Mapping[str, Any], architecture: Architecture, num_parameters: int, mask_token: str) -> str:
    """The card as Markdown, with the front matter that the Hugging Face hub reads.

    Args:
        record: of the run, as every checkpoint has it.
        architecture: of the model.
        num_parameters: of the model as exported.
        mask_token: of its tokenizer.
    """
    metadata = {
        "library_name": "transformers",
        "pipeline_tag": "fill-mask",
        "mask_token": mask_token,
        "tags": ["bert", "masked-language-modeling"],
    }
    parts = [
        f"---\n{yaml.safe_dump(metadata, sort_keys=False)}---",
        f"# BERT-style encoder, {num_parameters / 1e6:,.1f} million parameters",
        _introduction(record),
        "## Use",
        _use(mask_token),
        "## Architecture",
        _table(_architecture_rows(architecture)),
        "## Training",
        _table(_training_rows(record)),
        *_loss_section(record),
        *_section("Data", _data_rows(record.get("data", {}))),
        *_section("Software", _software_rows(record.get("software", {}))),
    ]
    return "\n\n".join(parts) + "\n"


def _introduction(record: Mapping[str, Any]) -> str:
    training = record.get("training", {})
    start = ""
    if "init_from" in training:
        start = f"further from `{training['init_from']}` " if training["init_from"] else "from random weights "
    sentences = [
        f"Pretrained {start}by masked language modelling, with token type 0 alone and without a next-sentence task."
    ]
    if "stopped_by" not in record:
        sentences.append("Taken from a run before its end.")
    if record.get("time_budget_seconds"):
        sentences.append(
            "It had a fixed budget of time, which its learning rate followed, as in "
            "[How to Train BERT with an Academic Budget](https://aclanthology.org/2021.emnlp-main.831) "
            "(Izsak, Berchansky and Levy, 2021)."
        )
    return " ".join(sentences)


def _use(mask_token: str) -> str:
    return (
        "```python\n"
        "from transformers import pipeline\n\n"
        'fill_mask = pipeline("fill-mask", model="path or name of this model")\n'
        f"fill_mask({json.dumps(f'A text with one {mask_token} in it.')})\n"
        "```\n\n"
        "`AutoModelForSequenceClassification` and its relatives load it for fine-tuning; their heads start untrained."
    )


def _architecture_rows(architecture: Architecture) -> dict[str, Any]:
    return {
        "layers": architecture.num_hidden_layers,
        "hidden size": architecture.hidden_size,
        "attention heads": architecture.num_attention_heads,
        "feed-forward size": architecture.intermediate_size,
        "LayerNorm": _LAYER_NORMS[architecture.layer_norm],
        "vocabulary": architecture.vocab_size,
        "longest sequence": f"{architecture.max_position_embeddings:,} tokens",
    }


def _training_rows(record: Mapping[str, Any]) -> dict[str, Any]:
    training = record.get("training", {})
    return {
        "time budget": _duration(record.get("time_budget_seconds")),
        "time used": _duration(record.get("elapsed_seconds")),
        "hardware": record.get("hardware"),
        "optimizer steps": record.get("steps"),
        "sequences": record.get("sequences"),
        "passes over the data": record.get("epochs"),
        "sequences a step": record.get("train_batch_size"),
        "optimizer": _settings(training.get("optimizer")),
        "learning rate's course": training.get("schedule"),
        "learning rate's schedule": training.get("schedule_length"),
        "learning rate's warmup": _percent(training.get("warmup_proportion")),
        "gradient clipping": training.get("gradient_clipping"),
        "dropout": training.get("dropout"),
        "precision": training.get("precision"),
        "seed": training.get("seed"),
    }


def _loss_section(record: Mapping[str, Any]) -> list[str]:
    """The last losses, each with the step that it was measured at."""
    curves = {"training": record.get("train"), "validation": record.get("validation")}
    rows = [(name, f"{curve[-1]['loss']:.4f}", f"{curve[-1]['step']:,}") for name, curve in curves.items() if curve]
    if not rows:
        return []
    note = "Mean cross-entropy of the masked tokens, in nats."
    return ["## Loss", note, markdown_table(("", "loss", "at step"), rows)]


def _data_rows(data: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "sources": ", ".join(data.get("sources", ())) or None,
        "documents": data.get("num_documents"),
        "sequences": data.get("num_sequences"),
        "sequences held out": data.get("num_validation_sequences"),
        "tokens": data.get("num_tokens"),
        "tokens a sequence, at most": data.get("max_seq_length"),
        "masked copies of each sequence": data.get("dupe_factor"),
        "tokens to predict": _percent(data.get("masked_lm_prob")),
        "predictions a sequence, at most": data.get("max_predictions_per_seq"),
        "whole words are masked": data.get("whole_word_masking"),
        "duplicates are left out": data.get("deduplicate"),
        "SHA-256 of the manifest": data.get("manifest_sha256"),
        "SHA-256 of the tokenizer": data.get("tokenizer_sha256"),
    }


def _software_rows(software: Mapping[str, Any]) -> dict[str, Any]:
    return {"commit": software.get("commit"), "python": software.get("python"), **software.get("versions", {})}


def _section(heading: str, facts: Mapping[str, Any]) -> list[str]:
    return [f"## {heading}", _table(facts)] if any(value is not None for value in facts.values()) else []


def _table(facts: Mapping[str, Any]) -> str:
    return markdown_table(("", ""), [(name, _text(value)) for name, value in facts.items() if value is not None])


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int | float) else str(value)


def _settings(optimizer: Mapping[str, Any] | None) -> str | None:
    """Its name, and what it was set to as far as it uses that."""
    if not optimizer:
        return None
    name = optimizer.get("name", "")
    unused = _UNUSED_SETTINGS.get(name, ("name", "muon_"))
    return ", ".join([name, *(f"{key} {value}" for key, value in optimizer.items() if not key.startswith(unused))])


def _duration(seconds: float | None) -> str | None:
    if seconds is None:
        return None
    return f"{seconds:,.1f} s" + (f" ({seconds / 3600:.1f} h)" if seconds >= 3600 else "")


def _percent(share: float | list[float] | None) -> str | None:
    """``masked_lm_prob`` may be one for each copy."""
    if share is None:
        return None
    return ", ".join(f"{one:.3g} %" for one in (100 * part for part in (share if isinstance(share, list) else [share])))
