#!/usr/bin/env bash
# Makes a virtual environment unless it is there and complete: bootstrap.sh FOLDER "VERSIONS" PIP_ARGUMENT…
# Complete means that its stamp, written last, names the files it was made from; anything else is made anew.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=$1 versions=$2
shift 2

hash_of() { (sha256sum 2>/dev/null || shasum -a 256) | cut -d' ' -f1; }
stamp=$({ echo "$PWD $venv $versions $*"; cat pyproject.toml constraints.txt scripts/hf-requirements.txt; } | hash_of)

if [ "$(cat "$venv/.complete" 2>/dev/null)" = "$stamp" ] && "$venv/bin/python" -c '' 2>/dev/null; then
  exit 0
fi

# shellcheck disable=SC2086  # one argument a version
python=$(scripts/find_python.sh $versions)
echo "Making $venv with $python; installing takes a minute or two …" >&2
rm -rf "$venv"
"$python" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check "$@"
echo "$stamp" >"$venv/.complete"
