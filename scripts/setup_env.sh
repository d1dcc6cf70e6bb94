# Sourced by scripts/demo and scripts/test, from the repository's root: makes .venv with everything the repository needs
# and builds the extension, or returns at once when .venv is current. PYTHON chooses the interpreter.
# A stamp in .venv holds the hash of what was installed from; a changed file, or an interrupted set-up, runs it again.

fail() {
    echo "${0##*/}: $1" >&2
    exit 1
}

find_python() {
    local candidate
    for candidate in ${PYTHON:+"$PYTHON"} python3.12 python3.11 python3.13 python3.10 python3; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
        [ -z "${PYTHON:-}" ] ||
            fail "PYTHON=$PYTHON does not run or is older than Python 3.10: name another, or unset it"
    done
    fail "no Python 3.10 or newer found: install one, or set PYTHON to its path"
}

inputs_hash() { # of the files named, by their content
    cat "$@" | .venv/bin/python -c 'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())'
}

if ! .venv/bin/python -c 'import pip' 2>/dev/null; then
    python=$(find_python)
    "$python" -c 'import ensurepip, venv' 2>/dev/null ||
        fail "$python has no venv module: install it (Debian and Ubuntu: apt install python3-venv)"
    echo "== making .venv with $("$python" --version)"
    "$python" -m venv --clear .venv || fail "could not make .venv: see above"
fi

export PATH="$PWD/.venv/bin:$PATH" # cmake and ninja come with requirements-dev.txt; the tests build too

room() { # for whom an installation failed; the first thing to run out
    local free
    free=$(df -Pk . "${TMPDIR:-/tmp}" 2>/dev/null |
        awk 'NR > 1 { printf "%s%.1f GB in %s", sep, $4 / 1e6, $6; sep = ", " }')
    echo "8 GB of room are needed here, free are ${free:-unknown}"
}

compile_kernels() { # in the background; what goes wrong is said by the build, which does again what was not done
    local few
    mapfile -t few < <(grep -E '^(cmake|ninja|setuptools)==' requirements-dev.txt)
    .venv/bin/python -m pip install --disable-pip-version-check --quiet --no-compile "${few[@]}" || return 0
    mkdir -p build/tmp # half a gigabyte of nvcc's own files, which a small /tmp does not hold
    TMPDIR="$PWD/build/tmp" nice -n 5 .venv/bin/python setup.py -q build_ext --kernels >/dev/null 2>&1 &
    kernels=$!
}

needed=$(inputs_hash requirements-dev.txt)
if [ "$(cat .venv/installed.stamp 2>/dev/null)" != "$needed" ]; then
    echo "== installing requirements-dev.txt into .venv (7 GB with the CUDA build of torch; some minutes)"
    rm -f .venv/installed.stamp
    kernels=
    compile_kernels # they need no torch
    # --no-compile: Python compiles what it imports, a small part of all that is installed
    .venv/bin/python -m pip install --disable-pip-version-check --quiet --no-compile -r requirements-dev.txt ||
        { [ -z "$kernels" ] || kill "$kernels"; fail "could not install requirements-dev.txt: see above ($(room))"; }
    echo "$needed" >.venv/installed.stamp
    if [ -n "$kernels" ]; then wait "$kernels" || true; fi
    rm -rf build/tmp
fi

mapfile -t sources < <(find csrc CMakeLists.txt setup.py pyproject.toml -type f | LC_ALL=C sort)
needed=$(inputs_hash "${sources[@]}" .venv/installed.stamp)
if [ "$(cat .venv/built.stamp 2>/dev/null)" != "$needed" ] || [ ! -e ijckd_fast/head/_C.so ]; then
    command -v "${CXX:-c++}" >/dev/null || command -v g++ >/dev/null || command -v clang++ >/dev/null ||
        fail "no C++ compiler found: install one (Debian and Ubuntu: apt install g++), or set CXX to its path"
    echo "== building the extension"
    rm -f .venv/built.stamp
    .venv/bin/python -m pip install --disable-pip-version-check --quiet --no-build-isolation -e .
    echo "$needed" >.venv/built.stamp
fi
unset needed sources python kernels
