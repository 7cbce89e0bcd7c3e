#!/bin/sh
# drain-node SECONDS [PROC]: what a worker pod does before it goes (preStop). Ray is told, so that nothing new is placed
# on this node and Serve starts other replicas for the judges here; then their work has SECONDS to move. PROC is where
# the processes are listed, /proc unless told.
set -eu
seconds=$1
proc=${2:-/proc}

node=
for process in "$proc"/[0-9]*; do
    [ -r "$process/cmdline" ] || continue
    node=$(tr '\0' '\n' < "$process/cmdline" 2> /dev/null | sed -n 's/^--node_id=//p')
    [ -z "$node" ] || break
done
if [ -z "$node" ]; then
    echo "drain-node: no raylet runs here" >&2
    exit 0
fi

# A node that the autoscaler has drained before is refused, and is about to end anyway.
ray drain-node --node-id "$node" --reason DRAIN_NODE_REASON_PREEMPTION \
    --reason-message "its pod is being deleted" --deadline-remaining-seconds "$seconds" || true
# A drained raylet ends once nothing runs on it any more.
while [ "$seconds" -gt 0 ] && [ -d "$process" ]; do
    sleep 1
    seconds=$((seconds - 1))
done
