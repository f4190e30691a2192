#!/bin/sh
# Writes the two lock files beside this script: what the image installs, and what its wheel is built with; every version
# pinned, every file hashed, for every Python and platform that the project supports. uv is only a tool of this script.
#
#   deploy/images/lock.sh             keep what is locked, add what is missing
#   deploy/images/lock.sh --upgrade   take the newest of everything
set -eu
cd "$(dirname "$0")/../.."
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python=.venv/bin/python
[ -x "$python" ] || python=python3
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check 'uv>=0.9,<1'

compile() {
  output=$1
  shift
  "$folder/venv/bin/uv" pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-annotate \
    --custom-compile-command deploy/images/lock.sh --output-file "deploy/images/$output" "$@"
}

compile requirements.txt --extra operator --extra otlp-grpc "$@" pyproject.toml
"$python" - > "$folder/build.in" <<'END'
import tomllib

print("\n".join(tomllib.load(open("pyproject.toml", "rb"))["build-system"]["requires"]))
END
compile build-requirements.txt "$@" "$folder/build.in"
