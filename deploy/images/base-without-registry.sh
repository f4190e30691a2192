#!/bin/sh
# Makes a base image out of Debian packages, for build.sh where no registry can be reached: Debian 12 with its Python 3.11.
#
#   deploy/images/base-without-registry.sh [NAME]      NAME: localhost/behest-base:bookworm
#
# Needs root, debootstrap and buildah. MIRROR names another mirror, BUILDAH another buildah or its options.
set -eu
name=${1:-localhost/behest-base:bookworm}
buildah=${BUILDAH:-buildah}
for needed in debootstrap "${buildah%% *}"; do
  command -v "$needed" >/dev/null || { echo "$0: $needed is missing (apt install debootstrap buildah)" >&2; exit 2; }
done
[ "$(id -u)" = 0 ] || { echo "$0: debootstrap needs root" >&2; exit 2; }
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
debootstrap --variant=minbase --include=ca-certificates,python3,python3-venv bookworm "$folder/system" \
  "${MIRROR:-http://deb.debian.org/debian}" >"$folder/log" 2>&1 || { tail -20 "$folder/log" >&2; exit 1; }
rm -rf "$folder"/system/var/cache/apt/* "$folder"/system/var/lib/apt/lists/* "$folder"/system/var/log/*
container=$($buildah from scratch)
$buildah add --quiet "$container" "$folder/system" / >/dev/null
$buildah config --env PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin "$container"
$buildah commit --quiet --rm "$container" "$name" >/dev/null
echo "$name"
