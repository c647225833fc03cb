#!/usr/bin/env bash
# Runs the libFuzzer targets, each for FUZZ_SECONDS (default: 60), with the repository's corpus as seed. What
# they find along the way stays under fuzz/target; a crash is written to fuzz/artifacts and ends with an
# error. Arguments name targets; without any, all are run.
# It needs cargo-fuzz and a C++ compiler. The sanitisers are a nightly feature: on a stable compiler
# RUSTC_BOOTSTRAP switches them on.
set -euo pipefail
cd "$(dirname "$(realpath "$0")")/.."
SECONDS_EACH=${FUZZ_SECONDS:-60}
command -v cargo-fuzz >/dev/null || {
    echo "fuzz: error: cargo-fuzz is missing: cargo install --locked cargo-fuzz" >&2
    exit 1
}
export RUSTC_BOOTSTRAP=1
[ $# -gt 0 ] || set -- guest_frame guest_message host_link core_link piko_socket host_token
for target in "$@"; do
    features=()
    # What is not the guest's takes much longer to build.
    [[ $target == guest_* ]] || features=(--features host)
    found=fuzz/target/corpus/$target
    mkdir -p "$found" "fuzz/artifacts/$target"
    # Without a look for leaks after each input: threads of a call that was given up are still at work then.
    cargo fuzz run "${features[@]}" "$target" "$found" "fuzz/corpus/$target" -- -detect_leaks=0 \
        -max_total_time="$SECONDS_EACH" -max_len=65536 -timeout=30 -rss_limit_mb=4096 -print_final_stats=1
done
echo "fuzz: $# targets, nothing found"
