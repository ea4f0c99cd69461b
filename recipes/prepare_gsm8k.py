#!/usr/bin/env python3
"""gsm8k in verl's format, without a network: from its jsonl files or from the data set's parquet files.

    python recipes/prepare_gsm8k.py FOLDER [--out ~/data/gsm8k]

FOLDER has `train.jsonl` and `test.jsonl` (as in OpenAI's repository), or the parquet files of a copy of the hub's
`openai/gsm8k` (`main/train-*.parquet`, `main/test-*.parquet`).  Needs pyarrow, which verl brings along.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

INSTRUCTION = 'Reason step by step, and give the final answer after "####".'


def read(folder: Path, split: str) -> list[dict[str, str]]:
    """Questions and answers of a split.

    Raises:
        FileNotFoundError: the folder has none.
        ValueError: a record is none of gsm8k's.
    """
    import pyarrow.parquet as parquet

    lines = folder / f"{split}.jsonl"
    if lines.is_file():
        found = []
        for number, line in enumerate(lines.read_text(encoding="utf-8").splitlines(), 1):
            if line.strip():
                try:
                    found.append(_checked(json.loads(line), f"{lines} line {number}"))
                except json.JSONDecodeError as error:
                    raise ValueError(f"{lines} line {number} is no JSON: {error}") from None
        return found
    files = sorted([*folder.glob(f"{split}-*.parquet"), *folder.glob(f"main/{split}-*.parquet")])
    if not files:
        raise FileNotFoundError(f"{folder} has neither {split}.jsonl nor main/{split}-*.parquet: download gsm8k there")
    return [
        _checked(row, f"{file} row {number}")
        for file in files
        for number, row in enumerate(parquet.read_table(file).to_pylist(), 1)
    ]


def _checked(example: Any, where: str) -> dict[str, str]:
    for name in ("question", "answer"):
        if not isinstance(example, dict) or not isinstance(example.get(name), str):
            raise ValueError(f"{where} has no text {name!r}, which each record of gsm8k has: is it that data set?")
    return example


def row_of(example: dict[str, str], split: str, index: int) -> dict[str, Any]:
    """A row as verl reads it; its own reward for `openai/gsm8k` compares what stands after ####."""
    solution = example["answer"].rpartition("####")[2].strip().replace(",", "")
    return {
        "data_source": "openai/gsm8k",
        "prompt": [{"role": "user", "content": f"{example['question']} {INSTRUCTION}"}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": solution},
        "extra_info": {"split": split, "index": index, "question": example["question"], "answer": example["answer"]},
    }


def main(arguments: list[str] | None = None) -> int:
    """Write `train.parquet` and `test.parquet`; 2 and one sentence where that cannot be."""
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    parser = argparse.ArgumentParser(description="gsm8k in verl's format, without a network")
    parser.add_argument("folder", type=Path, help="has train.jsonl and test.jsonl, or the hub's parquet files")
    parser.add_argument("--out", type=Path, default=Path("~/data/gsm8k"), help="(default: %(default)s)")
    asked = parser.parse_args(arguments)
    out = asked.out.expanduser()
    try:
        examples = {split: read(asked.folder, split) for split in ("train", "test")}
        out.mkdir(parents=True, exist_ok=True)
        for split, found in examples.items():
            rows = [row_of(example, split, index) for index, example in enumerate(found)]
            parquet.write_table(arrow.Table.from_pylist(rows), out / f"{split}.parquet")
            print(f"{out / split}.parquet: {len(rows)} questions")
    except (OSError, ValueError) as error:  # pyarrow's are of the second
        print(f"prepare_gsm8k.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
