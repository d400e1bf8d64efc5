#!/usr/bin/env bash
# Build an image with buildah in a chroot, where there is no container engine. Needs root; no engine, no daemon.
#
#   scripts/images/build.sh reward_service|trainer [buildah bud OPTION...]
#
# Bases are those of bases.sh; more options are handed on, such as --volume for a pip.conf, or --build-arg
# TORCH_INDEX=... . The context is HEAD's files, so that nothing uncommitted and nothing ignored gets in.
set -euo pipefail
cd "$(dirname "$0")/../.."
name=$1
shift
case "$name" in
  reward_service) tag=looper/reward-service:0.1.0
    bases=(--build-arg BUILD_BASE=localhost/looper-build --build-arg FINAL_BASE=localhost/looper-runtime) ;;
  trainer) tag=looper/trainer:0.1.0 bases=(--build-arg BASE=localhost/looper-build) ;;
  *) echo "error: $name: choose reward_service or trainer" >&2; exit 2 ;;
esac
context=$(mktemp -d)
trap 'rm -rf "$context"' EXIT
git archive HEAD | tar --extract --directory "$context"
buildah bud --isolation chroot --pull-never --format docker --file "docker/$name.Dockerfile" \
  --ignorefile "docker/$name.Dockerfile.dockerignore" --tag "$tag" "${bases[@]}" "$@" "$context"
