"""Check an activation dataset: `python -m raptor_hf.activations verify FOLDER`."""

import argparse
import sys

from .format import read_manifest, verify_activations


def main(argv: list[str] | None = None) -> None:
    """Print the problems of a dataset and exit with 1 if there are any."""
    parser = argparse.ArgumentParser(prog="python -m raptor_hf.activations")
    commands = parser.add_subparsers(dest="command", required=True)
    verify = commands.add_parser("verify", help="compare sizes and checksums with the manifest")
    verify.add_argument("path", help="folder of the activation dataset")
    path = parser.parse_args(argv).path
    manifest, problems = read_manifest(path), verify_activations(path)
    if problems:
        sys.exit("\n".join(problems.values()))
    print(
        f"{path} is complete: {manifest['num_images']:,} images × {manifest['views']} views, "
        f"layers {manifest['layers']}, {len(manifest['shards'])} shards, "
        f"of {manifest['teacher']['name']}"
    )


if __name__ == "__main__":
    main()
