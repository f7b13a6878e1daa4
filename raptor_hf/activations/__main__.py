"""Check an activation dataset: `python -m raptor_hf.activations verify FOLDER`."""

import argparse
import sys

from .format import read_manifest, verify_activations


def main(argv: list[str] | None = None) -> None:
    """Print the problems of a dataset and exit with 1 if there are any."""
    parser = argparse.ArgumentParser(prog="python -m raptor_hf.activations", description=__doc__)
    parser.add_argument("command", choices=["verify"])
    parser.add_argument("path", help="folder of the activation dataset")
    path = parser.parse_args(argv).path
    problems = verify_activations(path)
    if problems:
        sys.exit("\n".join(problems.values()))
    manifest = read_manifest(path)
    print(
        f"{path} is complete: {manifest['num_images']:,} images × {manifest['views']} views, "
        f"layers {manifest['layers']}, of {manifest['teacher']['name']}"
    )


if __name__ == "__main__":
    main()
