# What prove.py has a container's user run, in a login shell, without network and with nothing to write to but /tmp:
# every command line, then the whole road at its smallest, on a node that Ray's command started.
set -eu
say() { printf '%s: %s s\n' "$1" $(($(date +%s) - begin)); }
quiet() { "$@" >>/tmp/said.log 2>&1 || { tail -30 /tmp/said.log && echo "failed: $*" && exit 1; }; }
begin=$(date +%s)
test "$(id -u)" = 1000
if touch /opt/written 2>/dev/null || touch "$HOME/written" 2>/dev/null; then
    echo "the root can be written to" && exit 1
fi
for tool in pip gcc make git; do
    if command -v "$tool"; then echo "$tool is in the image" && exit 1; fi
done
for package in ingest store train serve; do quiet python -m "$package" --help; done
python -c 'import ray, serve.deploy, tiledbsoma, torch, train.model, train.stream
print("python", ray.__version__, torch.__version__, "cuda", torch.version.cuda)'
say "command lines and imports"

begin=$(date +%s)
if python /opt/health.py 2>/dev/null; then echo "well, though nothing runs" && exit 1; fi
quiet ray start --head --num-cpus 2 --port 6379 --node-ip-address 127.0.0.1 --object-store-memory 200000000
address=127.0.0.1:6379
until python /opt/health.py 2>/dev/null; do sleep 1; done
quiet ray health-check --address "$address"
wget --tries 1 -T 2 -q -O- http://127.0.0.1:52365/api/local_raylet_healthz | grep -q success
say "a node, healthy by health.py, ray health-check and wget"

begin=$(date +%s)
cd /tmp
cat >ingest.toml <<'END'
lake = "/tmp/lake"
workers = 1
[[source]]
uri = "simulated:"
dataset_id = "smoke"
simulation.cells = 300
END
cat >train.toml <<'END'
lake = "/tmp/lake"
snapshot = "smoke"
output = "/tmp/runs"
name = "smoke"
steps = 3
workers = 1
optim.warmup_steps = 1
[model]
width = 32
layers = 1
[data]
global_batch = 16
tokens = 64
END
quiet python -m ingest run ingest.toml --address "$address"
say "300 simulated cells ingested"
begin=$(date +%s)
quiet python -m store snapshot create smoke --lake lake --workers 0
quiet python -m train train.toml --address "$address"
say "a snapshot and three steps of training"
begin=$(date +%s)
python -m serve run runs/smoke/checkpoint --port 8000 --address "$address" >serve.log 2>&1 &
server=$!
until SOMAFLOW_HEALTH_URL=http://127.0.0.1:8000/v1/health/ready python /opt/health.py 2>/dev/null; do
    kill -0 $server 2>/dev/null || { tail -30 serve.log && exit 1; }
    sleep 1
done
say "a server, ready"
