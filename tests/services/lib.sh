#!/usr/bin/env bash
# What the scripts of this folder share: the cache of downloads, free ports, and processes that are remembered so that
# exactly these can be stopped. Sourced, never run. Nothing in here knows PostgreSQL or Kafka.
#
# A service lives in one folder: `log`, `env` (export lines), `service.pid` while it runs, and its data. Starting it
# again in the same folder finds the same data and the same ports.

set -euo pipefail
shopt -s inherit_errexit
umask 022

cache="${XDG_CACHE_HOME:-$HOME/.cache}/outbox-relay-tests"
PATH="$PATH:/usr/sbin:/sbin"

# Servers that refuse to run as root run as this user; its commands start with "${as_owner[@]}".
owner=$(id -un)
as_owner=()
if ((EUID == 0)); then
    owner=$(id -un postgres 2>/dev/null || echo nobody)
    as_owner=(setpriv --reuid="$owner" --regid="$(id -g "$owner")" --clear-groups --)
fi

say() { printf '%s: %s\n' "${0##*/}" "$*" >&2; }

fail() {
    say "$*"
    exit 1
}

usage() {
    printf 'usage: tests/services/%s %s\n' "${0##*/}" "$1" >&2
    exit 2
}

# Creates the folder $1 and prints its absolute path. The owner of the servers must be able to walk through it.
service_folder() {
    mkdir -p "$1"
    if ((EUID == 0)); then
        chmod o+x "$1"
        "${as_owner[@]}" test -x "$1" || fail "user $owner cannot reach $1: choose a folder in /tmp"
    fi
    realpath "$1"
}

# Prints the path of entry $1 of the cache. When it is missing, the command in the other arguments fills an empty folder
# (given as its last argument), which is then moved into place: nobody ever sees half of an entry.
cached() {
    local place="$cache/$1"
    if [[ ! -d $place ]]; then
        mkdir -p "$cache"
        fill "$place" "${@:2}" 9>"$place.lock" >&2
    fi
    printf '%s\n' "$place"
}

fill() (
    flock 9
    [[ -d $1 ]] && return
    say "fetching ${1##*/}"
    partial=$(mktemp -d "$cache/partial.XXXXXX")
    trap 'rm -rf "$partial"' EXIT
    "${@:2}" "$partial" 9>&-
    chmod 755 "$partial"
    mv -T "$partial" "$1"
)

# Runs one goal of Maven's dependency plugin. One at a time: Maven's own cache does not like company.
maven() {
    flock "$cache/maven.lock" mvn --quiet --batch-mode \
        "org.apache.maven.plugins:maven-dependency-plugin:3.8.1:$1" "${@:2}"
}

# Prints a port on which nothing listens. It is below the range from which outgoing connections get theirs, and it is
# reserved for an hour: no other run takes it between this choice and the start, or while a test has the service down.
free_port() {
    local port
    mkdir -p "$cache/ports"
    # Others may be deleting the same ones.
    find "$cache/ports" -type f -mmin +60 -delete 2>/dev/null || true
    while true; do
        port=$((15000 + RANDOM % 16000))
        if ! port_answers "$port" && (set -o noclobber && : >"$cache/ports/$port") 2>/dev/null; then
            printf '%s\n' "$port"
            return
        fi
    done
}

port_answers() { (: <>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }

# Prints when process $1 started, which together with its id names it for good.
started_at() {
    local stat fields
    stat=$(cat "/proc/$1/stat" 2>/dev/null) || return 1
    read -ra fields <<<"${stat##*) }"
    [[ ${fields[0]} != Z ]] && printf '%s\n' "${fields[19]}"
}

# remember FOLDER PID SIGNAL: the service in FOLDER is process PID, and SIGNAL asks it to stop.
remember() { printf '%s %s %s\n' "$2" "$(started_at "$2")" "$3" >"$1/service.pid"; }

runs() {
    local pid started _
    [[ -f $1/service.pid ]] || return 1
    read -r pid started _ <"$1/service.pid"
    [[ $(started_at "$pid") == "$started" ]]
}

# await FOLDER CONDITION...: waits until the condition holds, and gives up when the service ends or after a minute.
await() {
    local folder=$1 deadline=$((SECONDS + 60))
    while ! "${@:2}"; do
        if ! runs "$folder" || ((SECONDS > deadline)); then
            halt "$folder"
            give_up "$folder"
        fi
        sleep 0.05
    done
}

# Shows the end of the log of the service in folder $1 and fails.
give_up() {
    say "the last lines of $1/log:"
    tail -n 25 "$1/log" >&2
    fail "did not start"
}

# Stops the service in folder $1, by force after 15 seconds. A paused process is woken up to hear it.
halt() {
    local pid signal _
    if runs "$1"; then
        read -r pid _ signal <"$1/service.pid"
        kill -s "$signal" "$pid" || true
        kill -s CONT "$pid" 2>/dev/null || true
        for _ in {1..300}; do
            runs "$1" || break
            sleep 0.05
        done
        if runs "$1"; then
            say "$1 does not stop: killing it"
            kill -s KILL "$pid" || true
        fi
    fi
    rm -f "$1/service.pid"
}
