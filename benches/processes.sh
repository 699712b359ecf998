# What the host halves of the benchmarks share, to be sourced: a directory, $work, and processes, $running, that go with the
# shell.
work=$(mktemp -d /run/krun-bench.XXXXXX)
running=
finish() {
    # shellcheck disable=SC2086 # several numbers
    [ -z "$running" ] || kill $running 2> /dev/null || true
    rm -rf "$work"
}
trap finish EXIT

# Waits until a command succeeds, for 20 s.
await() {
    for _ in $(seq 200); do
        if "$@"; then return; fi
        sleep 0.1
    done
    echo "gave up: $*" >&2
    exit 1
}
