#!/bin/sh
# Run by the PostgreSQL image when its volume is empty. What the login may do is said later, by `behest ledger role create`.
set -eu
psql --quiet --set=ON_ERROR_STOP=1 --username "$POSTGRES_USER" --dbname "$POSTGRES_DB" \
  --set=password="$(cat /run/secrets/gateway-password)" <<'END'
CREATE ROLE behest_gateway LOGIN PASSWORD :'password';
END
