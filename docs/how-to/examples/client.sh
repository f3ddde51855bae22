#!/usr/bin/env bash
# A whole FL client in bash and curl: asks for a task, does it, answers, until the training has ended.
# URL=https://fl.example.org TOKEN=... TRAIN=./train EVALUATE=./evaluate client.sh
#   $TRAIN IN OUT CONFIG.json   reads weights, writes weights, prints the number of examples
#   $EVALUATE IN CONFIG.json    reads weights, prints the number of examples and then name=value …
set -euo pipefail
: "${URL:?}" "${TOKEN:?}" "${TRAIN:?}" "${EVALUATE:?}"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
# The token goes through a file that only we can read, so that it is not in the list of processes.
(umask 077 && printf 'header = "Authorization: Token %s"\n' "$TOKEN" >"$work/curlrc")

ask() { # ask CURL-ARGUMENTS...: the body; refusals (4xx) are told and end the client
    local status
    status="$(curl --silent --show-error --config "$work/curlrc" ${CA:+--cacert "$CA"} \
        --retry 8 --retry-all-errors --retry-connrefused --max-time 600 \
        --output "$work/answer" --write-out '%{http_code}' "$@")"
    case "$status" in
        2*) cat "$work/answer" ;;
        409) echo "too late: $(cat "$work/answer")" >&2 ;; # the round went on without us; ask again
        *) echo "the server answered $status: $(cat "$work/answer")" >&2 && return 1 ;;
    esac
}
field() { # field NAME...: a field of the JSON on standard input, or nothing
    python3 -c '
import json, sys
found = json.load(sys.stdin)
for name in sys.argv[1:]:
    found = found.get(name) if isinstance(found, dict) else None
print("" if found is None else json.dumps(found) if isinstance(found, dict) else found)' "$@"
}

while true; do
    answer="$(ask "$URL/api/tasks/?wait=25")"
    state="$(field state <<<"$answer")"
    if [ "$state" = done ]; then
        echo "the training has ended; its model: $URL$(field final_model url <<<"$answer")"
        exit 0
    elif [ "$state" = wait ]; then
        sleep "$(field retry_after <<<"$answer")"
        continue
    fi
    round="$(field task round <<<"$answer")"
    field task config <<<"$answer" >"$work/config.json"
    ask "$URL$(field task model url <<<"$answer")" >"$work/in"
    upload="$URL$(field task upload_url <<<"$answer")"
    case "$(field task kind <<<"$answer")" in
        train)
            samples="$("$TRAIN" "$work/in" "$work/out" "$work/config.json")"
            ask "$upload" --form "round=$round" --form "sample_size=$samples" \
                --form "model_file=@$work/out" >/dev/null
            ;;
        evaluate)
            read -r samples metrics <<<"$("$EVALUATE" "$work/in" "$work/config.json")"
            fields=(--form "sample_size=$samples")
            for metric in $metrics; do
                fields+=(--form "metric_names=${metric%%=*}" --form "metric_values=${metric#*=}")
            done
            ask "$upload" "${fields[@]}" >/dev/null
            ;;
    esac
    echo "round $round: $(field task kind <<<"$answer") done"
done
