#!/usr/bin/env bash
# Write what `docker compose up` needs: .env, and docker/secrets/ with a local CA and the gateway's certificate.
#
#   docker/init.sh [cpu|gpu]     run again: keeps what is there, renews only what is missing
#
# The CA's key stays in docker/secrets/ca.key; keep a copy off this machine, or make a new CA by removing the folder.
set -euo pipefail
umask 077
cd "$(dirname "$0")/.."

kind="${1:-cpu}"
case "$kind" in cpu|gpu) ;; *) echo "error: $kind: choose cpu or gpu" >&2; exit 2 ;; esac
command -v openssl >/dev/null || { echo "error: openssl is missing; install it" >&2; exit 2; }

secrets=docker/secrets
mkdir -p "$secrets"
days=825

if [ ! -f "$secrets/ca.key" ]; then
  openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 3650 -subj "/CN=Looper local CA" \
    -addext basicConstraints=critical,CA:TRUE -addext keyUsage=critical,keyCertSign,cRLSign \
    -keyout "$secrets/ca.key" -out "$secrets/ca.crt" 2>/dev/null
fi

# A certificate that the local CA signs: NAME, subject alternative names, extended use.
certificate() {
  openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj "/CN=$1" \
    -keyout "$secrets/$1.key" -out "$secrets/$1.csr" 2>/dev/null
  openssl x509 -req -in "$secrets/$1.csr" -CA "$secrets/ca.crt" -CAkey "$secrets/ca.key" -CAcreateserial -days "$days" \
    -extfile <(printf 'basicConstraints=CA:FALSE\nsubjectAltName=%s\nextendedKeyUsage=%s\n' "$2" "$3") \
    -out "$secrets/$1.crt" 2>/dev/null
  rm -f "$secrets/$1.csr"
}

if [ ! -f "$secrets/gateway.pem" ]; then
  certificate gateway "DNS:gateway,DNS:localhost,IP:127.0.0.1" serverAuth
  cat "$secrets/gateway.crt" "$secrets/gateway.key" > "$secrets/gateway.pem"
fi
[ -f "$secrets/client.crt" ] || certificate client "DNS:client" clientAuth

# The trainer trusts this CA beside the usual ones, which it needs for the model hub.
: > "$secrets/ca-bundle.pem"
for system in /etc/ssl/certs/ca-certificates.crt /etc/pki/tls/certs/ca-bundle.crt; do
  if [ -f "$system" ]; then cat "$system" >> "$secrets/ca-bundle.pem"; break; fi
done
cat "$secrets/ca.crt" >> "$secrets/ca-bundle.pem"

# Containers run as the user who owns the secrets; root's are given to an ordinary user.
owner=$(id -u) group=$(id -g)
[ -f "$secrets/trainer.key" ] || touch "$secrets/trainer.key"
if [ "$owner" = 0 ]; then
  owner=65532 group=65532
  chown -R "$owner:$group" "$secrets"
fi

if [ ! -f .env ]; then
  torch_index=https://download.pytorch.org/whl/cpu
  [ "$kind" = cpu ] || torch_index=https://download.pytorch.org/whl/cu128
  cat > .env <<ENV
COMPOSE_PROFILES=$kind
LOOPER_TORCH_INDEX=$torch_index
LOOPER_UID=$owner
LOOPER_GID=$group
ENV
fi
echo ".env and $secrets are ready; next:"
echo "  docker compose build && docker compose run --rm -T keys > $secrets/trainer.key && docker compose up --detach"
