# shellcheck shell=bash
# Sourced by the scripts beside it: makes the virtual environment .venv in the repository's root and installs the
# package into it. It sets ROOT and VENV; `ensure_environment EXTRA` does the work, and only what is still to do.

ROOT="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)"
VENV="$ROOT/.venv"

say() { printf '%s\n' "$*" >&2; }

# die STATUS WHAT WHERE WHAT_TO_DO
die() {
  say "error: $2: $3; $4"
  exit "$1"
}

# Prints the version of the Python $1, as in 3.11.7; fails where it does not run or is older than 3.11.
python_version() {
  "$1" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3]); sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

# Prints a Python that is new enough and can make virtual environments. 3.11 comes first: constraints.txt is for it.
find_python() {
  local candidates=(python3.11 python3.12 python3.13 python3 python) candidate version old="" bare=""
  if [[ -n "${PYTHON:-}" ]]; then candidates=("$PYTHON"); fi
  for candidate in "${candidates[@]}"; do
    if ! version="$(python_version "$candidate")"; then
      if [[ -n "$version" ]]; then old="$candidate is $version"; fi
      continue
    fi
    if "$candidate" -c 'import ensurepip, venv' 2>/dev/null; then
      printf '%s\n' "$candidate"
      return
    fi
    bare="$candidate"
  done
  if [[ -n "$bare" ]]; then
    die 2 "this Python cannot make a virtual environment" "$bare has no venv or ensurepip module" \
      "install them (Debian, Ubuntu: apt-get install python3-venv), or set PYTHON to another Python"
  fi
  if [[ -z "$old" ]]; then old="${PYTHON:-python3} is missing or does not run"; fi
  die 2 "no Python 3.11 or newer" "$old" \
    "install one (Debian, Ubuntu: apt-get install python3 python3-venv), or set PYTHON=/path/to/python3.11"
}

# Everything that makes an installation out of date: the metadata, the pins, and where the repository lies, because
# the console script and the editable install hold absolute paths.
fingerprint() {
  "$VENV/bin/python" - "$ROOT" <<'END'
import hashlib, pathlib, sys
root = pathlib.Path(sys.argv[1])
digest = hashlib.sha256(f"{root}\n{sys.version}\n".encode())
for name in ("setup.py", "constraints.txt"):
    digest.update((root / name).read_bytes())
print(digest.hexdigest())
END
}

make_venv() {
  local python
  if python_version "$VENV/bin/python" >/dev/null && "$VENV/bin/python" -c 'import pip' 2>/dev/null; then return; fi
  python="$(find_python)" || exit
  if [[ -e "$VENV" ]]; then
    say "environment: .venv is incomplete; making it anew with $python"
  else
    say "environment: making .venv with $python"
  fi
  "$python" -m venv --clear "$VENV" >&2 ||
    die 2 "cannot make the virtual environment" "$VENV" \
      "see the message above (Debian, Ubuntu: apt-get install python3-venv; or is the disk full?)"
}

pip_install() {
  local quiet=(--quiet)
  if [[ -t 2 ]]; then quiet=(); fi
  "$VENV/bin/python" -m pip install ${quiet[@]+"${quiet[@]}"} --disable-pip-version-check --no-input "$@" >&2
}

# ensure_environment EXTRA: .venv exists and holds the package, editable, with that extra ("" for none).
ensure_environment() {
  local extra="$1" stamp wanted version part
  make_venv
  stamp="$VENV/.installed-${extra:-base}"
  wanted="$(fingerprint)"
  if [[ -x "$VENV/bin/audiolm" && -f "$stamp" && "$(<"$stamp")" == "$wanted" ]]; then return; fi
  local target="$ROOT${extra:+[$extra]}"
  version="$(python_version "$VENV/bin/python")"
  say "environment: installing audiolm_jax${extra:+[$extra]} into .venv (some gigabytes; minutes the first time)"
  if ! pip_install --constraint "$ROOT/constraints.txt" --editable "$target"; then
    if [[ "$version" == 3.11.* ]]; then
      die 1 "the installation failed" "$ROOT" "see pip's message above, and run again"
    fi
    say "environment: constraints.txt, tested on Python 3.11, does not install on $version; going on without it"
    pip_install --editable "$target" ||
      die 1 "the installation failed" "$ROOT with Python $version" "see pip's message above, or use Python 3.11"
  fi
  # Written last, so that an installation cut short is taken up again; an extra brings the base with it.
  for part in base ${extra:+"$extra"}; do printf '%s\n' "$wanted" >"$VENV/.installed-$part"; done
}
