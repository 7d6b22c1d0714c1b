#!/usr/bin/env bash
# The virtual environment of this checkout: made if there is none that fits, and installed into.
# Usage: scripts/install.sh FOLDER PYTHON|any [EXTRAS]; without extras, what building and serving take.
# PYTHON: the program to make it with; any: the one it has, else python3. A fresh one costs nothing.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
folder=$1 asked=$2 extras=${3:-}
stamp=$folder/bin/.installed${extras:+-dev}

version_of() { # 3.12, or nothing where that is no Python
  "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || true
}

fits() {
  case $1 in
    3.10 | 3.11 | 3.12 | 3.13) ;;
    *) return 1 ;;
  esac
}

refuse() { # what was found, and a command that would do
  local program
  for program in python3.12 python3.13 python3.11 python3.10; do
    if fits "$(version_of "$program")"; then
      echo "$1; enginehouse takes Python 3.10 to 3.13: add PYTHON=$program" >&2
      exit 2
    fi
  done
  echo "$1; enginehouse takes Python 3.10 to 3.13, of which none is on PATH: install one, and" \
    "add PYTHON=/path/to/it" >&2
  exit 2
}

# What there is: its Python, if it has one that runs, and pip, without which it was half made.
found=$(version_of "$folder/bin/python")
[[ $asked == any ]] && wanted=$found || wanted=$(version_of "$asked")
if [[ $asked != any ]]; then
  [[ -n $wanted ]] || refuse "PYTHON=$asked is no Python that runs"
  fits "$wanted" || refuse "PYTHON=$asked is Python $wanted"
fi
if ! fits "$found" || [[ $found != "$wanted" ]] ||
  { [[ ! -e $stamp ]] && ! "$folder/bin/python" -m pip --version >/dev/null 2>&1; }; then
  program=$asked
  [[ $asked != any ]] || program=python3
  version=$(version_of "$program")
  fits "$version" || refuse "${program} is ${version:+Python }${version:-not on PATH}"
  if [[ -e $folder ]]; then
    if [[ ! -e $folder/pyvenv.cfg ]]; then
      echo "$folder is there and is no virtual environment: move it, or choose another with VENV=" >&2
      exit 2
    fi
    echo "$folder was ${found:+of Python }${found:-not finished}, and is made anew with Python $version"
  fi
  "$program" -m venv --clear "$folder"
fi

for file in setup.cfg pyproject.toml constraints.txt; do
  [[ -e $stamp && ! $file -nt $stamp ]] || outdated=yes
done
[[ -n ${outdated:-} ]] || exit 0
quiet=-q # in a log, two lines instead of pip's three hundred
[[ ! -t 1 ]] || quiet=
echo "installing into $folder${extras:+ with $extras} (torch for the CPU is about 200 MB) ..."
"$folder/bin/python" -m pip install $quiet -c constraints.txt -e ".$extras"
echo "installed in $SECONDS s"
touch "$folder/bin/.installed" "$stamp"
