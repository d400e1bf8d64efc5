#!/usr/bin/env bash
# Run both images together as compose would, with bubblewrap in place of an engine: service, gateway and trainer.
#
#   scripts/images/together.sh PYTHON     an interpreter that has this repository installed; needs root, buildah,
#                                         bubblewrap, haproxy, iproute2; exit 1 if anything is wrong
#
# All of it in a network namespace whose only interface is the loopback; together.py says what is asked.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=$(command -v "$1")
work=$(mktemp -d)
containers=()
trap 'buildah rm "${containers[@]}" > /dev/null; rm -rf "$work"' EXIT
chmod 711 "$work"
for image in reward-service trainer; do
  container=$(buildah from --pull-never "looper/$image:0.1.0")
  containers+=("$container")
  root=$(buildah mount "$container")
  ln -s "$root" "$work/$image"
  buildah inspect --type container --format '{{range .OCIv1.Config.Env}}{{println .}}{{end}}' "$container" |
    grep = > "$work/$image.env"
  folder=$root
  while [ "$folder" != / ]; do chmod o+x "$folder"; folder=$(dirname "$folder"); done
done
unshare --net -- bash -c 'ip link set lo up && exec "$@"' -- "$python" scripts/images/together.py "$work"
