# To be sourced: make_environment FOLDER [EXTRA] makes a virtual environment where there is none,
# installs this package in it, and activates it.
#
# Where there is no NVIDIA GPU, a CPU build of torch is taken if one is to be had: the usual one
# brings gigabytes of CUDA libraries along.
CPU_TORCH="2.13.0+cpu"
CPU_INDEX="https://download.pytorch.org/whl/cpu"

install_torch() {
    python -c "import torch" 2>/dev/null && return
    if ! command -v nvidia-smi >/dev/null; then
        pip install --quiet "torch==$CPU_TORCH" 2>/dev/null && return
        pip install --quiet torch --index-url "$CPU_INDEX" --timeout 10 --retries 0 2>/dev/null && return
    fi
    pip install --quiet torch
}

make_environment() {
    local folder=$1 extra=${2:-}
    if [ ! -x "$folder/bin/python" ]; then
        echo "Making the environment $folder (once; some minutes)"
        "${PYTHON:-python3}" -m venv "$folder"
    fi
    # shellcheck disable=SC1091
    . "$folder/bin/activate"
    export PIP_DISABLE_PIP_VERSION_CHECK=1
    install_torch
    pip install --quiet --editable ".${extra:+[$extra]}"
}
