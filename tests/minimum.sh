#!/bin/sh
# Tests of the packages, parity and formats with the lowest versions that pyproject.toml allows, in an environment that is removed afterwards.
#   tests/minimum.sh [PYTHON] [TESTS ...]
set -eu
python=${1:-python3.11}
[ $# -gt 0 ] && shift
cd "$(dirname "$0")/.."
env=$(mktemp -d)
trap 'rm -rf "$env"' EXIT INT TERM
"$python" -m venv "$env"
"$env/bin/python" -m pip install --quiet --disable-pip-version-check --no-cache-dir -c constraints-minimum.txt \
    '.[clip,datasets,detection,export,medical,track]' 'pytest>=8' hypothesis scikit-image rasterio
[ $# -gt 0 ] || set -- tests/test_*.py tests/data tests/models tests/tokenizers tests/training tests/evaluation tests/reports tests/studies tests/parity tests/formats
# The tests are of this tree; what was installed gives the version.
PYTHONPATH=src "$env/bin/python" -m pytest -q "$@"
