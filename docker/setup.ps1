# Start the whole system on this machine: write docker\.env with random passwords, build the images, start the services.
#   docker\setup.ps1            do all of it
#   docker\setup.ps1 -EnvOnly   only write docker\.env
param([switch]$EnvOnly)
$ErrorActionPreference = 'Stop'
Set-Location $PSScriptRoot

function Get-Random32([string]$name) { # 32 random bytes: base64 for Fernet, hexadecimal for the others, which are used in URLs
    $bytes = New-Object byte[] 32
    $source = [System.Security.Cryptography.RandomNumberGenerator]::Create()
    $source.GetBytes($bytes)
    if ($name -like '*FERNET*') { return [Convert]::ToBase64String($bytes).Replace('+', '-').Replace('/', '_') }
    return (-join ($bytes | ForEach-Object { $_.ToString('x2') })).Substring(0, 40)
}

# Add missing lines, so that the .env of an older version keeps working. Existing lines are not changed, except VERSION.
$there = @()
$fresh = -not (Test-Path .env)
if (-not $fresh) { $there = @(Get-Content .env | Where-Object { $_ -match '^[A-Z0-9_]+=' } | ForEach-Object { $_.Split('=')[0] }) }
$lines = @()
$added = 0
foreach ($line in Get-Content .env.example) {
    if ($line -notmatch '^[A-Z0-9_]+=') {
        if ($fresh) { $lines += $line }
        continue
    }
    $name = $line.Split('=')[0]
    if ($there -contains $name) { continue }
    if ($line.EndsWith('=')) { $line += Get-Random32 $name }
    $lines += $line
    $added++
}
if ($lines.Count) { [IO.File]::AppendAllText((Join-Path $PSScriptRoot '.env'), ($lines -join "`n") + "`n") }
$version = (Get-Content ..\settings.ini | Where-Object { $_ -match '^version = ' }) -replace '^version = ', ''
$text = (Get-Content .env) -replace '^VERSION=.*', "VERSION=$version"
[IO.File]::WriteAllText((Join-Path $PSScriptRoot '.env'), ($text -join "`n") + "`n")
Write-Output "docker\.env: $added settings added"
New-Item -ItemType Directory -Force photos | Out-Null
if ($EnvOnly) { exit 0 }

$ErrorActionPreference = 'Continue' # warnings of docker are not errors
$need, $have = '2.33.1', ''
if (Get-Command docker -ErrorAction SilentlyContinue) { $have = "$(docker compose version --short 2>$null)".TrimStart('v') }
if (-not $have -or [version]($have -replace '[^0-9.].*', '') -lt [version]$need) { Write-Error "Docker with its Compose plugin, $need or newer, is needed: see docs.docker.com/get-docker"; exit 1 }
docker info 2>&1 | Out-Null
if ($LASTEXITCODE) { Write-Error 'Docker is installed, but its engine does not answer: start Docker Desktop'; exit 1 }
docker compose up --build --detach --wait
if ($LASTEXITCODE) { Write-Error 'Not everything came up. What failed is above; docker compose logs NAME says more.'; exit 1 }

Write-Output @'

API         http://localhost:8000/docs
app         http://localhost:7860
dashboard   http://localhost:8866      token: PLANT_TOKEN in docker\.env
MLflow      http://localhost:5001
Airflow     http://localhost:8080      admin, AIRFLOW_PASSWORD
Grafana     http://localhost:3000      admin, GRAFANA_PASSWORD
Prometheus  http://localhost:9090, alerts http://localhost:9093
MinIO       http://localhost:9001      S3_ACCESS_KEY, S3_SECRET_KEY

There is no model yet. Put photos into docker\photos, a folder for each class, then, in the folder docker:
  docker compose run --rm cli job run --all -p photos /photos      (without -p ... : on drawn photos)
Then a walk through all of it: Get-Content smoke.py | docker compose exec -T api python3 -
'@
