#!/bin/sh
# Makes a virtual environment and installs ds_pso in it for development: launcher/install.sh [FOLDER] [oldest]
# With "oldest": what ds_pso and its tests need, in the oldest versions that pyproject.toml allows.
set -eu
cd "$(dirname "$0")/.."
venv=${1:-.venv}
which=${2:-newest}
python=${PYTHON:-python3}

torch=$(sed -n 's/^ *"\(torch>=[^"]*\)",$/\1/p' pyproject.toml)
"$venv/bin/python" -m pip --version >/dev/null 2>&1 || "$python" -m venv --clear "$venv"
pip="$venv/bin/python -m pip --disable-pip-version-check -q"
extra=dev
if [ "$which" = oldest ]; then
    extra="test"
    constraints=$venv/oldest.txt
    "$venv/bin/python" - >"$constraints" <<'END'
import re, tomllib
project = tomllib.load(open("pyproject.toml", "rb"))["project"]
ranges = project["dependencies"] + [text for extra in project["optional-dependencies"].values() for text in extra]
print(*(re.sub(r">=([^,]+),.*", r"==\1.*", text) for text in ranges if ",<" in text), sep="\n")
END
    torch=$(grep '^torch==' "$constraints")
    export PIP_CONSTRAINT="$constraints"
fi

if ! "$venv/bin/python" -c 'import torch' 2>/dev/null; then
    echo "Installing $torch"
    if command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi >/dev/null 2>&1; then
        $pip install "$torch"
    else
        # Without an NVIDIA driver the gigabytes of CUDA libraries in the default build are no use:
        # uv knows where the CPU builds are; pip is for machines that cannot reach them.
        $pip install uv
        UV_HTTP_RETRIES=0 "$venv/bin/uv" pip install -q -p "$venv/bin/python" --torch-backend=cpu "$torch" 2>/dev/null ||
            $pip install "$torch"
    fi
fi
echo "Installing ds_pso and what it needs"
$pip install -e ".[$extra]"
touch "$venv/.installed"
