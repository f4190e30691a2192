#!/bin/sh
# Makes what compose.yaml reads from the folder `secrets` beside it; what is there already stays. Needs openssl.
#
# Files of Compose's secrets keep their owner and mode in the container, where others read them: the folder is closed
# instead, to everybody but you.
set -eu
command -v openssl >/dev/null || { echo "$0: openssl is missing" >&2; exit 2; }
cd "$(dirname "$0")"
mkdir -p secrets
chmod 700 secrets
cd secrets
umask 077

make() {
  name=$1
  shift
  [ -s "$name" ] || { "$@" > "$name.new" && chmod 444 "$name.new" && mv "$name.new" "$name"; }
}
url() { printf 'postgresql://%s:%s@postgres:5432/behest\n' "$1" "$(cat "$2")"; }

make postgres-password openssl rand -hex 24
make gateway-password openssl rand -hex 24
make database-url url behest postgres-password
make gateway-database-url url behest_gateway gateway-password
make signing-key.pem openssl genpkey -algorithm RSA -pkeyopt rsa_keygen_bits:2048
make master-key openssl rand -base64 32
