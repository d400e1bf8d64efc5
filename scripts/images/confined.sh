#!/usr/bin/env bash
# Run the reward service's image as compose would, with bubblewrap in place of an engine, and ask it what it can do.
#
#   scripts/images/confined.sh [IMAGE]     needs root, buildah, bubblewrap; prints one line a question, exit 1 on a wrong one
#
# User 65532, no capabilities, a read-only root, a network of its own without any route, a writable /tmp and a writable
# home; the environment is the image's. confined.py then runs by the image's interpreter and asks from inside.
set -euo pipefail
cd "$(dirname "$0")/../.."
image=${1:-looper/reward-service:0.1.0}
work=$(mktemp -d)
container=$(buildah from --pull-never "$image")
trap 'buildah rm "$container" > /dev/null; rm -rf "$work"' EXIT
root=$(buildah mount "$container")
chmod 755 "$work"
mkdir "$work/home"
chown 65532:65532 "$work/home"
chmod 700 "$work/home"
cp scripts/images/confined.py "$work/confined.py"
variables=()
while IFS= read -r row; do
  variables+=(--setenv "${row%%=*}" "${row#*=}")
done < <(buildah inspect --type container --format '{{range .OCIv1.Config.Env}}{{println .}}{{end}}' "$container" | grep =)

# The pathname of the root must be passable for that user.
folder=$root
while [ "$folder" != / ]; do chmod o+x "$folder"; folder=$(dirname "$folder"); done

setpriv --reuid 65532 --regid 65532 --clear-groups --inh-caps=-all --bounding-set=-all --no-new-privs \
  bwrap --unshare-all --die-with-parent --new-session --cap-drop ALL --clearenv "${variables[@]}" \
  --ro-bind "$root" / --proc /proc --dev /dev --tmpfs /tmp --tmpfs /run --ro-bind "$work/confined.py" /run/confined.py \
  --bind "$work/home" /var/lib/looper/reward --chdir / \
  /opt/looper/bin/python /run/confined.py
