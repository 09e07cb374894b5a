#!/usr/bin/env bash
# Installs the system packages of apt.txt that are missing. Says nothing when none is.
#
# With apt-get and root (or sudo) it installs them; otherwise it prints what to install and fails.
# A package counts as there when dpkg says so or when its probe finds what we need of it.
set -euo pipefail
cd "$(dirname "$0")/.."

list=setup/apt.txt
log=.cache/setup/apt.log
mkdir -p .cache/setup
if command -v flock >/dev/null; then  # one set-up at a time
  exec 9>.cache/setup/system.lock
  flock 9
fi

# The headers of the list that the compiler finds, one a line.
headers_found() {
  command -v c++ >/dev/null || return 0
  awk '!/^(#|$)/ && $2 ~ /^header:/ {
    sub("header:", "", $2)
    printf "#if __has_include(<%s>)\n%s\n#endif\n", $2, $2
  }' "$list" | c++ -std=c++20 -E -P -x c++ - 2>/dev/null | tr -d ' '
}

found() {  # found PROBE
  local kind=${1%%:*} what=${1#*:}
  case $kind in
    program) command -v "$what" >/dev/null || [[ -x /usr/sbin/$what || -x /sbin/$what ]] ;;
    header) grep -qxF "$what" <<<"$headers" ;;
    file) compgen -G "$what" >/dev/null ;;
    python) setup/python.sh --probe "$what" ;;
    *) echo "setup/apt.txt: unknown probe '$1'" >&2; exit 2 ;;
  esac
}

missing=()
packages_missing() {
  local installed="" package probe headers
  missing=()
  headers=$(headers_found)
  if command -v dpkg-query >/dev/null; then
    installed=$(awk '!/^(#|$)/ {print $1}' "$list" |
      xargs dpkg-query -W -f='${db:Status-Status} ${Package}\n' 2>/dev/null || true)
  fi
  while read -r package probe _; do
    [[ -z $package || $package == \#* ]] && continue
    grep -qx "installed $package" <<<"$installed" || found "$probe" || missing+=("$package")
  done <"$list"
}

give_up() {
  {
    echo "setup: $1. Missing system packages (names of Debian 12):"
    echo
    echo "    ${missing[*]}"
    echo
    if command -v apt-get >/dev/null; then
      echo "hint: have them installed (as root: apt-get install ${missing[*]}), then run this again"
    else
      echo "hint: install what they stand for on your system, then run this again;"
      echo "      setup/apt.txt says what each is for, and by what it is recognised"
    fi
  } >&2
  exit 1
}

packages_missing
((${#missing[@]} == 0)) && exit 0

command -v apt-get >/dev/null || give_up "this system has no apt-get"
as_root=(env)
if ((EUID != 0)); then
  command -v sudo >/dev/null || give_up "not root, and there is no sudo"
  if ! sudo -n true 2>/dev/null && ! { [[ -t 0 ]] && sudo -v; }; then
    give_up "not root, and sudo refused"
  fi
  as_root=(sudo env)
fi

echo "setup: installing ${#missing[@]} system packages (log: $log)" >&2
if ! {
  "${as_root[@]}" DEBIAN_FRONTEND=noninteractive apt-get update -q &&
    "${as_root[@]}" DEBIAN_FRONTEND=noninteractive \
      apt-get install -q -y -o DPkg::Lock::Timeout=600 --no-install-recommends "${missing[@]}"
} >"$log" 2>&1; then
  tail -n 15 "$log" >&2
  give_up "apt-get failed"
fi
packages_missing
((${#missing[@]} == 0)) || give_up "apt-get reported success, yet something is not there"
