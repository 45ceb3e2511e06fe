#!/bin/sh
# The steps of the image, each by a word: sh install.sh system | tools | dependencies cpu|gpu | project. The Dockerfile
# calls them in its stages, prove.py in a clean root. Files are expected in /build; what is made lies in /opt/somaflow.
set -eu
VENV=/opt/somaflow
TOOLS=/opt/tools
export DEBIAN_FRONTEND=noninteractive PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore

apt_install() {
    apt-get update -qq
    apt-get upgrade -qq -y
    apt-get install -qq -y --no-install-recommends "$@"
    apt-get clean
    rm -rf /var/lib/apt/lists/*
}

into_venv() {
    "$TOOLS/bin/python" -m pip --python "$VENV/bin/python" "$@"
}

case "$1" in
system)
    # What a node needs at run time: Python, certificates, and wget, by which KubeRay's probes ask.
    apt_install ca-certificates python3 wget
    groupadd --gid 1000 somaflow
    useradd --uid 1000 --gid 1000 --create-home --shell /bin/bash somaflow
    # A login shell, which KubeRay may use, sets PATH anew.
    echo "PATH=$VENV/bin:\$PATH" >/etc/profile.d/somaflow.sh
    # Nobody becomes root here.
    find / -xdev -type f -perm /6000 -exec chmod a-s {} +
    ;;
tools)
    apt_install python3-venv
    python3 -m venv "$TOOLS"
    python3 -m venv --without-pip "$VENV"
    ;;
dependencies)
    # What the project asks for, at the lock's versions; tools of development are left out, for nobody asks for them.
    target=$2
    cd /build
    case "$target" in
    cpu)
        into_venv install -q --no-deps ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "$(grep '^torch==' requirements.lock)"
        wanted='p["dependencies"]'
        ;;
    gpu) wanted='p["dependencies"] + p["optional-dependencies"]["fp8"]' ;;
    *)
        echo "install.sh: dependencies of '$target': say cpu or gpu" >&2
        exit 2
        ;;
    esac
    python3 -c "import tomllib; p = tomllib.load(open('pyproject.toml', 'rb'))['project']; print(*$wanted, sep='\n')" >wanted.txt
    into_venv install -q -c requirements.lock -r wanted.txt
    "$TOOLS/bin/python" -m pip install -q -c requirements.lock hatchling
    # The lock names every package, but for those of CUDA, which torch pins itself, and setuptools, which it leaves out.
    into_venv freeze --all >frozen.txt
    sed -E 's/\+c(pu|u[0-9]+)$//' frozen.txt | grep -vixFf requirements.lock |
        grep -viE '^(nvidia|cuda)-|^(triton|setuptools)==' >beyond.txt || true
    if [ -s beyond.txt ]; then
        echo "install.sh: not in requirements.lock; run make lock:" >&2
        cat beyond.txt >&2
        exit 1
    fi
    cuda=$("$VENV/bin/python" -c 'import torch; print(torch.version.cuda or "")')
    if [ "$target" = cpu ] && [ -n "$cuda" ]; then
        echo "install.sh: this torch brings CUDA $cuda; for the target cpu say where its CPU build is: TORCH_INDEX" >&2
        exit 1
    fi
    if [ "$target" = gpu ] && [ -z "$cuda" ]; then
        echo "install.sh: pip found a torch without CUDA; take its own wheels, or build the target cpu" >&2
        exit 1
    fi
    ;;
project)
    cd /build
    "$TOOLS/bin/python" -m pip wheel -q --no-deps --no-build-isolation --wheel-dir wheel .
    into_venv install -q --no-deps --no-index wheel/*.whl
    into_venv check
    ;;
*)
    echo "install.sh: '$1' is none of: system, tools, dependencies, project" >&2
    exit 2
    ;;
esac
