#!/bin/sh
# Builds the image with docker, podman or buildah, whichever is there. Times in it are those of the commit.
#
#
#   deploy/images/build.sh IMAGE [options of the build, such as --build-arg BASE=python:3.13-slim@sha256:...]
#
# BUILDER names one of the three and its options, such as BUILDER="buildah --storage-driver vfs".
set -eu
[ $# -gt 0 ] || { sed -n '2,7s/^# \{0,1\}//p' "$0"; exit 2; }
image=$1
shift
cd "$(dirname "$0")/../.."
version=$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
revision=$(git rev-parse HEAD 2>/dev/null || echo unknown)
: "${SOURCE_DATE_EPOCH:=$(git log -1 --format=%ct 2>/dev/null || echo 0)}"
export SOURCE_DATE_EPOCH
if [ -z "${BUILDER:-}" ]; then
  for name in docker podman buildah; do
    # A client of docker without its server builds nothing.
    if command -v "$name" >/dev/null && "$name" info >/dev/null 2>&1; then BUILDER=$name; break; fi
  done
fi
case ${BUILDER:-} in
  docker*) set -- build --tag "$image" "$@" ;;
  podman*|buildah*) set -- build --format oci --timestamp "$SOURCE_DATE_EPOCH" --tag "$image" "$@" ;;
  *) echo "$0: none of docker, podman and buildah works here (apt install buildah)" >&2; exit 2 ;;
esac
exec $BUILDER "$@" --file deploy/images/Dockerfile --build-arg "VERSION=$version" --build-arg "REVISION=$revision" \
  --build-arg "SOURCE_DATE_EPOCH=$SOURCE_DATE_EPOCH" .
