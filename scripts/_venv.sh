# shellcheck shell=bash
# How `.venv` is made: the one place that knows. Sourced, from the root of the repository, by the scripts that run on a
# machine with nothing but Python:
#
#     source scripts/_venv.sh
#     ensure_venv envs              # or several extras: ensure_venv dev envs zarr
#
# Afterwards `python` and every installed program are those of the environment. PYTHON chooses the interpreter to make it
# with (python3), VENV the folder (.venv). Which torch is installed (CPU or CUDA build) is pip's usual choice; its own
# settings (PIP_INDEX_URL, PIP_FIND_LINKS, ...) apply as always.

VENV="${VENV:-.venv}"
STAMP="$VENV/.diffpolicy-installed" # two lines: fingerprint and folder; then one extra a line

# ensure_venv EXTRA...: make, repair or complete the environment, then enter it. Quick when there is nothing to do.
ensure_venv() {
    make_venv || return
    VIRTUAL_ENV="$(cd "$VENV" && pwd)"
    export VIRTUAL_ENV PATH="$VIRTUAL_ENV/bin:$PATH"
    if is_installed "$@"; then return; fi
    install_project "$@"
}

fail() {
    echo "error: $*" >&2
    return 1
}

# A run that was cut short, a moved folder or a new system Python leave programs that do not start: then it is made afresh.
make_venv() {
    if "$VENV/bin/pip" --version >/dev/null 2>&1; then return; fi
    local python="${PYTHON:-python3}"
    if ! command -v "$python" >/dev/null; then
        fail "there is no '$python' here: install Python 3.11 or newer, or name one with PYTHON=..."
    elif ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
        fail "$("$python" --version) is too old: Python 3.11 or newer is wanted, name one with PYTHON=..."
    elif [ -e "$VENV" ] && [ ! -e "$VENV/pyvenv.cfg" ]; then
        fail "$VENV exists and is not a virtual environment: move it away, or name another folder with VENV=..."
    else
        echo "Making $VENV with $("$python" --version)"
        "$python" -m venv --clear "$VENV" ||
            fail "'$python -m venv' does not work: on Debian and Ubuntu, install the package python3-venv"
    fi
}

fingerprint() {
    cat pyproject.toml constraints.txt scripts/_venv.sh | cksum
    pwd
}

# Same pins as when it was installed, and every extra that is asked for is there?
is_installed() {
    [ -e "$STAMP" ] && [ "$(head -n 2 "$STAMP")" = "$(fingerprint)" ] || return
    local extra
    for extra in "$@"; do
        tail -n +3 "$STAMP" | grep -qx "$extra" || return
    done
}

pip_install() {
    python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt "$@"
}

# Extras that are already there stay, so that quickstart and test do not undo each other. torch goes first and alone: with
# it in place no later step can replace it by another build.
install_project() {
    local extras start=$SECONDS
    extras="$({ tail -n +3 "$STAMP" 2>/dev/null; printf '%s\n' "$@"; } | sort -u)"
    rm -f "$STAMP"
    echo "Installing torch, then diffpolicy[$(join_lines "$extras")] (the first time takes a few minutes)"
    pip_install torch || return
    pip_install --editable ".[$(join_lines "$extras")]" || return
    { fingerprint; echo "$extras"; } >"$STAMP.part" && mv "$STAMP.part" "$STAMP"
    echo "Installed in $((SECONDS - start)) s"
}

join_lines() {
    echo "$1" | paste -sd, -
}
