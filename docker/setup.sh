#!/usr/bin/env bash
# Start the whole system on this machine: write docker/.env with random passwords, build the images, start the services.
#   docker/setup.sh          do all of it
#   docker/setup.sh --env    only write docker/.env
set -euo pipefail
cd "$(dirname "$0")"

random() { # 32 random bytes: base64 for Fernet, hexadecimal for the others, which are used in URLs
  case $1 in
    *FERNET*) head -c 32 /dev/urandom | base64 | tr '+/' '-_' ;;
    *) head -c 32 /dev/urandom | od -An -v -tx1 | tr -d ' \n' | cut -c1-40 ;;
  esac
}

mkdir -p photos # before umask: it must be readable by the containers
umask 077

# Add missing lines, so that the .env of an older version keeps working. Existing lines are not changed, except VERSION.
[[ -e .env ]] && fresh= || fresh=1
touch .env
added=0
while IFS= read -r line; do
  name=${line%%=*}
  [[ $line =~ ^[A-Z0-9_]+= ]] || { [[ $fresh ]] && printf '%s\n' "$line" >> .env; continue; }
  grep -q "^$name=" .env && continue
  [[ $line == *= ]] && line=$line$(random "$name")
  printf '%s\n' "$line" >> .env
  added=$((added + 1))
done < .env.example
version=$(sed -n 's/^version = //p' ../settings.ini)
sed "s/^VERSION=.*/VERSION=$version/" .env > .env.new && mv .env.new .env
echo "docker/.env: $added settings added"
[[ ${1:-} == --env ]] && exit

need=2.33.1 have=$(docker compose version --short 2>/dev/null | tr -d v) || true
[[ $(printf '%s\n' "$need" "${have:-0}" | sort -V | head -1) == "$need" ]] || {
  echo "Docker with its Compose plugin, $need or newer, is needed, but this machine has ${have:-none}: see docs.docker.com/get-docker" >&2; exit 1; }
docker info >/dev/null 2>&1 || { echo "Docker is installed, but its engine does not answer: start it, or join the group docker" >&2; exit 1; }
docker compose up --build --detach --wait

cat <<'EOF'

API         http://localhost:8000/docs
app         http://localhost:7860
dashboard   http://localhost:8866      token: PLANT_TOKEN in docker/.env
MLflow      http://localhost:5001
Airflow     http://localhost:8080      admin, AIRFLOW_PASSWORD
Grafana     http://localhost:3000      admin, GRAFANA_PASSWORD
Prometheus  http://localhost:9090, alerts http://localhost:9093
MinIO       http://localhost:9001      S3_ACCESS_KEY, S3_SECRET_KEY

There is no model yet. Put photos into docker/photos, a folder for each class, then, in the folder docker:
  docker compose run --rm cli job run --all -p photos /photos      (without -p … : on drawn photos)
Then test all services: docker compose exec -T api python3 - < smoke.py
EOF
