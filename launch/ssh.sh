#!/bin/bash
# Run a command on several machines that ssh reaches and that see the same folders; Ctrl-C saves on all of them.
#
#   GPUS=8 launch/ssh.sh node1,node2 pretrain --images PREPARED --tokenizer TOKENIZER --tokens TOKENS --out RUN --resume
set -uo pipefail
IFS=, read -ra hosts <<<"${1:?"usage: $0 HOST,HOST,... COMMAND --option value ..."}"
shift
printf -v args '%q ' "$@"
printf -v here '%q' "$PWD"
printf -v path '%q' "$PATH"

nodes=() keyboards=()
trap 'for keys in "${keyboards[@]}"; do printf "\003" >&"$keys"; done' INT TERM
for rank in "${!hosts[@]}"; do
    # A terminal (-tt), so that remote processes get Ctrl-C, and end with the connection.
    exec {keys}<> <(:) # a pipe to type it into
    keyboards+=("$keys")
    ssh -tt "${hosts[$rank]}" "cd $here && PATH=$path OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} exec torchrun \
        --nnodes ${#hosts[@]} --node-rank $rank --nproc-per-node ${GPUS:-1} \
        --master-addr ${MASTER:-${hosts[0]}} --master-port ${PORT:-29500} -m mapet $args" <&"$keys" &
    nodes+=("$!")
done

code=0
for node in "${nodes[@]}"; do
    while true; do # Ctrl-C ends the first wait, not the node
        wait "$node" || code=$?
        kill -0 "$node" 2>/dev/null || break
    done
done
exit "$code"
