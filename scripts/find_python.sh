#!/usr/bin/env bash
# Prints the path of a Python that can make the environment: `find_python.sh 3.12 3.13 3.14` in order of preference.
# Looks at JAXDECODE_PYTHON, PATH, pyenv's versions and uv's, in this order; says what to install if there is none.
set -uo pipefail

wanted=("$@")
broken=""

# A pyenv shim of a version that is not active exists but fails; Debian's python3 may come without venv.
suits() {
  local version
  version=$("$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || return 1
  case " ${wanted[*]} " in *" $version "*) ;; *) return 1 ;; esac
  if ! "$1" -c 'import venv, ensurepip' 2>/dev/null; then
    broken="$1 is Python $version, but without venv (Debian, Ubuntu: sudo apt install python$version-venv)."
    return 1
  fi
}

answer() {
  "$1" -c 'import sys; print(sys.executable)'
  exit 0
}

if [ -n "${JAXDECODE_PYTHON:-}" ]; then
  suits "$JAXDECODE_PYTHON" && answer "$JAXDECODE_PYTHON"
  echo "JAXDECODE_PYTHON=$JAXDECODE_PYTHON is not a Python of version ${wanted[*]} with venv." >&2
  exit 1
fi

pyenv_root=${PYENV_ROOT:-$(pyenv root 2>/dev/null || echo "$HOME/.pyenv")}
for version in "${wanted[@]}"; do
  suits "python$version" && answer "python$version"
  for python in "$pyenv_root"/versions/"$version"*/bin/python; do
    suits "$python" && answer "$python"
  done
  if command -v uv >/dev/null 2>&1; then
    python=$(uv python find --no-python-downloads "$version" 2>/dev/null) && suits "$python" && answer "$python"
  fi
done
for python in python3 python; do
  suits "$python" && answer "$python"
done

cat >&2 <<END
No suitable Python: jaxdecode needs one of version ${wanted[*]}; \`python3\` here is $(python3 --version 2>&1 || echo missing).
${broken:+$broken
}Install one, then run make again:
  Debian, Ubuntu   sudo apt install python3.12 python3.12-venv
  macOS            brew install python@3.12
  pyenv            pyenv install 3.12
  uv               uv python install 3.12
If it lies somewhere unusual: make JAXDECODE_PYTHON=/path/to/python3.12 …
END
exit 1
