# Sourced by every script: makes .venv once, reuses it, and puts it on the PATH.
python=${PYTHON:-python3}
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
  echo "Python 3.10 or newer is needed; '$python' is $("$python" --version 2>&1). Set PYTHON to another one." >&2
  exit 1
fi
wanted=$(cat pyproject.toml constraints.txt | cksum)
if [ "$(cat .venv/installed 2>/dev/null)" != "$wanted" ]; then
  echo "Installing into .venv (a few minutes, once) …"
  "$python" -m venv .venv
  .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
  # apart, for the tests and the benchmark that ask for them: see pyproject.toml
  .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps \
    --target .venv/int8 torchao || echo "torchao can't be installed here: the test of int8 is left out."
  .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps \
    --target .venv/peft peft || echo "PEFT can't be installed here: the test of LoRA is left out."
  echo "$wanted" > .venv/installed
fi
PATH="$PWD/.venv/bin:$PATH"
